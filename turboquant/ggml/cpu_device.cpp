#include "turboquant/ggml/cpu_device.h"

#include <cstring>
#include <deque>
#include <stdexcept>
#include <vector>

#include "turboquant/cache/cpu/cpu_store.h"
#include "turboquant/ggml/host_buffer.h"
#include "turboquant/ggml/node_team.h"
#include "turboquant/ggml/team.h"

namespace turboquant::ggml {
namespace {

/// What ggml keeps in op_params of a custom operation; the same in all supported versions.
struct CustomParams {
    ggml_custom_op_t function;
    int n_tasks;
    void* userdata;
};
static_assert(sizeof(CustomParams) <= GGML_MAX_OP_PARAMS);

template <class F>
F procedure(ggml_backend_dev_t dev, const char* name) {
    return reinterpret_cast<F>(ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), name));
}

/// The nodes of a graph, as they were when it goes out of scope.
class NodePatch {
  public:
    NodePatch(ggml_cgraph* graph, int n) : nodes_(ggml_graph_nodes(graph)), saved_(nodes_, nodes_ + n) {}
    ~NodePatch() { std::memcpy(nodes_, saved_.data(), saved_.size() * sizeof *nodes_); }
    NodePatch(const NodePatch&) = delete;
    void set(int i, ggml_tensor* t) { nodes_[i] = t; }
    const ggml_tensor* original(int i) const { return saved_[i]; }

  private:
    ggml_tensor** nodes_;
    std::vector<ggml_tensor*> saved_;
};

class CpuBackend final : public InnerBackend {
  public:
    CpuBackend(ggml_backend_dev_t dev, const Ops& ops) : ops_(ops), backend_(ggml_backend_dev_init(dev, nullptr)) {
        if (!backend_) throw std::runtime_error("ggml's CPU backend does not start");
        set_n_threads_ = procedure<ggml_backend_set_n_threads_t>(dev, "ggml_backend_set_n_threads");
        const auto set_abort = procedure<ggml_backend_set_abort_callback_t>(dev, "ggml_backend_set_abort_callback");
        if (!set_abort) {
            ggml_backend_free(backend_);
            throw std::runtime_error("ggml's CPU backend has no abort callback");
        }
        set_abort(
            backend_, [](void* data) { return static_cast<CpuBackend*>(data)->stopped(); }, this);
    }
    ~CpuBackend() override { ggml_backend_free(backend_); }

    void set_n_threads(int n) override {
        team_.set_n_threads(n);
        if (set_n_threads_) set_n_threads_(backend_, team_.n_threads());
    }
    void set_abort_callback(ggml_abort_callback callback, void* data) override { abort_ = callback, abort_data_ = data; }
    Executor& executor() override { return team_; }

    ggml_status compute(ggml_cgraph* graph, int first, int end, std::span<const int> own, const OwnNode& run) override {
        const int n = ggml_graph_n_nodes(graph);
        NodePatch patch(graph, n);
        for (int i = 0; i < n; i++)
            if (i < first || i >= end) patch.set(i, &nothing_);
        custom_.clear();
        for (const int i : own) patch.set(i, &custom_.emplace_back(*this, patch.original(i), run).node);
        failed_ = false;
        const ggml_status status = ggml_backend_graph_compute(backend_, graph);
        return failed_ ? GGML_STATUS_ABORTED : status;
    }

  private:
    /// Stands in for one of our nodes. The others go on pointing to the original, whose data it writes.
    struct Custom {
        Custom(CpuBackend& b, const ggml_tensor* original, const OwnNode& r) : backend(b), op(original), run(r), node(*original) {
            node.op = b.ops_.custom;
            const CustomParams params{compute, GGML_N_TASKS_MAX, this};
            std::memcpy(node.op_params, &params, sizeof params);
        }
        static void compute(ggml_tensor*, int ith, int nth, void* self) { static_cast<Custom*>(self)->compute(ith, nth); }
        void compute(int ith, int nth) {
            if (ith != 0) return team.follow();
            team.lead(nth);
            if (!run(op, team)) backend.failed_ = true;
            team.finish();
        }

        CpuBackend& backend;
        const ggml_tensor* op;
        const OwnNode& run;
        ggml_tensor node;
        NodeTeam team;
    };

    bool stopped() const { return failed_ || (abort_ && abort_(abort_data_)); }

    Ops ops_;
    ggml_backend_t backend_;
    ggml_backend_set_n_threads_t set_n_threads_ = nullptr;
    ggml_abort_callback abort_ = nullptr;
    void* abort_data_ = nullptr;
    TeamExecutor team_;
    ggml_tensor nothing_{};      ///< GGML_OP_NONE, zero elements: skipped
    std::deque<Custom> custom_;  ///< of the graph at work
    bool failed_ = false;        ///< written and read by the leading thread
};

class CpuDevice final : public InnerDevice {
  public:
    explicit CpuDevice(const Ops& ops) : ops_(ops), dev_(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
        if (!dev_) throw std::runtime_error("this process has no CPU backend of ggml; load it before a model");
    }
    bool supports_op(const ggml_tensor* op) const override { return ggml_backend_dev_supports_op(dev_, op); }
    bool supports_buft(ggml_backend_buffer_type_t buft) const override { return ggml_backend_dev_supports_buft(dev_, buft); }
    std::unique_ptr<InnerBackend> new_backend() const override { return std::make_unique<CpuBackend>(dev_, ops_); }
    std::string name() const override { return "CPU"; }
    bool on_host() const override { return true; }
    std::unique_ptr<InnerMemory> new_memory(std::size_t size) const override { return std::make_unique<HostBuffer>(size); }
    bool takes_residuals() const override { return true; }
    StoreFactory store_in(std::uint8_t* memory) const override { return cpu_store_in(memory); }

  private:
    Ops ops_;
    ggml_backend_dev_t dev_;
};

}  // namespace

const InnerDevice& cpu_device(const Ops& ops) {
    static const auto* device = new CpuDevice(ops);  // never destroyed: programs free their contexts after static destructors began
    return *device;
}

}  // namespace turboquant::ggml
