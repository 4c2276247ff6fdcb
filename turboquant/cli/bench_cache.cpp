#include "turboquant/cli/bench_cache.h"

#include <cmath>
#include <cstdlib>
#include <numeric>

#include "fmt/format.h"
#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/thread_team.h"
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

/// One side of the cache with its memory.
struct OurTensor {
    explicit OurTensor(const KvTensor::Geometry& g, int head_dim) : memory(KvTensor::reserved_bytes(g)), tensor(g, memory.get()) {
        tensor.bind_head_dim(head_dim);
    }
    AlignedBytes memory;
    KvTensor tensor;
};

class TurboquantCache final : public BenchCache {
  public:
    TurboquantCache(const KvSpec& spec, const BenchShape& shape, const BenchData& data)
        : shape_(shape),
          data_(data),
          kernels_(kernels()),
          k_({Side::key, spec.k, spec.norm(Side::key), static_cast<std::int64_t>(shape.n_embd_kv()), shape.n_kv, 1}, shape.head_dim),
          v_({Side::value, spec.v, spec.norm(Side::value), static_cast<std::int64_t>(shape.n_embd_kv()), shape.n_kv, 1}, shape.head_dim),
          rows_(static_cast<std::size_t>(shape.n_kv)),
          cells_(shape.n_kv, 1),
          output_(data.q.size()),
          team_(shape.n_threads) {
        std::iota(rows_.begin(), rows_.end(), 0);
        scratch_.resize(static_cast<std::size_t>(shape.n_threads), rows_);
        args_.n_head = shape.n_head, args_.n_head_kv = shape.n_head_kv;
        args_.n_tokens = shape.n_tokens, args_.n_kv = shape.n_kv;
        args_.q = data.q.data(), args_.out = output_.data();
        args_.q_token_stride = args_.out_token_stride = shape.n_embd_q();
        args_.q_head_stride = args_.out_head_stride = static_cast<std::size_t>(shape.head_dim);
        args_.k = k_.tensor.view(0), args_.v = v_.tensor.view(0);
        args_.v_dim_out = shape.head_dim;
        args_.mask = data.mask.data(), args_.mask_token_stride = static_cast<std::size_t>(shape.n_kv);
        args_.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
        if (spec.offset && codec_info(spec.k).rotated) enable_offset();
        plan_ = plan_attention(kernels_, args_, shape.n_threads);
        workspace_ = std::make_unique<AlignedBytes>(plan_.workspace_bytes);
    }

    void encode() override {
        const auto d = static_cast<std::size_t>(shape_.head_dim);
        const bool offset = k_.tensor.offset() != nullptr;
        if (offset) k_.tensor.begin_keys(data_.k.data(), shape_.n_embd_kv(), rows_, cells_, batch_);
        team_.run([&](int ith) {
            const std::span<std::int64_t> scratch = scratch_[static_cast<std::size_t>(ith)];
            if (offset) k_.tensor.encode_part(kernels_, ith, shape_.n_threads, data_.k.data(), shape_.n_embd_kv(), rows_, cells_, scratch);
            for (int part = (offset ? shape_.n_head_kv : 0) + ith; part < 2 * shape_.n_head_kv; part += shape_.n_threads) {
                const bool value = part >= shape_.n_head_kv;
                const int head = part % shape_.n_head_kv;
                const float* x = (value ? data_.v : data_.k).data() + static_cast<std::size_t>(head) * d;
                (value ? v_ : k_).tensor.encode(kernels_, head, x, shape_.n_embd_kv(), rows_, scratch);
            }
        });
        if (offset) k_.tensor.end_keys(kernels_, rows_, cells_, batch_);
    }

    void attend() override {
        if (k_.tensor.offset()) set_query_terms();
        team_.run([&](int ith) { run_attention(kernels_, plan_, args_, workspace_->get(), ith); });
        if (plan_.n_chunks > 1) team_.run([&](int ith) { merge_attention(kernels_, plan_, args_, workspace_->get(), ith); });
    }

    std::span<const float> output() const override { return output_; }
    double bytes() const override { return static_cast<double>(k_.tensor.format_bytes() + v_.tensor.format_bytes()); }

  private:
    /// Key offset removal as the backend does it for a model with RoPE: the removed part comes back as a score term per key.
    void enable_offset() {
        k_.tensor.enable_offset();
        KeyOffset& offset = *k_.tensor.offset();
        RopeParams rope;
        rope.n_dims = shape_.head_dim;
        rope.pairs = RopePairs::split;
        offset.set_rope(rope);
        std::vector<std::int32_t> positions(rows_.size());
        std::iota(positions.begin(), positions.end(), 0);
        cells_.place(rows_, positions);
        const auto width = 2 * static_cast<std::size_t>(offset.n_freq());
        q_terms_.resize(static_cast<std::size_t>(shape_.n_tokens) * shape_.n_head * width);
        args_.term = {offset.n_freq(), q_terms_.data(), offset.turns(), cells_.stream(0), 1, nullptr};
    }

    void set_query_terms() {
        const auto d = static_cast<std::size_t>(shape_.head_dim), width = 2 * static_cast<std::size_t>(args_.term.n_freq);
        const int group = shape_.n_head / shape_.n_head_kv;
        for (std::size_t row = 0; row < data_.q.size() / d; row++)
            k_.tensor.offset()->query_terms(cells_.offset_id(0), std::span(data_.q).subspan(row * d, d),
                                            static_cast<int>(row) % shape_.n_head / group, std::span(q_terms_).subspan(row * width, width));
    }

    BenchShape shape_;
    const BenchData& data_;
    const Kernels& kernels_;
    OurTensor k_, v_;
    std::vector<std::int64_t> rows_;
    std::vector<std::vector<std::int64_t>> scratch_;  // one per thread
    CellPositions cells_;
    KeyBatch batch_;
    std::vector<float> q_terms_;
    std::vector<float> output_;
    AttentionArgs args_;
    AttentionPlan plan_;
    std::unique_ptr<AlignedBytes> workspace_;
    ThreadTeam team_;
};

}  // namespace

BenchData::BenchData(const BenchShape& shape) {
    const auto n_kv = static_cast<std::size_t>(shape.n_kv), n_tokens = static_cast<std::size_t>(shape.n_tokens);
    fill_normal(k, n_kv * shape.n_embd_kv(), 1);
    fill_normal(v, n_kv * shape.n_embd_kv(), 2);
    fill_normal(q, n_tokens * shape.n_embd_q(), 3);
    constexpr std::uint16_t kMinusInfinity = 0xfc00;
    mask.assign(n_tokens * n_kv, 0);
    for (std::size_t t = 0; t < n_tokens; t++)
        for (std::size_t j = n_kv - n_tokens + t + 1; j < n_kv; j++) mask[t * n_kv + j] = kMinusInfinity;
}

std::unique_ptr<BenchCache> make_turboquant_cache(const KvSpec& spec, const BenchShape& shape, const BenchData& data) {
    return std::make_unique<TurboquantCache>(spec, shape, data);
}

std::unique_ptr<BenchCache> make_bench_cache(const CacheSpec& spec, const BenchShape& shape, const BenchData& data) {
    return spec.ours ? make_turboquant_cache(*spec.ours, shape, data) : make_ggml_cache(spec, shape, data);
}

}  // namespace turboquant::cli
