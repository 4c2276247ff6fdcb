// A stream of llama.cpp's CUDA device with the operations on compressed rows among its nodes.
//
// Two streams, the wrapped backend's and ours, each waiting for the other's last work where nodes change hands. Nodes are taken in a
// few pieces, the first one short. For a piece, all that the host has to decide is decided first, and leaves a list of launches
// (cache/cuda/launches.h). If the list and the other nodes are what they were the time before, both streams are captured as one CUDA graph,
// and from then on the piece is one launch, as long as they stay the same: what differs between steps (positions, cells, masks) lies in
// memory.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "turboquant/cache/cuda/queue.h"
#include "turboquant/ggml/host.h"
#include "turboquant/ggml/inner_device.h"
#include "turboquant/ggml/node_record.h"

namespace turboquant::ggml {

class GpuBackend final : public InnerBackend {
  public:
    /// Throws std::runtime_error.
    GpuBackend(ggml_backend_dev_t dev, int index, const Ops& ops);
    ~GpuBackend() override;

    void set_n_threads(int) override {}
    void set_abort_callback(ggml_abort_callback callback, void* data) override { abort_ = callback, abort_data_ = data; }
    Executor& executor() override { return executor_; }
    std::shared_ptr<void> store_device() override { return queue_; }
    void synchronize() override { ggml_backend_synchronize(backend_); }
    ggml_backend_t stream() override { return backend_; }
    std::string late_error() override;
    ggml_status compute(ggml_cgraph* graph, int first, int end, std::span<const int> own, const OwnNode& run) override;

  private:
    /// Nodes from .. end-1, and those of them that are ours.
    struct Piece {
        int from, end;
        bool last;
        std::span<const int> own;
    };
    /// One of our nodes, and how many launches of its piece there are when it is done, how many rehearsals and early ones.
    struct Mark {
        int node;
        std::size_t launches, rehearsals, early;
        friend bool operator==(const Mark&, const Mark&) = default;
    };
    /// A piece as it was some time before.
    struct Known {
        NodeRecord nodes;
        Launches launches, rehearsals, early;
        std::vector<Mark> marks;
        void* graph = nullptr;

        Known() = default;
        Known(const Known&) = delete;
        ~Known() { cuda::drop_graph(graph); }
    };

    ggml_status run_piece(const Piece& piece, const OwnNode& run);
    ggml_status finish(const Piece& piece, const Launches& launches);
    bool inner_between(int from, int end) const;
    std::size_t last_of_run(std::size_t mark) const;
    int queries_end(std::size_t first_mark, std::size_t last_mark) const;
    void rehearse(int until, int n_products, std::size_t first, std::size_t end);
    void begin_early(int from, std::size_t first, std::size_t end);
    void catch_up();
    void mark(int node);
    void begin_inner(int until, const Lanes& lanes);
    void walk(const Piece& piece, const Launches& launches, const Lanes& lanes);
    std::size_t give_marked(const Launches& launches, const Lanes& lanes);
    void find_inner(const Piece& piece);
    bool may_capture() const;
    bool is_step() const;
    void capture(const Piece& piece, Known& known);
    Known* find_known(std::list<Known>& all, const Launches& launches);
    void forward(int from, int end, cuda::Stream own);
    void follow_inner(cuda::Stream own);
    void follow_own(cuda::Stream own);

    Ops ops_;
    ggml_backend_t backend_;
    std::shared_ptr<Queue> queue_;
    cuda::Stream origin_ = nullptr, rehearsing_ = nullptr, early_ = nullptr;  ///< of captures
    void *rehearsed_ = nullptr, *early_done_ = nullptr;
    ggml_backend_event_t inner_event_ = nullptr, own_event_ = nullptr;
    bool inner_ahead_ = false, own_ahead_ = false, wrote_ = false;
    bool can_capture_ = false, capturing_ = false;
    /// The wrapped backend makes no graphs of what it is given: ours will hold that. Its own take longer to make than all launches.
    bool one_by_one_ = false;
    /// By the first node, those used last in front: what a batch does besides (a mean is taken) comes and goes.
    std::map<const ggml_tensor*, std::list<Known>> known_;
    std::uint32_t fresh_ = 0;
    SerialExecutor executor_;
    ggml_abort_callback abort_ = nullptr;
    void* abort_data_ = nullptr;

    // The piece at hand.
    ggml_cgraph* graph_ = nullptr;
    ggml_tensor** nodes_ = nullptr;
    std::vector<Mark> marks_;
    std::vector<const ggml_tensor*> inner_;
    int from_ = 0, at_ = 0;  ///< the first node that was not given to its stream; our node at hand
};

}  // namespace turboquant::ggml
