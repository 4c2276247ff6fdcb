// What was measured of one model, enough to choose formats for any budget, and what a choice takes and is predicted to cost.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "turboquant/planner/sensitivity.h"
#include "turboquant/spec/kv_spec.h"

namespace turboquant {

/// Relative squared errors of keys from tcq5's to beyond tcq1's: softmax makes of large ones more, or less, than in proportion.
inline constexpr double kKeyErrors[] = {0.0005, 0.002, 0.007, 0.025, 0.09, 0.33};

/// The keys or the values of one layer, or of one KV head of it.
struct MeasuredSlot {
    int layer = 0;
    Side side = Side::key;
    int head_dim = 0;
    int of_heads = 0;         ///< that the layer has
    int head = -1;            ///< -1: all of them
    std::int64_t window = 0;  ///< cells of a sliding-window layer; 0: as many as the context has
    double kld = 0;           ///< mean divergence with this slot alone in Measurements::slot_format, nats, rounding aside
    double error = 0;         ///< standard error of kld
    /// What errors there are expected to do, up to a factor that varies slowly with depth: the square of what they add to the residual stream, over
    /// the stream's own. Of keys at the relative squared errors kKeyErrors, of values one number, per relative squared error. Empty: unknown.
    std::vector<double> expected{};

    int n_heads() const { return head < 0 ? of_heads : 1; }
    /// At a relative squared error; in proportion to it (and the heads) if nothing is expected.
    double expected_at(double mse) const;
    /// In a context of n_ctx.
    std::int64_t cells(std::int64_t n_ctx) const { return window > 0 && window < n_ctx ? window : n_ctx; }
    double values(std::int64_t n_ctx) const { return static_cast<double>(cells(n_ctx)) * head_dim * n_heads(); }

    friend bool operator==(const MeasuredSlot&, const MeasuredSlot&) = default;
};

/// All keys, or all values, of the model in one format, the other side exact.
struct Response {
    CodecId codec = CodecId::raw;
    double kld = 0;

    friend bool operator==(const Response&, const Response&) = default;
};

struct Measurements {
    int n_layers = 0, n_ctx_train = 0;
    SpecOptions options;  ///< they hold for; windows as they were given, not as they were resolved
    CodecId k_format = CodecId::turbo2, v_format = CodecId::turbo2;  ///< that slots were measured in
    std::vector<MeasuredSlot> slots;
    std::vector<Response> k_responses, v_responses;
    std::map<int, std::string> key_scales;  ///< by layer, letters; empty: they do not pay
    double scale_gain = 1;                  ///< divergence with scales over that without
    double floor = 0;                       ///< divergence of the smallest difference: rounding, where weights are quantized
    double cell_bits = 0;                   ///< of a cell of the cache beside codes and scales: its position
    std::string text;                       ///< measured on, in words
    int tokens = 0;

    CodecId slot_format(Side side) const { return side == Side::key ? k_format : v_format; }
    double values(std::int64_t n_ctx) const;
    /// Everything that is stored beside the codes in a context of n_ctx: positions, exact windows, what is removed from keys, scales.
    double fixed_bits(std::int64_t n_ctx) const;

    friend bool operator==(const Measurements&, const Measurements&) = default;
};

/// Formats to choose from: those with kernels of their own.
std::vector<CodecId> planned_codecs();

/// Bytes of 64 cells of a slot.
double tile_bytes_of(const MeasuredSlot& slot, CodecId codec);

/// What formats cost in slots. Divergence is expected in proportion to MeasuredSlot::expected, by a factor of the side that varies slowly with depth: a
/// parabola through the measured slots' factors. How far single slots stray from it beyond what their standard errors explain says how far each is
/// believed (empirical Bayes). On top, by format, what all of the side was seen to cost over what is expected of it (between measured formats a
/// power law in the squared error).
class CostModel {
  public:
    /// `evenness` from 0 to 1 draws slots further to what is expected of them: 0 believes the measurements as far as above, 1 not at all.
    /// Throws std::invalid_argument if there are no slots or responses.
    explicit CostModel(const Measurements& m, double evenness = 0);

    double cost(std::size_t slot, CodecId codec) const;
    /// All keys and all values in one format each.
    double uniform(CodecId k, CodecId v) const;

  private:
    struct SideModel {
        std::vector<std::size_t> slots;
        std::vector<CostPoint> corrections;  ///< by squared error, ascending: seen over expected
        double correction(double mse) const;
    };
    void fit_factors(const Measurements& m, Side side, double evenness);
    void fit_corrections(const Measurements& m, Side side);
    const SideModel& side_model(Side side) const { return side == Side::key ? keys_ : values_; }
    double mse(Side side, CodecId codec) const;

    int head_dim_;
    std::vector<MeasuredSlot> slots_;
    std::vector<double> factors_;
    SideModel keys_, values_;
};

}  // namespace turboquant
