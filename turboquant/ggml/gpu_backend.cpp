#include "turboquant/ggml/gpu_backend.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace turboquant::ggml {
namespace {

/// Of our nodes, three to a layer. The first piece is short, so that the GPU begins soon and the host decides the rest meanwhile. There are
/// few, since a piece ends when all that was begun in it has; but giving a long one takes the host some 0.1 ms, which the one before hides.
constexpr std::size_t kFirstPiece = 6, kGrowth = 4;
constexpr std::size_t kMostKnown = 256;
/// Two for each of the four copies of a graph's inputs that llama.cpp takes in turn where batches are under way on several GPUs.
constexpr std::size_t kKnownEach = 8;

/// Whether the wrapped backend launches nodes one by one when it sees them changed since the time before, changed in ggml_tensor::padding.
/// Else it might begin a capture of its own within ours, which ends the process.
bool inner_can_be_captured() { return is_ggml_0_25(); }

std::string_view op_of(const ggml_tensor* node) { return ggml_op_name(node->op); }

}  // namespace

GpuBackend::GpuBackend(ggml_backend_dev_t dev, int index, const Ops& ops) : ops_(ops), backend_(ggml_backend_dev_init(dev, nullptr)) {
    if (!backend_) throw std::runtime_error("llama.cpp's GPU backend does not start");
    try {
        queue_ = std::make_shared<Queue>(index);
        must(cuda::new_stream(origin_));
        must(cuda::new_stream(rehearsing_));
        must(cuda::new_stream(early_));
        must(cuda::new_event(rehearsed_));
        must(cuda::new_event(early_done_));
    } catch (...) {
        ggml_backend_free(backend_);
        throw;
    }
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);
    if (props.caps.events) inner_event_ = ggml_backend_event_new(dev), own_event_ = ggml_backend_event_new(dev);
    can_capture_ = inner_event_ && own_event_ && inner_can_be_captured();
}

GpuBackend::~GpuBackend() {
    if (!cuda::driver_alive()) return;  // llama.cpp's backend would end the process
    known_.clear();
    cuda::drop_stream(origin_);
    cuda::drop_stream(rehearsing_);
    cuda::drop_stream(early_);
    cuda::drop_event(rehearsed_);
    cuda::drop_event(early_done_);
    if (inner_event_) ggml_backend_event_free(inner_event_);
    if (own_event_) ggml_backend_event_free(own_event_);
    ggml_backend_free(backend_);
}

std::string GpuBackend::late_error() {
    if (!wrote_ || !queue_->take_not_finite()) return {};
    return "keys or values of a batch before are not finite (NaN or infinity in the model's activations)";
}

ggml_status GpuBackend::compute(ggml_cgraph* graph, int first, int end, std::span<const int> own, const OwnNode& run) {
    graph_ = graph, nodes_ = ggml_graph_nodes(graph);
    inner_ahead_ = true;  // whatever was done to its tensors before
    queue_->begin_graph();
    ggml_status status = GGML_STATUS_SUCCESS;
    std::size_t size = kFirstPiece;
    for (int from = first; from < end && status == GGML_STATUS_SUCCESS; size *= kGrowth) {
        const bool last = own.size() <= size;
        const Piece piece{from, last ? end : own[size - 1] + 1, last, last ? own : own.first(size)};
        status = run_piece(piece, run);
        from = piece.end, own = own.subspan(piece.own.size());
    }
    own_ahead_ = true;
    follow_own(queue_->stream());
    queue_->end_graph(status == GGML_STATUS_SUCCESS);  // nothing of this is the other stream's
    return status;
}

