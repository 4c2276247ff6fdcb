// Brings an attention call of the CPU's kind to the GPU: tiles into fragment order by way of the row form, everything else as it is.
#pragma once

#include "tests/cuda/support.h"

#ifdef TQ_HAS_CUDA
#include <cuda_runtime_api.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "tests/kernels/support.h"
#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/prefill.h"

namespace turboquant::cuda::test {

inline void must(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(cudaGetErrorString(e));
}
inline void must(const Status& s) {
    if (!s.ok()) throw std::runtime_error(s.message());
}

/// Device memory with a copy of host data.
class DeviceBytes {
  public:
    explicit DeviceBytes(std::size_t n) : size_(n) {
        must(cudaMalloc(&data_, n + 256));
        must(cudaMemset(data_, 0xff, n + 256));
    }
    template <class T>
    explicit DeviceBytes(const std::vector<T>& v) : DeviceBytes(v.size() * sizeof(T)) {
        if (!v.empty()) must(cudaMemcpy(data_, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    DeviceBytes(const DeviceBytes&) = delete;
    DeviceBytes& operator=(const DeviceBytes&) = delete;
    ~DeviceBytes() { cudaFree(data_); }
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    std::size_t size() const { return size_; }

  private:
    void* data_ = nullptr;
    std::size_t size_;
};

class Rig {
  public:
    using CpuArgs = turboquant::AttentionArgs;

    explicit Rig(const CpuArgs& one) : Rig(std::vector<const CpuArgs*>{&one}, false) {}
    /// Calls that differ in contents and length only, as sequences of one. `prefill`: takes what it can, also where the plan
    /// would have the decode kernels, since rows of tests are few.
    Rig(const std::vector<const CpuArgs*>& calls, bool uniform, bool exact_windows = false, bool prefill = true) {
        const CpuArgs& a = *calls[0];
        const int d = a.k.shape.head_dim;
        n_seq_ = static_cast<int>(calls.size());
        for (const CpuArgs* c : calls) n_kv_.push_back(c->n_kv), most_ = std::max(most_, c->n_kv);
        must(query_device(0, device_));
        must(cudaStreamCreate(&stream_));
        std::vector<CodecId> formats;
        for (const TileView* side : {&a.k, &a.v})
            for (int h = 0; h < a.n_head_kv; ++h) formats.push_back(side->head_shape(h).codec);
        if (!prefill) formats.clear();
        const AttentionShape shape{d, a.n_head, a.n_head_kv, a.n_tokens, n_kv_, exact_windows, uniform, formats, a.term.n_freq > 0};
        must(plan_attention(device_, shape, plan));
        if (prefill_can(device_, shape) && !plan.prefill.n_splits) plan_prefill(device_, plan, shape.term);
        workspace_ = keep(plan.workspace_bytes);
        must(prepare_workspace(plan, workspace_->as<void>(), stream_));
        must(upload_attention_tables(tables_, d, keep(attention_table_bytes(d))->as<void>(), stream_));
        args.tables = &tables_;
        rows_ = static_cast<std::size_t>(a.n_tokens) * a.n_head * d;
        std::vector<float> q;
        for (const CpuArgs* c : calls) q.insert(q.end(), c->q, c->q + rows_);
        args.q = keep(q)->as<float>(), out_ = keep(q.size() * sizeof(float)), args.out = out_->as<float>();
        args.q_seq_stride = args.out_seq_stride = rows_;
        args.q_token_stride = args.out_token_stride = static_cast<std::size_t>(a.n_head) * d, args.q_head_stride = args.out_head_stride = d;
        args.k = tiles_of(calls, &CpuArgs::k), args.v = tiles_of(calls, &CpuArgs::v);
        seq_n_kv_ = keep(n_kv_), args.seq_n_kv = seq_n_kv_->as<std::int32_t>();
        args.scale = a.scale, args.logit_softcap = a.logit_softcap, args.max_bias = a.max_bias;
        if (a.sinks) args.sinks = keep(std::vector<float>(a.sinks, a.sinks + a.n_head))->as<float>();
        if (a.mask) {
            const std::size_t n = static_cast<std::size_t>(a.n_tokens) * a.mask_token_stride;
            args.mask = keep(std::vector<std::uint16_t>(a.mask, a.mask + n))->as<std::uint16_t>();
            args.mask_token_stride = a.mask_token_stride, args.mask_head_stride = a.mask_head_stride, args.mask_heads = a.mask_heads;
            if (a.mask_heads == 1) summarize();
        }
        if (a.term.n_freq) take_term(a);
        lse_ = keep(static_cast<std::size_t>(n_seq_) * a.n_tokens * a.n_head * sizeof(float)), args.lse = lse_->as<float>();
    }
    ~Rig() { cudaStreamDestroy(stream_); }

    std::vector<float> run() {
        return run_after([](Stream) {});
    }
    /// After what before(stream) gives to the stream.
    template <class F>
    std::vector<float> run_after(F&& before) {
        poison();
        before(stream_);
        must(run_attention(plan, args, workspace_->as<void>(), stream_));
        return result();
    }
    /// In two launches (can_split), of which the first hides the rows in its mask.
    std::vector<float> run_split(const NewRows& rows, const std::uint16_t* old_mask) {
        poison();
        AttentionArgs before = args;
        before.exact_mask = old_mask;
        must(run_before_rows(plan, before, workspace_->as<void>(), stream_));
        must(run_with_rows(plan, args, rows, workspace_->as<void>(), stream_));
        return result();
    }
    /// From a graph captured once, with this many cells in the first sequence.
    std::vector<float> replay(int n_kv) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
        must(run_attention(plan, args, workspace_->as<void>(), stream_));
        must(cudaStreamEndCapture(stream_, &graph));
        must(cudaGraphInstantiate(&exec, graph, 0));
        must(cudaMemcpy(seq_n_kv_->as<void>(), &n_kv, sizeof n_kv, cudaMemcpyHostToDevice));
        poison();
        must(cudaGraphLaunch(exec, stream_));
        const std::vector<float> out = result();
        must(cudaGraphExecDestroy(exec));
        must(cudaGraphDestroy(graph));
        return out;
    }

    Tiles tiles_of(const std::vector<const CpuArgs*>& calls, TileView CpuArgs::*side) {
        const TileView& view = calls[0]->*side;
        const int heads = calls[0]->n_head_kv, most_tiles = std::max(1, (longest(calls) + kTileKeys - 1) / kTileKeys);
        std::vector<std::size_t> head_at;
        std::vector<std::uint8_t> head_format;
        std::size_t head_end = 0;
        for (int h = 0; h < heads; ++h) {
            head_at.push_back(head_end), head_format.push_back(static_cast<std::uint8_t>(format_index(view.head_shape(h).codec)));
            head_end += tile_bytes(view.head_shape(h));
        }
        const std::size_t seq_stride = most_tiles * head_end;
        std::vector<std::uint8_t> bytes(calls.size() * seq_stride, 0);
        for (std::size_t s = 0; s < calls.size(); ++s)
            for (int h = 0; h < heads; ++h) {
                const TileView& from = calls[s]->*side;
                const TileShape shape = from.head_shape(h);
                std::vector<std::uint8_t> row(row_bytes(shape.codec, shape.head_dim));
                for (int j = 0; j < calls[s]->n_kv; ++j) {
                    tile_get_row(shape, from.head_tiles(h) + j / kTileKeys * from.tile_stride, j % kTileKeys, row.data());
                    fragment_set_row(shape, bytes.data() + s * seq_stride + j / kTileKeys * head_end + head_at[h], j % kTileKeys,
                                     row.data());
                }
            }
        Tiles t{
            keep(bytes)->as<std::uint8_t>(), seq_stride, head_at.size() > 1 ? head_at[1] : 0, head_end, view.shape.codec, nullptr, nullptr};
        if (view.heads) t.head_at = keep(head_at)->as<std::size_t>(), t.head_format = keep(head_format)->as<std::uint8_t>();
        return t;
    }

    /// What the masks say of tiles; of `exact_tiles` tiles of exact rows too.
    void summarize(int exact_tiles = 0) {
        const auto n_tiles = [](int n) { return static_cast<std::size_t>(n + kTileKeys - 1) / kTileKeys; };
        const auto of = [&](const std::uint16_t* mask, std::size_t seq_stride, std::size_t token_stride, int n) {
            auto* out = keep(n_seq_ * plan.n_tokens * n_tiles(n))->template as<std::uint8_t>();
            must(summarize_mask({mask, seq_stride, token_stride, n_seq_, plan.n_tokens, n, out}, stream_));
            return out;
        };
        if (args.mask) args.mask_tiles = of(args.mask, args.mask_seq_stride, args.mask_token_stride, plan.n_kv);
        if (!exact_tiles) return;
        args.exact_tiles = exact_tiles;
        args.exact_mask_tiles = of(args.exact_mask, args.exact_mask_seq_stride, args.exact_mask_token_stride, exact_tiles * kTileKeys);
    }

    template <class T>
    DeviceBytes* keep(const T& data) {
        memory_.push_back(std::make_unique<DeviceBytes>(data));
        return memory_.back().get();
    }

    AttentionPlan plan;
    AttentionArgs args;

  private:
    static int longest(const std::vector<const CpuArgs*>& calls) {
        int n = 0;
        for (const CpuArgs* c : calls) n = std::max(n, c->n_kv);
        return n;
    }
    void poison() { must(cudaMemsetAsync(out_->as<void>(), 0xff, out_->size(), stream_)); }
    std::vector<float> result() {
        must(cudaStreamSynchronize(stream_));
        std::vector<float> out(rows_ * n_seq_);
        must(cudaMemcpy(out.data(), out_->as<void>(), out.size() * sizeof(float), cudaMemcpyDeviceToHost));
        return out;
    }
    // The frequencies are those of tests/attention/problem.h.
    void take_term(const CpuArgs& a) {
        const ScoreTerm& t = a.term;
        std::vector<double> frequencies;
        for (int i = 0; i < t.n_freq; ++i) frequencies.push_back(std::pow(10000.0, -static_cast<double>(i) / t.n_freq));
        int top = 0;
        for (int j = 0; j < a.n_kv; ++j) top = std::max(top, t.cell_pos[j]);
        args.term.n_freq = t.n_freq, args.term.n_terms = t.n_terms;
        args.term.q_term =
            keep(std::vector<float>(t.q_term, t.q_term + static_cast<std::size_t>(t.n_terms) * a.n_tokens * a.n_head * 2 * t.n_freq))
                ->as<float>();
        args.term.turns = keep(make_term_turns(frequencies, top))->as<float>();
        args.term.panel = keep(make_term_panel(frequencies))->as<void>();
        args.term.cell_pos = keep(std::vector<std::int32_t>(t.cell_pos, t.cell_pos + a.n_kv))->as<std::int32_t>();
        if (t.cell_term) args.term.cell_term = keep(std::vector<std::uint8_t>(t.cell_term, t.cell_term + a.n_kv))->as<std::uint8_t>();
        const int n_tiles = (a.n_kv + kTileKeys - 1) / kTileKeys;
        auto* tile_pos = keep(std::vector<std::int32_t>(static_cast<std::size_t>(n_tiles), 12345))->as<std::int32_t>();
        args.term.tile_pos = tile_pos, args.term.cell_seq_stride = a.n_kv, args.term.tile_seq_stride = n_tiles;
        must(summarize_positions(args.term, 1, a.n_kv, nullptr, tile_pos, stream_));
    }

    Device device_;
    AttentionTables tables_;
    cudaStream_t stream_ = nullptr;
    int n_seq_ = 0, most_ = 0;
    std::size_t rows_ = 0;
    std::vector<int> n_kv_;
    std::vector<std::unique_ptr<DeviceBytes>> memory_;
    DeviceBytes *workspace_ = nullptr, *out_ = nullptr, *seq_n_kv_ = nullptr, *lse_ = nullptr;
};

/// The double-precision definition of a call, by int8 levels.
inline std::vector<float> defined(turboquant::test::Problem& problem) {
    return problem.run([](const turboquant::AttentionArgs& a) { reference_attention(a, ReferenceLevels::int8); });
}
/// |a - b| / |b|.
inline double error_of(const std::vector<float>& a, const std::vector<float>& b) {
    return std::sqrt(turboquant::test::relative_error(a, b));
}

/// Error of a call over sequences of `compressed` cells and, beside each, the raw rows of its window taken as they are for rotated ones.
double exact_window_error(const std::vector<turboquant::test::Problem*>& compressed,
                          const std::vector<turboquant::test::Problem*>& windows);

}  // namespace turboquant::cuda::test
#endif
