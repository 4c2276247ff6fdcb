#include "tests/ggml/op_rig.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <tuple>

namespace turboquant::conformance {
namespace {

constexpr size_t kGraphSize = 64;

void set_n_threads(ggml_backend_t backend, int n) {
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    if (auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")))
        set(backend, n);
}

Owned<ggml_context> no_alloc_context(size_t n_tensors) {
    return Owned<ggml_context>(ggml_init({n_tensors * ggml_tensor_overhead(), nullptr, true}));
}

}  // namespace

std::vector<float> gaussian(size_t n, uint32_t seed, float sigma) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, sigma);
    std::vector<float> x(n);
    for (float& f : x) f = normal(random);
    return x;
}

std::vector<float> as_f16(std::vector<float> x) {
    for (float& f : x) f = ggml_fp16_to_fp32(ggml_fp32_to_fp16(f));
    return x;
}

/// One graph and the inputs to be set once it is allocated.
struct OpRig::Graph {
    Owned<ggml_context> ctx{
        ggml_init({kGraphSize * ggml_tensor_overhead() + ggml_graph_overhead_custom(kGraphSize, false), nullptr, true})};
    ggml_cgraph* graph = ggml_new_graph_custom(ctx.get(), kGraphSize, false);
    std::vector<std::tuple<ggml_tensor*, const void*>> inputs;
    ggml_tensor* pinned = nullptr;  ///< to the device, where in a model the operations around it would hold it

    ggml_tensor* input(ggml_type type, const void* data, int64_t n0, int64_t n1 = 1, int64_t n2 = 1, int64_t n3 = 1) {
        ggml_tensor* t = ggml_new_tensor_4d(ctx.get(), type, n0, n1, n2, n3);
        ggml_set_input(t);
        inputs.emplace_back(t, data);
        return t;
    }
};