ggml_status GpuBackend::run_piece(const Piece& piece, const OwnNode& run) {
    from_ = piece.from;
    one_by_one_ = false;
    marks_.clear();
    if (piece.own.empty()) return forward(from_, piece.end, queue_->stream()), GGML_STATUS_SUCCESS;
    queue_->defer([this] { catch_up(); });
    int next = piece.from;
    for (std::size_t k = 0; k < piece.own.size(); k++) {
        const int i = piece.own[k];
        at_ = i;
        if (inner_between(next, i)) queue_->other_work();
        next = i + 1;
        if (!queue_->deferring()) begin_inner(i, queue_->lanes());
        wrote_ = true;
        if ((abort_ && abort_(abort_data_)) || !run(nodes_[i], executor_)) {
            queue_->catch_up();
            queue_->settle();
            return GGML_STATUS_ABORTED;
        }
        if (inner_between(next, k + 1 < piece.own.size() ? piece.own[k + 1] : piece.end)) queue_->settle_batch();
        if (queue_->deferring())
            mark(i);
        else
            from_ = i + 1, own_ahead_ = true;
    }
    piece.last ? queue_->settle() : queue_->join();
    if (queue_->deferring()) return finish(piece, queue_->take());
    forward(from_, piece.end, queue_->stream());
    return GGML_STATUS_SUCCESS;
}

/// Gives all up to the node at hand to the streams, and what its launches are so far.
void GpuBackend::catch_up() {
    const Launches& launches = queue_->take();
    const Lanes lanes = queue_->lanes();
    // With a mark of the node at hand: it may have taken launches of nodes before into its own (Queue::drop_keeping), behind its early ones.
    mark(at_);
    give_marked(launches, lanes);
    marks_.clear();
}

void GpuBackend::mark(int node) {
    marks_.push_back({node, queue_->waiting().size(), queue_->rehearsals().size(), queue_->earlies().size()});
}

void GpuBackend::begin_inner(int until, const Lanes& lanes) {
    forward(from_, until, lanes.main);
    from_ = until;
    follow_inner(lanes.main);
}

void GpuBackend::walk(const Piece& piece, const Launches& launches, const Lanes& lanes) {
    from_ = piece.from;
    const std::size_t done = give_marked(launches, lanes);
    forward(from_, piece.end, lanes.main);
    must(launches.run(done, launches.size(), lanes));  // the second stream's end
    if (capturing_ && !marks_.empty() && marks_.back().rehearsals) {
        must(cuda::record(rehearsed_, rehearsing_));
        must(cuda::wait_for(lanes.main, rehearsed_));
    }
}

/// Gives the marked nodes with their launches, and all nodes between, to the streams. How many launches that were.
std::size_t GpuBackend::give_marked(const Launches& launches, const Lanes& lanes) {
    std::size_t done = 0, rehearsed = 0, early = 0;
    for (std::size_t i = 0; i < marks_.size(); i++) {
        const Mark &m = marks_[i], &last = marks_[last_of_run(i)];
        const bool begins_early = last.early > early;
        bool beside = false;
        if (capturing_ && inner_between(from_, m.node)) {
            const int queries = begins_early ? queries_end(i, last_of_run(i)) : m.node;
            if (last.rehearsals > rehearsed)
                rehearse(queries, begins_early ? 1 : 2, std::exchange(rehearsed, last.rehearsals), last.rehearsals);
            if ((beside = begins_early)) begin_early(queries, std::exchange(early, last.early), last.early);
        }
        begin_inner(m.node, lanes);
        if (beside) must(cuda::wait_for(lanes.main, early_done_));
        must(queue_->earlies().run(early, last.early, lanes));
        early = last.early;
        must(launches.run(done, m.launches, lanes));
        own_ahead_ = true, done = m.launches, from_ = m.node + 1;
    }
    return done;
}

bool GpuBackend::inner_between(int from, int end) const {
    return std::any_of(nodes_ + from, nodes_ + end, [this](const ggml_tensor* node) { return !is_view_op(ops_, node); });
}

/// The last mark that follows one without another's work between.
std::size_t GpuBackend::last_of_run(std::size_t mark) const {
    while (mark + 1 < marks_.size() && !inner_between(marks_[mark].node + 1, marks_[mark + 1].node)) mark++;
    return mark;
}

