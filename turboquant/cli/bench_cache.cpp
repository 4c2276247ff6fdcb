#include "turboquant/cli/bench_cache.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "fmt/format.h"
#include "turboquant/cache/cpu/cpu_store.h"
#include "turboquant/cache/layer_cache.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/thread_team.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/random.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant::cli {
namespace {

void fill_normal(std::vector<float>& x, std::size_t n, std::uint64_t seed) {
    SplitMix64 random(seed);
    x.resize(n);
    for (float& f : x) f = static_cast<float>(random.normal());
}

/// Zeroed memory aligned as the kernels want it.
class AlignedBytes {
  public:
    explicit AlignedBytes(std::size_t n) : data_(static_cast<std::uint8_t*>(std::aligned_alloc(64, (n + 63) / 64 * 64 + 64)), std::free) {
        if (!data_) throw CommandError(fmt::format("out of memory ({} bytes); use fewer --tokens", n));
        std::fill_n(data_.get(), n, std::uint8_t{0});
    }
    std::uint8_t* get() const { return data_.get(); }

  private:
    std::unique_ptr<std::uint8_t, decltype(&std::free)> data_;
};

/// One layer of a cache, used as the backend uses it for a model with RoPE.
class TurboquantCache final : public BenchCache {
  public:
    TurboquantCache(const KvSpec& spec, const BenchShape& shape, const BenchData& data)
        : shape_(shape),
          data_(data),
          rows_(static_cast<std::size_t>(shape.n_kv)),
          positions_(rows_.size()),
          cells_(shape.n_kv, 1),
          layer_(cells_),
          output_(data.q.size()),
          team_(shape.n_threads) {
        std::iota(rows_.begin(), rows_.end(), 0);
        std::iota(positions_.begin(), positions_.end(), 0);
        ctx_.store.executor = &team_;
        for (const Side side : {Side::key, Side::value}) {
            const KvGeometry g = geometry(spec, side, shape);
            memory_.emplace_back(reserved_bytes(g));
            layer_.set_tensor(g, cpu_store_in(memory_.back().get()));
        }
        for (const Side side : {Side::key, Side::value}) layer_.bind(side, shape.head_dim, {spec.offset, {}});
        RopeParams rope;
        rope.n_dims = shape.head_dim;
        rope.pairs = RopePairs::split;
        layer_.set_rope(rope);
        args_.n_head = shape.n_head, args_.n_head_kv = shape.n_head_kv;
        args_.n_tokens = shape.n_tokens, args_.n_kv = shape.n_kv;
        args_.q_token_stride = args_.out_token_stride = shape.n_embd_q();
        args_.q_head_stride = args_.out_head_stride = static_cast<std::size_t>(shape.head_dim);
        args_.v_dim_out = shape.head_dim;
        args_.mask_token_stride = static_cast<std::size_t>(shape.n_kv);
        args_.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
    }

    void encode() override {
        const std::size_t n_embd = shape_.n_embd_kv();
        for (std::size_t first = 0, n; first < rows_.size(); first += n) {
            n = std::min(kBatch, rows_.size() - first);
            const auto rows = std::span(rows_).subspan(first, n);
            layer_.write_keys(ctx_, {data_.k.data() + first * n_embd, n_embd, rows, {}, {}}, std::span(positions_).subspan(first, n));
            layer_.write_values(ctx_, {data_.v.data() + first * n_embd, n_embd, rows, {}, {}});
            layer_.end_batch(ctx_.store);
        }
    }

    void attend() override {
        ctx_.plans.begin_graph();  // as if a model had one layer
        const StreamQuery query{data_.q.data(), output_.data(), data_.mask.data()};
        if (const char* error = layer_.attend(ctx_, args_, 0, {&query, 1})) throw CommandError(error);
    }

    std::span<const float> output() const override { return output_; }

    std::string fault() override {
        const std::vector<float> k = decoded(Side::key), v = decoded(Side::value);
        for (const Side side : {Side::key, Side::value}) {
            const double error = relative_error(side == Side::key ? data_.k : data_.v, side == Side::key ? k : v);
            if (const double most = most_error(layer_.tensor(side).geometry().codecs.of(0)); !(error <= most))
                return fmt::format("{} are stored with a relative error of {:.3g}; {:.3g} at most is to be expected",
                                   side == Side::key ? "keys" : "values", error, most);
        }
        const std::vector<float> expected = last_token(k, v);
        const double error = relative_error(expected, std::span(output_).last(expected.size()));
        if (!(error <= kAttentionError))
            return fmt::format("attention is {:.3g} away from what the stored keys and values give; {:.3g} at most is to be expected",
                               error, kAttentionError);
        return {};
    }
    double bytes() const override {
        return static_cast<double>(layer_.tensor(Side::key).format_bytes() + layer_.tensor(Side::value).format_bytes());
    }

