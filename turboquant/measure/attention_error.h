// What a format's errors in keys and values do to the output of attention, computed from a model's own queries, keys and values: one pass over a
// text tells it of all heads, without noise of later layers. How much an error there costs in divergence is the layer's own affair: a smooth
// factor that is measured (planner.cpp).
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "turboquant/llama/kv_probe.h"
#include "turboquant/llama/output_weights.h"
#include "turboquant/planner/measurements.h"

namespace turboquant::measure {

/// Of one KV head: squared length of the error that reaches the residual stream (through the output projection, and a norm behind it) over that of
/// the stream itself, over the query heads that read it summed, over positions averaged.
struct HeadError {
    int layer = 0, head = 0;
    std::vector<double> keys;  ///< by kKeyErrors: relative squared errors of the keys
    double values = 0;         ///< per relative squared error of the values: proportional to it
};

class AttentionErrors {
  public:
    /// `offset`: keys are stored without theirs. `windows`: resolved. `weights`: where output projections are looked for; must outlive this.
    AttentionErrors(const std::vector<llama::KvLayerShape>& shapes, bool offset, WindowSizes windows, llama::OutputWeights& weights);

    /// Takes in what KvProbe::run hands out, with all outputs, of one sequence of n_tokens tokens.
    void add(const llama::KvRows& rows, int n_tokens);

    /// Of the layers whose queries, keys and values were seen, ascending by layer and head. `scales`: letters of scaled keys, by layer. Throws
    /// llama::Error if the model file cannot be read.
    std::vector<HeadError> heads(const std::map<int, std::string>& scales, int n_threads) const;

  private:
    struct Layer {
        llama::KvLayerShape shape;
        int n_query_heads = 0;
        std::vector<float> q, k, before, v;                ///< [token][head][dim]; q: of kept positions only
        std::vector<float> stream, stream_before, normed;  ///< squared lengths, by kept position
        int q_tokens = 0, k_tokens = 0, before_tokens = 0, v_tokens = 0, stream_tokens = 0, before_layer_tokens = 0, normed_tokens = 0;
    };
    static double reaching_share(const Layer& layer, std::size_t kept, double attention);
    HeadError head_errors(const Layer& layer, int head, const llama::OutputMetrics& metrics, const std::string& scales) const;

    bool offset_;
    WindowSizes windows_;
    llama::OutputWeights* weights_;
    std::map<int, Layer> layers_;
};

}  // namespace turboquant::measure