/// The node after the last one that queries of these marks' attention are made of, from from_ on.
int GpuBackend::queries_end(std::size_t first_mark, std::size_t last_mark) const {
    int end = from_;
    for (std::size_t i = first_mark; i <= last_mark; i++) {
        const ggml_tensor* t = nodes_[marks_[i].node]->src[0];
        if (op_of(nodes_[marks_[i].node]) != "FLASH_ATTN_EXT") continue;
        while (t->src[0] && is_view_op(ops_, t)) t = t->src[0];
        for (int at = marks_[first_mark].node; at > end; at--)
            if (nodes_[at - 1] == t) end = at;
    }
    return end;
}

/// Work that wants what was made up to `from`, first .. end-1, on a stream of its own.
void GpuBackend::begin_early(int from, std::size_t first, std::size_t end) {
    forward(from_, from, origin_);
    from_ = from;
    follow_own(origin_);
    ggml_backend_event_record(inner_event_, backend_);
    must(cuda::wait_for(early_, inner_event_->context));
    must(queue_->earlies().run(first, end, {early_, early_}));
    must(cuda::record(early_done_, early_));
}

/// Rehearsals first .. end-1 beside the wrapped backend's last products before `until`, so that little passes through the caches in between.
void GpuBackend::rehearse(int until, int n_products, std::size_t first, std::size_t end) {
    constexpr int kFewColumns = 8;
    const auto is_product = [this](int i) { return op_of(nodes_[i]) == "MUL_MAT"; };
    int at = until;
    for (int products = 0; at > from_ && products < n_products;) products += is_product(--at);
    // The blocks of a product of few columns lie on all multiprocessors before what it waits for is done, and leave no room: before the norm
    // in front of it, which is no part of what the wrapped backend does in one launch (a sum after a product is).
    if (nodes_[at]->ne[1] <= kFewColumns)
        for (int norm = at; norm-- > from_ && !is_product(norm);)
            if (op_of(nodes_[norm]).ends_with("NORM")) {
                at = norm;
                break;
            }
    forward(from_, at, origin_);
    from_ = at;
    follow_own(origin_);
    ggml_backend_event_record(inner_event_, backend_);
    must(cuda::wait_for(rehearsing_, inner_event_->context));
    must(queue_->rehearsals().run(first, end, {rehearsing_, rehearsing_}));
}

/// The one that does the same as the piece at hand, put in front; or null.
GpuBackend::Known* GpuBackend::find_known(std::list<Known>& all, const Launches& launches) {
    const auto found = std::ranges::find_if(all, [&](const Known& k) {
        return k.marks == marks_ && k.launches == launches && k.rehearsals == queue_->rehearsals() && k.early == queue_->earlies() &&
               k.nodes.equals(inner_);
    });
    if (found == all.end()) return nullptr;
    all.splice(all.begin(), all, found);
    return &all.front();
}

ggml_status GpuBackend::finish(const Piece& piece, const Launches& launches) {
    if (known_.size() == kMostKnown && !known_.contains(nodes_[piece.from])) known_.clear();
    std::list<Known>& all = known_[nodes_[piece.from]];
    find_inner(piece);
    Known* known = find_known(all, launches);
    if (!known) {
        if (all.size() == kKnownEach) all.pop_back();
        known = &all.emplace_front();
        known->launches = launches, known->rehearsals = queue_->rehearsals(), known->early = queue_->earlies(), known->marks = marks_;
        known->nodes.assign(inner_);
    } else if (!known->graph && may_capture()) {
        capture(piece, *known);
    }
    one_by_one_ = Launches::kComparable && !known->graph && may_capture() && is_step();
    if (!known->graph) return walk(piece, launches, queue_->lanes()), GGML_STATUS_SUCCESS;
    follow_inner(queue_->stream());
    must(cuda::launch_graph(known->graph, queue_->stream()));
    own_ahead_ = true;
    return GGML_STATUS_SUCCESS;
}

