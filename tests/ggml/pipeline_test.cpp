// A model over two GPUs, which llama.cpp keeps busy with several batches of a prompt at once where both have events and copies that nobody
// waits for. On a machine with two GPUs; and over two of the host (host_gpus.cpp), where a stream that goes on too early is an error.
#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "ggml-cpp.h"
#include "tests/ggml/op_rig.h"

namespace turboquant::conformance {
namespace {

/// turbo4 on the GPU of this number, or null.
ggml_backend_dev_t on_gpu_number(int i) {
    plugin();
    for (const std::string place : {"cuda", "cpu"})
        if (const ggml_backend_dev_t dev = ggml_backend_dev_by_name(("turbo4-" + place + std::to_string(i)).c_str())) return dev;
    return nullptr;
}

ggml_backend_dev_caps caps_of(ggml_backend_dev_t dev) {
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);
    return props.caps;
}

/// On the host's, which say what they do; of CUDA it cannot be seen.
bool on_host() { return ggml_backend_dev_by_name("turbo4-cpu1"); }

/// How many tensors a stream copied.
int copies(const std::string& log) {
    int n = 0;
    const std::string what = "host GPU: copied";
    for (std::size_t at = log.find(what); at != log.npos; at = log.find(what, at + 1)) n++;
    return n;
}

/// Whether no stream of the host's, nor the host, found that it went on too early.
bool all_in_order(const std::string& log) {
    const std::vector<std::string> wrong = {"is there", "not waited for", "is read", "another device"};
    return std::ranges::none_of(wrong, [&](const std::string& w) { return log.find(w) != log.npos; });
}

class Pipeline : public testing::Test {
  protected:
    void SetUp() override {
        if (!on_gpu_number(1)) GTEST_SKIP() << "there are no two GPUs, nor what stands in for them (--plugin)";
    }
};

TEST_F(Pipeline, DevicesHaveEventsWhereTheirGpuHas) {
    for (const int i : {0, 1}) {
        const ggml_backend_dev_t dev = on_gpu_number(i);
        ASSERT_TRUE(caps_of(dev).async && caps_of(dev).events);
        const Owned<ggml_backend> backend(ggml_backend_dev_init(dev, nullptr));
        const ggml_backend_event_ptr event(ggml_backend_event_new(dev));
        ASSERT_TRUE(backend && event);
        ggml_backend_event_record(event.get(), backend.get());
        ggml_backend_event_wait(backend.get(), event.get());
        ggml_backend_event_synchronize(event.get());
    }
    const ggml_backend_dev_t host = ggml_backend_dev_by_name("turbo4-cpu");
    EXPECT_FALSE(caps_of(host).async || caps_of(host).events);
    EXPECT_EQ(ggml_backend_event_new(host), nullptr);
}

/// Tensors of eight floats, each in a buffer of its own.
class Floats {
  public:
    Floats() : context_(ggml_init({16 * ggml_tensor_overhead(), nullptr, true})) {}
    ggml_tensor* in(ggml_backend_dev_t dev) {
        ggml_tensor* t = ggml_new_tensor_1d(context_.get(), GGML_TYPE_F32, 8);
        buffers_.emplace_back(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(dev), 4096));
        ggml_backend_tensor_alloc(buffers_.back().get(), t, ggml_backend_buffer_get_base(buffers_.back().get()));
        return t;
    }
    /// The last n of t's values.
    ggml_tensor* end_of(ggml_tensor* t, int n) {
        ggml_tensor* view = ggml_view_1d(context_.get(), t, n, (8 - n) * sizeof(float));
        ggml_backend_view_init(view);
        return view;
    }

  private:
    std::vector<Owned<ggml_backend_buffer>> buffers_;
    Owned<ggml_context> context_;
};

TEST_F(Pipeline, TensorsPassBetweenDevicesAsTheyAre) {
    const ggml_backend_dev_t first = on_gpu_number(0), second = on_gpu_number(1),
                             host = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const Owned<ggml_backend> a(ggml_backend_dev_init(first, nullptr)), b(ggml_backend_dev_init(second, nullptr)),
        c(ggml_backend_dev_init(host, nullptr));
    Floats floats;
    take_log();
    struct Way {
        ggml_backend_t from, to;
        ggml_tensor *src, *dst;
    };
    ggml_tensor* whole = floats.in(second);
    for (const Way& w :
         {Way{a.get(), b.get(), floats.in(first), floats.in(second)}, Way{a.get(), a.get(), floats.in(first), floats.in(first)},
          Way{c.get(), b.get(), floats.in(host), floats.in(second)}, Way{b.get(), c.get(), floats.in(second), floats.in(host)},
          Way{a.get(), b.get(), floats.end_of(floats.in(first), 3), floats.end_of(whole, 3)}}) {
        const std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8}, none(8);
        const std::size_t bytes = ggml_nbytes(w.src);
        ggml_backend_tensor_set(w.dst, none.data(), 0, bytes);
        ggml_backend_tensor_set_async(w.from, w.src, x.data(), 0, bytes);
        ggml_backend_tensor_copy_async(w.from, w.to, w.src, w.dst);
        std::vector<float> y(bytes / sizeof(float)), of_backend(y);
        ggml_backend_tensor_get_async(w.to, w.dst, of_backend.data(), 0, bytes);
        ggml_backend_synchronize(w.to);
        ggml_backend_tensor_get(w.dst, y.data(), 0, bytes);
        EXPECT_EQ(y, std::vector<float>(x.begin(), x.begin() + static_cast<long>(y.size())));
        EXPECT_EQ(of_backend, y);
    }
    EXPECT_EQ(copies(take_log()), on_host() ? 3 : 0);
}

