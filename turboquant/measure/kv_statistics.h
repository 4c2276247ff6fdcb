// Statistics of a model's keys and values, accumulated token by token.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "turboquant/llama/kv_probe.h"

namespace turboquant::measure {

/// One side of one layer.
struct SideStatistics {
    std::vector<double> norm_heads;  ///< mean over tokens of the L2 norm of each head's vector
    double norm = 0;                 ///< mean over heads
    double max_rms = 0;              ///< channel RMS over tokens, as cached; largest and median of all heads' channels
    double median_rms = 0;
    double outlier_share = 0;  ///< of channels whose RMS exceeds `outlier_ratio` times the median of their head
};

struct LayerStatistics {
    int layer = 0;
    SideStatistics k;
    std::optional<SideStatistics> v;  ///< none: the model stores no values
    /// |mean of the un-rotated keys|^2 over their mean |k|^2, both summed over the heads: what key offset removal takes out.
    double k_offset_share = 0;

    /// K norm over V norm, if there are values that are not all zero.
    std::optional<double> ratio() const;
};

class KvStatistics {
  public:
    /// Takes in what KvProbe::run hands out.
    void add(const llama::KvRows& rows);
    /// Ascending by layer. Offset shares are of the keys before RoPE where add() saw such.
    std::vector<LayerStatistics> layers(double outlier_ratio) const;

    /// Per channel of all KV heads of a layer: variance of the keys before RoPE, and mean square of the queries that read them (mean over
    /// the query heads of a KV head). Empty if add() saw none.
    std::vector<double> key_variance(int layer) const;
    std::vector<double> query_energy(int layer) const;

  private:
    struct Sums {
        int head_dim = 0, n_heads = 0;
        std::int64_t tokens = 0;
        std::vector<double> sum, square;  ///< per channel, [head][dim]
        std::vector<double> norm;         ///< per head
    };
    static SideStatistics side(const Sums& sums, double outlier_ratio);

    std::map<std::pair<int, llama::KvSource>, Sums> sums_;
};

}  // namespace turboquant::measure
