// The planner's measuring half: sensitivities of a model's layers and sides, and the plan they lead to (planner/ decides, this measures).
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "turboquant/llama/kv_probe.h"
#include "turboquant/llama/model_id.h"
#include "turboquant/measure/kld_meter.h"
#include "turboquant/planner/plan.h"
#include "turboquant/planner/sensitivity.h"
#include "turboquant/spec/words.h"

namespace turboquant::measure {

struct PlannerOptions {
    std::string calib_file{};  ///< empty: text that the model writes
    int calib_tokens = 0;      ///< 0: as many as the time allows
    std::uint32_t seed = 1;
    int n_threads = 0;
    bool per_head = false;  ///< measure and choose formats per KV head however long it takes
    SpecOptions spec{};     ///< hold for the measurements and the plan
};

/// The keys or the values of one layer, or of one KV head of it.
struct Slot {
    int layer = 0;
    Side side = Side::key;
    int head_dim = 0, n_heads = 0;
    int head = -1;     ///< of `of_heads`; -1: all, n_heads
    int of_heads = 0;  ///< that the layer has
    std::int64_t n_cells = 0;
    std::vector<CostPoint> points;  ///< measured
    std::vector<double> errors;     ///< standard errors of the points' divergences
};

/// Measures one model when the first plan is asked for; then makes plans for any budget in no time.
class Planner {
  public:
    /// Looks at the cache's shape. Throws Error if we have no formats for it. `file` must outlive this.
    Planner(llama::ModelFile& file, PlannerOptions options);

    const std::vector<Slot>& slots() const { return slots_; }
    const llama::Calibration& calibration() const { return text_; }
    /// Letters by layer (spec/channel_scales.h), after the first plan(); empty if scaling does not help this model.
    const std::map<int, std::string>& key_scales() const { return key_scales_; }
    /// Divergence with scales over that without, keys of all scaled layers in turbo2, 3 and 4 (geometric mean).
    double scale_gain() const { return scale_gain_; }

    /// The best plan within the budget in a context of n_ctx cells (0: the one the model was trained on). Throws Error if the budget
    /// is below what the smallest formats take.
    Plan plan(const Budget& budget, int n_ctx);
    /// Divergence of a plan on the calibration text.
    Divergence measure(const Plan& plan);

  private:
    void measure_slots();
    void split_heads();
    double n_runs() const;
    double affordable_tokens(const llama_model* model) const;
    /// Bits of the whole cache, beside fixed_bits_.
    double least_bits(int n_ctx) const;
    double n_values(int n_ctx) const;
    double cells(const Slot& slot, int n_ctx) const;
    double window_bits(int n_ctx) const;
    double offset_bits() const;
    std::vector<std::vector<std::size_t>> groups(bool per_head) const;
    double cost(const Slot& slot, CodecId codec) const;
    KvSpec spec_with(const Slot& slot, CodecId codec) const;
    void measure_scales(llama_model* model);
    llama::CacheSpec spec_of(KvSpec formats) const;

    llama::ModelFile* file_;
    llama::ModelId id_;
    PlannerOptions options_;
    int n_layers_ = 0, n_ctx_train_ = 0;
    llama::Calibration text_;
    std::vector<Slot> slots_;
    std::map<int, std::string> key_scales_;
    double scale_gain_ = 1;
    double floor_ = 0;       ///< divergence of the smallest difference
    double fixed_bits_ = 0;  ///< what a cell of the cache takes beside codes and scales
    int probe_ctx_ = 0;
    std::unique_ptr<KldMeter> meter_;
};

}  // namespace turboquant::measure
