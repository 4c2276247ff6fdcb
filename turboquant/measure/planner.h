// The planner's measuring half: what formats cost the layers and sides of a model, and the race in which a choice is held against uniform formats
// (planner/ decides, this measures).
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "turboquant/llama/kv_probe.h"
#include "turboquant/llama/model_id.h"
#include "turboquant/measure/kld_meter.h"
#include "turboquant/planner/choose.h"

namespace turboquant::measure {

struct PlannerOptions {
    std::string calib_file{};  ///< empty: what ships with the library, or the model writes
    int calib_tokens = 0;      ///< 0: as many as the time allows
    std::uint32_t seed = 0;    ///< without a file: 0: the library's text, else the model writes one from this seed
    int n_threads = 0;
    bool per_head = false;  ///< measure and choose formats per KV head however long it takes
    bool race = true;       ///< hold plans against the best uniform formats
    SpecOptions spec{};     ///< hold for the measurements and the plan
};

/// Measures one model when the first plan is asked for; then makes plans for any budget with a few runs each.
class Planner {
  public:
    /// Looks at the cache's shape. Throws llama::Error if we have no formats for it. `file` must outlive this.
    Planner(llama::ModelFile& file, PlannerOptions options);

    /// The best plan found within the budget in a context of n_ctx cells (0: the one the model was trained on): allocated by the measurements, and
    /// unless it was told not to race, the winner on text that those did not see, against the best uniform pairs of no more bits. The measurements
    /// hold for contexts like that of the first plan, whose exact windows they were made with. Throws llama::Error, and std::invalid_argument if
    /// the budget is below what the smallest formats take.
    Plan plan(const Budget& budget, int n_ctx);

    /// After the first plan.
    const Measurements& measurements() const { return measured_; }
    /// Divergence of a plan on the calibration text.
    MeanError measure(const Plan& plan);

  private:
    void measure_all(int n_ctx);
    void write_text();
    void choose_text(int n_sequences, int length, int longer);
    /// Looks at queries, keys and values: scales of key channels, and what errors are expected to do.
    void look(llama::Work& work);
    void measure_responses(llama::Work& work);
    void measure_floors(llama::Work& work);
    void measure_groups(llama::Work& work);
    KldMeter& race_meter();
    Plan race(std::vector<Plan> contenders);
    double affordable_runs(int tokens) const;
    double n_runs() const;
    int n_layers_of(Side side) const;
    std::vector<std::vector<std::size_t>> groups() const;
    void set_windows(KvSpec& formats) const;
    llama::CacheSpec spec_of(KvSpec formats) const;
    KvSpec group_spec(const std::vector<std::size_t>& group, CodecId codec) const;

    llama::ModelFile* file_;
    std::shared_ptr<llama_model> model_;
    llama::ModelId id_;
    PlannerOptions options_;
    std::vector<llama::KvLayerShape> shapes_;
    int n_groups_ = 1;     ///< of a side that are measured; layers of one together
    WindowSizes windows_;  ///< of the measurements: what the cache will have
    llama::Calibration text_, looked_at_, race_text_;
    Measurements measured_;
    std::map<int, double> floors_;  ///< by layer, where weights are quantized
    std::unique_ptr<KldMeter> meter_, race_meter_;
    std::map<std::string, std::vector<double>> raced_;  ///< by SPEC
};

}  // namespace turboquant::measure
