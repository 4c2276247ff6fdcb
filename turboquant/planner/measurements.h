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

    int n_heads() const { return head < 0 ? of_heads : 1; }
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

/// How far slots are to be drawn towards their side's mean (CostModel) if there is no race to tell: as if 768 tokens had shown them to be alike. Seen on
/// SmolLM2-135M at 4.25 bits, from 256 tokens: mean KLD .0057 with the measurements as they are, .0039 drawn by .75, .0042 by 1.
double default_evenness(const Measurements& m);

/// What formats cost in slots, by the measurements: a slot's divergence at its measured format, times what all of its side was seen to cost in the
/// wanted format over what it cost in that one (a power law in the squared error between formats that were measured: at large errors divergence
/// grows faster than the error). Of single heads the cost is drawn towards the mean of their layer's, as if so many tokens had shown them to be
/// alike: what a head does for one text it need not do for the next.
class CostModel {
  public:
    /// `evenness` from 0 to 1 draws slots of a side towards their geometric mean: 0 believes the measurements, 1 the mean.
    /// Throws std::invalid_argument if there are no slots or responses.
    explicit CostModel(const Measurements& m, double evenness = 0);

    double cost(std::size_t slot, CodecId codec) const;
    /// All keys and all values in one format each.
    double uniform(CodecId k, CodecId v) const { return k_curve_.at(mse(Side::key, k)) + v_curve_.at(mse(Side::value, v)); }

  private:
    double mse(Side side, CodecId codec) const;

    int head_dim_;
    CostCurve k_curve_, v_curve_;
    double k_measured_, v_measured_;  ///< the curves at the formats that slots were measured in
    std::vector<double> sensitivity_;
    std::vector<Side> sides_;
};

}  // namespace turboquant