/// Attention alone, so that first and last of the graph are another stream's than the one that copies and is waited for.
TEST_F(Pipeline, AGraphIsBehindWhatCameBeforeAndWhoWaitsWaitsForAllOfIt) {
    const CacheShape shape;
    OpRig rig("turbo4", shape);
    std::vector<int64_t> rows(100);
    std::iota(rows.begin(), rows.end(), 0);
    const std::size_t n = rows.size() * static_cast<std::size_t>(shape.n_embd_k());
    rig.write(rows, gaussian(n, 1), gaussian(n, 2));

    const auto make = [] { return Owned<ggml_context>(ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true})); };
    const Owned<ggml_context> here = make(), there = make();
    ggml_context* c = here.get();
    ggml_tensor *q = ggml_new_tensor_3d(c, GGML_TYPE_F32, shape.k_dim, 1, 4), *sent = ggml_dup_tensor(there.get(), q);
    const auto view = [&](ggml_tensor* t) {
        const std::size_t head = ggml_row_size(t->type, shape.k_dim);
        return ggml_view_3d(c, t, shape.k_dim, shape.n_cells, shape.n_head_kv, t->nb[1], head, 0);
    };
    ggml_tensor* out = ggml_flash_attn_ext(c, q, view(rig.k()), view(rig.v()), nullptr, 1, 0, 0);
    ggml_cgraph* graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, out);
    const Owned<ggml_backend> other(ggml_backend_dev_init(on_gpu_number(1), nullptr));
    const Owned<ggml_backend_buffer> ours(ggml_backend_alloc_ctx_tensors(c, rig.device_backend())),
        theirs(ggml_backend_alloc_ctx_tensors(there.get(), other.get()));
    ASSERT_TRUE(ours && theirs);

    take_log();
    const std::vector<float> queries = gaussian(static_cast<std::size_t>(ggml_nelements(q)), 3);
    std::vector<float> results[2];
    for (std::vector<float>& result : results) {
        ggml_backend_tensor_set_async(other.get(), sent, queries.data(), 0, ggml_nbytes(sent));
        ggml_backend_tensor_copy_async(other.get(), rig.device_backend(), sent, q);
        if (&result == &results[1]) ggml_backend_synchronize(rig.device_backend());
        ASSERT_EQ(ggml_backend_graph_compute_async(rig.device_backend(), graph), GGML_STATUS_SUCCESS);
        result.resize(static_cast<std::size_t>(ggml_nelements(out)));
        ggml_backend_synchronize(rig.device_backend());
        ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_TRUE(all_in_order(take_log()));
}

TEST_F(Pipeline, BatchesOverTwoDevicesAreAsOnOne) {
    // Batches of more than 64 tokens, whose masks stay on the device, and more of them than llama.cpp has copies of inputs.
    constexpr int kPrompt = 600, kBatch = 65, kSteps = 12;
    // A graph that is used again waits for all batches before.
    setenv("LLAMA_GRAPH_REUSE_DISABLE", "1", true);
    const auto run = [&](std::vector<ggml_backend_dev_t> devices) {
        devices.push_back(nullptr);
        llama_model_params params = llama_model_default_params();
        params.devices = devices.data(), params.n_gpu_layers = -1;
        if (devices.size() > 2) params.load_mode = LLAMA_LOAD_MODE_NONE;  // weights are uploaded while the next ones are read
        const ModelPtr model(llama_model_load_from_file(TQ_DEMO_MODEL, params));
        const ContextPtr ctx = make_context(model.get(), {.n_ubatch = kBatch});
        const std::vector<llama_token> tokens = text_tokens(model.get(), kPrompt + kSteps);
        Logits logits = decode(ctx.get(), std::span(tokens).first(kPrompt));
        logits.append(decode(ctx.get(), std::span(tokens).subspan(kPrompt), kPrompt, 0, 1));
        return logits;
    };
    const Logits one = run({on_gpu_number(0)});
    take_log();
    const Logits two = run({on_gpu_number(0), on_gpu_number(1)});
    const std::string log = take_log();
    unsetenv("LLAMA_GRAPH_REUSE_DISABLE");
    EXPECT_NE(log.find("pipeline parallelism enabled"), log.npos);
    EXPECT_NE(log.find("using async uploads"), log.npos);
    ASSERT_EQ(one.rows(), kPrompt + kSteps);
    EXPECT_LT(mean_kld(one, two), 1e-5);
    if (!on_host()) return;
    EXPECT_EQ(max_difference(one, two), 0);
    EXPECT_GE(copies(log), (kPrompt + kBatch - 1) / kBatch + kSteps);
    EXPECT_TRUE(all_in_order(log));
}

}  // namespace
}  // namespace turboquant::conformance