OpRig::OpRig(const std::string& device_name, const CacheShape& shape, const std::string& tag) : shape_(shape), device_name_(device_name) {
    const ggml_backend_dev_t dev = device(device_name);
    if (dev) backends_.emplace_back(ggml_backend_dev_init(dev, nullptr));
    backends_.emplace_back(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    std::vector<ggml_backend_t> list;
    for (const auto& b : backends_) {
        if (!b) throw std::runtime_error("no backend: " + take_log());
        set_n_threads(b.get(), 2);
        list.push_back(b.get());
    }
    sched_.reset(ggml_backend_sched_new(list.data(), nullptr, static_cast<int>(list.size()), kGraphSize, false, true));

    tensors_ = no_alloc_context(2);
    views_ = no_alloc_context(64);
    k_ = ggml_new_tensor_3d(tensors_.get(), GGML_TYPE_F16, shape.n_embd_k(), shape.n_cells, shape.n_streams);
    ggml_format_name(k_, "cache_%sk_l0", tag.c_str());
    if (!shape.v_in_k) {
        v_ = ggml_new_tensor_3d(tensors_.get(), GGML_TYPE_F16, shape.n_embd_v(), shape.n_cells, shape.n_streams);
        ggml_format_name(v_, "cache_%sv_l0", tag.c_str());
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(tensors_.get(), ggml_backend_get_default_buffer_type(list.front())));
    if (!buffer_) throw std::runtime_error("no buffer: " + take_log());
    ggml_backend_buffer_clear(buffer_.get(), 0);
}

std::vector<float> OpRig::run(Graph& g, ggml_tensor* out) {
    if (out) ggml_set_output(out), ggml_build_forward_expand(g.graph, out);
    ggml_backend_sched_reset(sched_.get());
    if (g.pinned) ggml_backend_sched_set_tensor_backend(sched_.get(), g.pinned, backends_.front().get());
    if (!ggml_backend_sched_alloc_graph(sched_.get(), g.graph)) throw std::runtime_error("the graph is not allocated: " + take_log());
    for (const auto& [tensor, data] : g.inputs) ggml_backend_tensor_set(tensor, data, 0, ggml_nbytes(tensor));
    if (ggml_backend_sched_graph_compute(sched_.get(), g.graph) != GGML_STATUS_SUCCESS)
        throw std::runtime_error("the graph fails: " + take_log());
    std::vector<float> result(out ? static_cast<size_t>(ggml_nelements(out)) : 0);
    if (out) ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    return result;
}

std::vector<float> OpRig::write(std::span<const int64_t> rows, std::span<const float> k, std::span<const float> v,
                                std::optional<RopeOp> rope, std::span<const int32_t> pos) {
    Graph g;
    ggml_context* c = g.ctx.get();
    const auto n = static_cast<int64_t>(rows.size());
    const auto store = [&](ggml_tensor* cache, ggml_tensor* cur, ggml_tensor* idx) {
        cur = ggml_view_2d(c, cur, cur->ne[0] * cur->ne[1], n, cur->nb[2], 0);
        if (shape_.n_streams > 1) cache = ggml_reshape_2d(c, cache, cache->ne[0], cache->ne[1] * cache->ne[2]);
        ggml_build_forward_expand(g.graph, ggml_set_rows(c, cache, cur, idx));
    };
    ggml_tensor* idx = g.input(GGML_TYPE_I64, rows.data(), n);
    ggml_tensor* k_cur = g.input(GGML_TYPE_F32, k.data(), shape_.k_dim, shape_.n_head_kv, n);
    if (rope) {
        ggml_tensor* p = g.input(GGML_TYPE_I32, pos.data(), n);
        k_cur = ggml_rope_ext(c, k_cur, p, nullptr, rope->n_dims, rope->mode, 0, rope->base, 1, 0, 1, 32, 1);
        ggml_set_output(k_cur);
    }
    store(k_, k_cur, idx);
    if (v_) store(v_, g.input(GGML_TYPE_F32, v.data(), shape_.v_dim, shape_.n_head_kv, n), idx);
    run(g, nullptr);
    if (!rope) return {k.begin(), k.end()};
    std::vector<float> roped(k.size());
    ggml_backend_tensor_get(k_cur, roped.data(), 0, ggml_nbytes(k_cur));
    return roped;
}

std::vector<float> OpRig::attend(const AttendOp& op) {
    Graph g;
    ggml_context* c = g.ctx.get();
    const int64_t all = static_cast<int64_t>(op.n_tokens) * op.n_streams;
    ggml_tensor* q = g.input(GGML_TYPE_F32, op.q.data(), shape_.k_dim, op.n_head, all);
    q = ggml_view_4d(c, q, q->ne[0], q->ne[1], op.n_tokens, op.n_streams, q->nb[1], q->nb[2], q->nb[2] * static_cast<size_t>(op.n_tokens),
                     0);
    const auto view = [&](ggml_tensor* t, int dim) {
        const size_t head = ggml_row_size(t->type, t == k_ ? shape_.k_dim : dim);
        return ggml_view_4d(c, t, dim, shape_.n_head_kv, op.n_kv, op.n_streams, head, t->nb[1], t->nb[2],
                            t->nb[2] * static_cast<size_t>(op.first_stream));
    };
    ggml_tensor* keys = view(k_, shape_.k_dim);
    // As llama.cpp does for MLA: a view of the keys' view.
    ggml_tensor* values =
        v_ ? view(v_, shape_.v_dim)
           : ggml_view_4d(c, keys, shape_.v_dim, keys->ne[1], keys->ne[2], keys->ne[3], keys->nb[1], keys->nb[2], keys->nb[3], 0);
    std::vector<ggml_fp16_t> mask_half(op.mask.size());
    ggml_fp32_to_fp16_row(op.mask.data(), mask_half.data(), static_cast<int64_t>(op.mask.size()));
    ggml_tensor* mask = op.mask.empty() ? nullptr : g.input(GGML_TYPE_F16, mask_half.data(), op.n_kv, op.n_tokens, 1, op.n_streams);
    ggml_tensor* out = ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), ggml_permute(c, keys, 0, 2, 1, 3),
                                           ggml_permute(c, values, 0, 2, 1, 3), mask, op.scale, op.max_bias, op.softcap);
    if (!op.sinks.empty()) ggml_flash_attn_ext_add_sinks(out, g.input(GGML_TYPE_F32, op.sinks.data(), op.n_head));
    g.pinned = out;
    // llama.cpp reads the result through a view, on another backend.
    return run(g, ggml_cont(c, ggml_reshape_2d(c, out, out->ne[0] * out->ne[1], out->ne[2] * out->ne[3])));
}