  private:
    static constexpr std::size_t kBatch = 512;  // llama.cpp's default micro-batch: tokens that reach the cache at once

    /// Products of 8 bits cost less than .01; raw less than .001.
    static constexpr double kAttentionError = .03;

    /// Of normal data: formats for use come to less than twice 2^-bits (codebook.h), with the unbiased scale of values, too.
    static double most_error(CodecId id) { return is_composite(id) ? 1 : std::max(1e-3, 2 * std::exp2(-codec_info(id).bits)); }

    std::vector<float> decoded(Side side) {
        std::vector<std::uint16_t> halves(rows_.size() * shape_.n_embd_kv());
        layer_.decode(ctx_.store, side, 0, shape_.n_kv, halves.data());
        std::vector<float> x(halves.size());
        std::ranges::transform(halves, x.begin(), from_half);
        return x;
    }

    /// Attention of the last token in double precision: it sees all cells.
    std::vector<float> last_token(std::span<const float> k, std::span<const float> v) const {
        const std::size_t d = shape_.head_dim, n_kv = rows_.size(), stride = shape_.n_embd_kv();
        std::vector<float> out(shape_.n_embd_q());
        std::vector<double> weights(n_kv), sum(d);
        for (int h = 0; h < shape_.n_head; h++) {
            const float* q = data_.q.data() + (shape_.n_tokens - 1) * out.size() + h * d;
            const std::size_t head = h / (shape_.n_head / shape_.n_head_kv) * d;
            double most = -INFINITY, total = 0;
            for (std::size_t j = 0; j < n_kv; j++) {
                weights[j] = args_.scale * std::inner_product(q, q + d, k.data() + j * stride + head, 0.0);
                most = std::max(most, weights[j]);
            }
            std::ranges::fill(sum, 0.0);
            for (std::size_t j = 0; j < n_kv; j++) {
                const double w = std::exp(weights[j] - most);
                total += w;
                for (std::size_t i = 0; i < d; i++) sum[i] += w * v[j * stride + head + i];
            }
            for (std::size_t i = 0; i < d; i++) out[h * d + i] = static_cast<float>(sum[i] / total);
        }
        return out;
    }

    static KvGeometry geometry(const KvSpec& spec, Side side, const BenchShape& shape) {
        KvGeometry g;
        g.side = side, g.codecs = side == Side::key ? spec.k : spec.v, g.norm_mode = spec.norm(side);
        g.n_embd = static_cast<std::int64_t>(shape.n_embd_kv()), g.n_cells = shape.n_kv;
        g.windows = spec.windows_of(0, shape.n_kv);
        return g;
    }

    BenchShape shape_;
    const BenchData& data_;
    std::vector<std::int64_t> rows_;
    std::vector<std::int32_t> positions_;
    std::vector<AlignedBytes> memory_;
    CellPositions cells_;
    LayerCache layer_;
    std::vector<float> output_;
    AttentionArgs args_;
    ThreadTeam team_;
    CacheContext ctx_;
};

}  // namespace

double relative_error(std::span<const float> reference, std::span<const float> x) {
    double difference = 0, square = 0;
    for (std::size_t i = 0; i < x.size(); i++) {
        difference += std::pow(static_cast<double>(x[i]) - reference[i], 2);
        square += std::pow(static_cast<double>(reference[i]), 2);
    }
    return std::sqrt(difference / square);
}

BenchData::BenchData(const BenchShape& shape) {
    const auto n_kv = static_cast<std::size_t>(shape.n_kv), n_tokens = static_cast<std::size_t>(shape.n_tokens);
    fill_normal(k, n_kv * shape.n_embd_kv(), 1);
    fill_normal(v, n_kv * shape.n_embd_kv(), 2);
    fill_normal(q, n_tokens * shape.n_embd_q(), 3);
    mask.assign(n_tokens * n_kv, 0);
    for (std::size_t t = 0; t < n_tokens; t++)
        for (std::size_t j = n_kv - n_tokens + t + 1; j < n_kv; j++) mask[t * n_kv + j] = kMaskHidden;
}

std::unique_ptr<BenchCache> make_turboquant_cache(const KvSpec& spec, const BenchShape& shape, const BenchData& data) {
    return std::make_unique<TurboquantCache>(spec, shape, data);
}

std::unique_ptr<BenchCache> make_bench_cache(const CacheSpec& spec, const BenchShape& shape, const BenchData& data) {
    return spec.ours ? make_turboquant_cache(*spec.ours, shape, data) : make_ggml_cache(spec, shape, data);
}

}  // namespace turboquant::cli
