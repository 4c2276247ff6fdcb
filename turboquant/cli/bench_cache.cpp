#include "turboquant/cli/bench_cache.h"

#include <cmath>
#include <cstdlib>
#include <numeric>

#include "fmt/format.h"
#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/window_attention.h"
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
          k_(geometry(spec, Side::key, shape), shape.head_dim),
          v_(geometry(spec, Side::value, shape), shape.head_dim),
          rows_(static_cast<std::size_t>(shape.n_kv)),
          cells_(shape.n_kv, 1),
          output_(data.q.size()),
          team_(shape.n_threads) {
        std::iota(rows_.begin(), rows_.end(), 0);
        scratch_.resize(static_cast<std::size_t>(shape.n_threads), rows_);
        std::vector<std::int32_t> positions(rows_.size());
        std::iota(positions.begin(), positions.end(), 0);
        cells_.place(rows_, positions);
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
    }

    void encode() override {
        for (std::size_t first = 0; first < rows_.size(); first += kBatch) {
            const auto rows = std::span(rows_).subspan(first, std::min(kBatch, rows_.size() - first));
            encode(rows, data_.k.data() + first * shape_.n_embd_kv(), data_.v.data() + first * shape_.n_embd_kv());
        }
    }

    void attend() override {
        if (k_.tensor.offset()) set_query_terms();
        ExactRows *k = k_.tensor.exact(), *v = v_.tensor.exact();
        if (!k || !windows_.split(args_, *k, v, cells_, 0)) {
            run(args_);
        } else {
            run(windows_.compressed());
            run(windows_.exact());
            team_.run([&](int ith) { windows_.merge(ith, shape_.n_threads); });
        }
        if (k) k->trim(cells_);
        if (v) v->trim(cells_);
    }

    std::span<const float> output() const override { return output_; }
    double bytes() const override { return static_cast<double>(k_.tensor.format_bytes() + v_.tensor.format_bytes()); }

  private:
    static constexpr std::size_t kBatch = 512;  // llama.cpp's default micro-batch: tokens that reach the cache at once

    void encode(std::span<const std::int64_t> rows, const float* k, const float* v) {
        const std::size_t d = static_cast<std::size_t>(shape_.head_dim), n_embd = shape_.n_embd_kv();
        const bool offset = k_.tensor.offset() != nullptr;
        ExactRows *exact_k = k_.tensor.exact(), *exact_v = v_.tensor.exact();
        if (exact_k) exact_k->round(k, n_embd, rows, cells_, rounded_k_), k = rounded_k_.data();
        if (exact_v) exact_v->round(v, n_embd, rows, cells_, rounded_v_), v = rounded_v_.data();
        if (offset) k_.tensor.begin_keys(k, n_embd, rows, cells_, batch_);
        team_.run([&](int ith) {
            const std::span<std::int64_t> scratch = std::span(scratch_[static_cast<std::size_t>(ith)]).first(rows.size());
            if (offset) k_.tensor.encode_part(kernels_, ith, shape_.n_threads, k, n_embd, rows, cells_, scratch);
            for (int part = (offset ? shape_.n_head_kv : 0) + ith; part < 2 * shape_.n_head_kv; part += shape_.n_threads) {
                const bool value = part >= shape_.n_head_kv;
                const int head = part % shape_.n_head_kv;
                (value ? v_ : k_)
                    .tensor.encode(kernels_, head, (value ? v : k) + static_cast<std::size_t>(head) * d, n_embd, rows, scratch);
            }
        });
        if (offset) k_.tensor.end_keys(kernels_, rows, cells_, batch_);
        if (exact_k) exact_k->add(kernels_, k, rows, cells_), exact_k->trim(cells_);
        if (exact_v) exact_v->add(kernels_, v, rows, cells_), exact_v->trim(cells_);
    }

    static KvTensor::Geometry geometry(const KvSpec& spec, Side side, const BenchShape& shape) {
        KvTensor::Geometry g;
        g.side = side, g.codecs = side == Side::key ? spec.k : spec.v, g.norm_mode = spec.norm(side);
        g.n_embd = static_cast<std::int64_t>(shape.n_embd_kv()), g.n_cells = shape.n_kv;
        g.windows = spec.windows.resolve(shape.n_kv);
        return g;
    }

    void run(const AttentionArgs& a) {
        const AttentionPlan plan = plan_attention(kernels_, a, shape_.n_threads);
        if (!workspace_ || workspace_bytes_ < plan.workspace_bytes)
            workspace_ = std::make_unique<AlignedBytes>(workspace_bytes_ = plan.workspace_bytes);
        team_.run([&](int ith) { run_attention(kernels_, plan, a, workspace_->get(), ith); });
        if (plan.n_chunks > 1) team_.run([&](int ith) { merge_attention(kernels_, plan, a, workspace_->get(), ith); });
    }

    /// Key offset removal as the backend does it for a model with RoPE: the removed part comes back as a score term per key.
    void enable_offset() {
        k_.tensor.enable_offset();
        KeyOffset& offset = *k_.tensor.offset();
        RopeParams rope;
        rope.n_dims = shape_.head_dim;
        rope.pairs = RopePairs::split;
        offset.set_rope(rope);
        const auto width = 2 * static_cast<std::size_t>(offset.n_freq());
        q_terms_.resize(static_cast<std::size_t>(shape_.n_tokens) * shape_.n_head * width);
        for (std::int64_t cell = 0; cell < shape_.n_kv; cell++) cell_pos_.push_back(cells_.at(cell));
        args_.term = {offset.n_freq(), q_terms_.data(), offset.turns(), cell_pos_.data(), 1, nullptr};
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
    std::vector<std::int32_t> cell_pos_;
    KeyBatch batch_;
    std::vector<float> q_terms_;
    std::vector<float> output_, rounded_k_, rounded_v_;
    WindowAttention windows_;
    AttentionArgs args_;
    std::unique_ptr<AlignedBytes> workspace_;
    std::size_t workspace_bytes_ = 0;
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
