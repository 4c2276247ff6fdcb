// llama.cpp's own cache in a benchmark: the operations it runs on its KV tensors, in its layout, on ggml's CPU backend.
#include <cmath>

#include "fmt/format.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "turboquant/cli/bench_cache.h"
#include "turboquant/cli/command.h"

namespace turboquant::cli {
namespace {

struct Free {
    void operator()(ggml_context* c) const { ggml_free(c); }
    void operator()(ggml_backend* b) const { ggml_backend_free(b); }
    void operator()(ggml_backend_buffer* b) const { ggml_backend_buffer_free(b); }
};

class GgmlCache final : public BenchCache {
  public:
    GgmlCache(const CacheSpec& spec, const BenchShape& shape, const BenchData& data) {
        if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) ggml_backend_load_all();
        backend_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        if (!backend_) throw CommandError("this llama.cpp has no CPU backend to compare with; install its ggml-cpu library");
        set_threads(shape.n_threads);

        const auto d = shape.head_dim, heads = shape.n_head, kv_heads = shape.n_head_kv, n_kv = shape.n_kv, n_tokens = shape.n_tokens;
        const auto n_embd = static_cast<std::int64_t>(shape.n_embd_kv());
        constexpr std::size_t kTensors = 64;
        context_.reset(ggml_init({kTensors * ggml_tensor_overhead() + 2 * ggml_graph_overhead_custom(kTensors, false), nullptr, true}));
        ggml_context* c = context_.get();
        for (const auto& [type, name] : {std::pair{spec.type_k, "keys"}, {spec.type_v, "values"}})
            if (d % ggml_blck_size(type))
                throw CommandError(fmt::format("ggml's {} stores {} in blocks of {}, which do not divide a head of {}",
                                               ggml_type_name(type), name, ggml_blck_size(type), d));
        k_ = ggml_new_tensor_2d(c, spec.type_k, n_embd, n_kv);
        v_ = ggml_new_tensor_2d(c, spec.type_v, n_embd, n_kv);
        ggml_tensor* k_in = ggml_new_tensor_2d(c, GGML_TYPE_F32, n_embd, n_kv);
        ggml_tensor* v_in = ggml_new_tensor_2d(c, GGML_TYPE_F32, n_embd, n_kv);
        ggml_tensor* rows = ggml_new_tensor_1d(c, GGML_TYPE_I64, n_kv);
        ggml_tensor* q = ggml_new_tensor_3d(c, GGML_TYPE_F32, d, heads, n_tokens);
        ggml_tensor* mask = ggml_new_tensor_2d(c, GGML_TYPE_F16, n_kv, n_tokens);

        encode_ = ggml_new_graph_custom(c, kTensors, false);
        ggml_build_forward_expand(encode_, ggml_set_rows(c, k_, k_in, rows));
        ggml_build_forward_expand(encode_, ggml_set_rows(c, v_, v_in, rows));
        // As in llama.cpp's graphs: token-major cache, seen as [head_dim, cells, heads].
        const auto heads_of = [&](ggml_tensor* t) {
            const std::size_t head = ggml_row_size(t->type, d);
            return ggml_permute(c, ggml_view_3d(c, t, d, kv_heads, n_kv, head, t->nb[1], 0), 0, 2, 1, 3);
        };
        out_ = ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), heads_of(k_), heads_of(v_), mask,
                                   1 / std::sqrt(static_cast<float>(d)), 0, 0);
        attend_ = ggml_new_graph_custom(c, kTensors, false);
        ggml_build_forward_expand(attend_, out_);

        buffer_.reset(ggml_backend_alloc_ctx_tensors(c, backend_.get()));
        if (!buffer_) throw CommandError("out of memory; use fewer --tokens");
        std::vector<std::int64_t> row_numbers(static_cast<std::size_t>(n_kv));
        for (std::size_t i = 0; i < row_numbers.size(); i++) row_numbers[i] = static_cast<std::int64_t>(i);
        const auto set = [](ggml_tensor* t, const void* from) { ggml_backend_tensor_set(t, from, 0, ggml_nbytes(t)); };
        set(k_in, data.k.data()), set(v_in, data.v.data()), set(q, data.q.data()), set(mask, data.mask.data()),
            set(rows, row_numbers.data());
    }

    void encode() override { compute(encode_); }
    void attend() override { compute(attend_); }
    std::span<const float> output() const override {
        return {static_cast<const float*>(ggml_get_data(out_)), static_cast<std::size_t>(ggml_nelements(out_))};
    }
    double bytes() const override { return static_cast<double>(ggml_nbytes(k_) + ggml_nbytes(v_)); }

  private:
    void set_threads(int n) {
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_.get()));
        const auto set =
            reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
        if (!set) throw CommandError("this llama.cpp's CPU backend does not let its threads be set; use a newer one");
        set(backend_.get(), n);
    }
    void compute(ggml_cgraph* graph) {
        if (ggml_backend_graph_compute(backend_.get(), graph) != GGML_STATUS_SUCCESS)
            throw CommandError("ggml's CPU backend failed; run with --verbose");
    }

    std::unique_ptr<ggml_backend, Free> backend_;
    std::unique_ptr<ggml_context, Free> context_;
    std::unique_ptr<ggml_backend_buffer, Free> buffer_;
    ggml_tensor *k_ = nullptr, *v_ = nullptr, *out_ = nullptr;
    ggml_cgraph *encode_ = nullptr, *attend_ = nullptr;
};

}  // namespace

std::unique_ptr<BenchCache> make_ggml_cache(const CacheSpec& spec, const BenchShape& shape, const BenchData& data) {
    return std::make_unique<GgmlCache>(spec, shape, data);
}

}  // namespace turboquant::cli