/// The wrapped backend's nodes of a piece.
void GpuBackend::find_inner(const Piece& piece) {
    inner_.clear();
    auto own = piece.own.begin();
    for (int i = piece.from; i < piece.end; i++)
        if (own != piece.own.end() && *own == i)
            own++;
        else if (!is_view_op(ops_, nodes_[i]))
            inner_.push_back(nodes_[i]);
}

/// Products of experts with more tokens than one may wait for the device within the operation, which no capture survives.
bool GpuBackend::may_capture() const {
    return can_capture_ && std::ranges::none_of(inner_, [](const ggml_tensor* node) {
               return op_of(node) == "MUL_MAT_ID" && (node->ne[2] > 1 || !ggml_is_quantized(node->src[0]->type));
           });
}

/// Few columns: it comes again with the next tokens. A prompt's batches do not, as they see more cells each; a short last one counts, too.
bool GpuBackend::is_step() const {
    return std::ranges::all_of(inner_, [](const ggml_tensor* node) { return op_of(node) != "MUL_MAT" || node->ne[1] <= kDraftTokens; });
}

void GpuBackend::capture(const Piece& piece, Known& known) {
    follow_inner(queue_->stream());
    const std::unique_lock alone = Queue::capturing();
    if (!cuda::begin_capture(origin_).ok()) {
        can_capture_ = false;
        return;
    }
    // The wrapped backend's stream becomes a part of it by waiting for ours, and is followed at the end.
    own_ahead_ = true;
    capturing_ = true;
    bool good = true;
    try {
        walk(piece, known.launches, {origin_, queue_->lanes().side});
        follow_inner(origin_);
    } catch (const std::exception&) {
        good = false;
    }
    capturing_ = false;
    const cuda::Status status = cuda::end_capture(origin_, known.graph);
    inner_ahead_ = false, own_ahead_ = true;  // nothing was done yet
    if (good && status.ok()) return;
    cuda::drop_graph(std::exchange(known.graph, nullptr));
    can_capture_ = false;
    log_info("GPU: no CUDA graph of a step (" + (status.ok() ? std::string("a launch failed") : status.message()) +
             "): operations are launched one by one, which is slower");
}

void GpuBackend::forward(int from, int end, cuda::Stream own) {
    while (from < end && is_view_op(ops_, nodes_[from])) from++;
    if (from >= end) return;
    follow_own(own);
    tq_graph_view view = ggml_graph_view(graph_, from, end);
    inner_ahead_ = true;
    char* const mark = nodes_[from]->padding + sizeof nodes_[from]->padding - sizeof fresh_;
    std::uint32_t before;
    std::memcpy(&before, mark, sizeof before);
    if (capturing_ || one_by_one_) fresh_++, std::memcpy(mark, &fresh_, sizeof fresh_);
    const ggml_status status = ggml_backend_graph_compute_async(backend_, reinterpret_cast<ggml_cgraph*>(&view));
    std::memcpy(mark, &before, sizeof before);
    if (status != GGML_STATUS_SUCCESS) throw std::runtime_error("llama.cpp's GPU backend failed");
}

void GpuBackend::follow_inner(cuda::Stream own) {
    if (!std::exchange(inner_ahead_, false)) return;
    if (!inner_event_) return ggml_backend_synchronize(backend_);
    ggml_backend_event_record(inner_event_, backend_);
    must(cuda::wait_for(own, inner_event_->context));
}

void GpuBackend::follow_own(cuda::Stream own) {
    if (!std::exchange(own_ahead_, false)) return;
    if (!own_event_) return must(cuda::synchronize(own));
    must(cuda::record(own_event_->context, own));
    ggml_backend_event_wait(backend_, own_event_);
}

}  // namespace turboquant::ggml