std::vector<float> OpRig::compute(const std::function<ggml_tensor*(ggml_context*, const Input&)>& build) {
    Graph g;
    const Input input = [&](ggml_type type, const void* data, int64_t n0, int64_t n1, int64_t n2) {
        return g.input(type, data, n0, n1, n2);
    };
    return run(g, build(g.ctx.get(), input));
}

std::vector<float> reference_attention(const CacheShape& shape, const AttendOp& op, std::span<const float> k, std::span<const float> v) {
    std::vector<float> out;
    const int group = op.n_head / shape.n_head_kv;
    const double n_pow2 = std::exp2(std::floor(std::log2(op.n_head)));
    for (int s = 0; s < op.n_streams; s++)
        for (int t = 0; t < op.n_tokens; t++)
            for (int h = 0; h < op.n_head; h++) {
                const size_t token = static_cast<size_t>(s) * op.n_tokens + t;
                const float* q = op.q.data() + (token * op.n_head + h) * shape.k_dim;
                const float* mask = op.mask.empty() ? nullptr : op.mask.data() + token * op.n_kv;
                const double slope = op.max_bias == 0 ? 1
                                     : h < n_pow2     ? std::exp2(-op.max_bias / n_pow2 * (h + 1))
                                                      : std::exp2(-op.max_bias / 2 / n_pow2 * (2 * (h - n_pow2) + 1));
                std::vector<double> score(op.n_kv);
                double top = op.sinks.empty() ? -INFINITY : op.sinks[h];
                const auto cell = [&](int i) { return static_cast<size_t>(op.first_stream + s) * shape.n_cells + i; };
                for (int i = 0; i < op.n_kv; i++) {
                    const float* key = k.data() + cell(i) * shape.n_embd_k() + static_cast<size_t>(h / group) * shape.k_dim;
                    double dot = 0;
                    for (int d = 0; d < shape.k_dim; d++) dot += static_cast<double>(q[d]) * key[d];
                    dot *= op.scale;
                    if (op.softcap != 0) dot = op.softcap * std::tanh(dot / op.softcap);
                    score[i] = dot + (mask ? slope * mask[i] : 0);
                    top = std::max(top, score[i]);
                }
                double sum = op.sinks.empty() ? 0 : std::exp(op.sinks[h] - top);
                std::vector<double> y(shape.v_dim);
                for (int i = 0; i < op.n_kv; i++) {
                    const double p = std::exp(score[i] - top);
                    sum += p;
                    const size_t head = static_cast<size_t>(h / group) * (shape.v_in_k ? shape.k_dim : shape.v_dim);
                    const float* value = (shape.v_in_k ? k : v).data() + cell(i) * shape.n_embd_v() + head;
                    for (int d = 0; p != 0 && d < shape.v_dim; d++) y[d] += p * value[d];
                }
                for (const double d : y) out.push_back(static_cast<float>(d / sum));
            }
    return out;
}

double relative_error(std::span<const float> a, std::span<const float> b) {
    if (a.size() != b.size()) throw std::runtime_error("results of different sizes");
    double error = 0, norm = 0;
    for (size_t i = 0; i < a.size(); i++) error += std::pow(static_cast<double>(a[i]) - b[i], 2), norm += static_cast<double>(b[i]) * b[i];
    return std::sqrt(error / norm);
}

}  // namespace turboquant::conformance
