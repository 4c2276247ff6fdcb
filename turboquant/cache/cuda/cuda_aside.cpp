// Rows that a GPU's store sets aside, and the offset that it measures on them.
#include <algorithm>
#include <atomic>

#include "turboquant/cache/cuda/cuda_store.h"
#include "turboquant/cache/key_offset.h"

namespace turboquant {

void CudaStore::set_aside(StoreContext& ctx, const float* x, std::size_t stride, std::span<const std::int32_t> places) {
    while (!places.empty() && places.back() < 0) places = places.first(places.size() - 1);
    if (places.empty()) return;
    Queue& q = Queue::of(ctx, device_);
    cuda::KeepRows k;
    k.x = x, k.stride = stride, k.n = static_cast<int>(places.size()), k.n_head = layout_.n_head(), k.head_dim = layout_.head_dim();
    k.keys = layout_.side() == turboquant::Side::key;
    put_aside(q, places, k);
    q.launch([k](const Lanes& lanes) { return cuda::keep_rows(k, lanes.main); });
}

/// Lets a launch set rows aside. There is room for two sequences at first: other memory is another list of launches.
void CudaStore::put_aside(Queue& q, std::span<const std::int32_t> places, cuda::KeepRows& k) {
    const std::size_t row = layout_.n_embd() * sizeof(std::uint16_t),
                      bytes = (static_cast<std::size_t>(std::ranges::max(places) + 1)) * row;
    if (bytes > aside_.bytes()) {
        q.catch_up();
        cuda::DeviceArray more;
        must(more.reserve(std::max({2 * aside_.bytes(), bytes, 2 * KeyOffset::kMeasureRows * row}), q.stream()));
        if (aside_.bytes()) must(cuda::copy_tiles(more.as<void>(), aside_.as<void>(), aside_.bytes(), q.stream()));
        must(cuda::synchronize(q.stream()));
        aside_.swap(more);
    }
    k.aside_places = q.upload<std::int32_t>(Queue::Use::aside, places), k.aside = aside_.as<std::uint16_t>();
}

void CudaStore::fetch(std::span<const std::int32_t> places, std::uint16_t* rows) const {
    if (places.empty()) return;
    Queue::apart(device_, [&](Queue& q) {
        const std::size_t n = layout_.n_embd();
        const auto [first, last] = std::ranges::minmax(places);
        std::vector<std::uint16_t> all((last - first + 1) * n);
        must(cuda::to_host(all.data(), aside_.as<std::uint16_t>() + first * n, all.size() * sizeof all[0], q.stream()));
        for (std::size_t i = 0; i < places.size(); i++) std::copy_n(all.data() + (places[i] - first) * n, n, rows + i * n);
    });
}

std::uint16_t* CudaStore::mean(int id) const { return static_cast<std::uint16_t*>(means_.get()) + id * layout_.n_embd(); }

volatile std::uint32_t* CudaStore::mean_done(int id) const {
    return reinterpret_cast<std::uint32_t*>(mean(CellPositions::kMaxOffsets)) + id * layout_.n_head();
}

void CudaStore::measure(StoreContext& ctx, int id, std::span<const std::int32_t> places, std::span<const std::int32_t> positions,
                        const KeyTransform& keys) {
    Queue& q = Queue::of(ctx, device_);
    q.settle();  // codes of rows before it are made with the offset that is
    sync_offsets(q, keys);
    if (!means_) {
        void* memory = nullptr;
        must(cuda::allocate_shared(
            CellPositions::kMaxOffsets * (layout_.n_embd() * sizeof(std::uint16_t) + layout_.n_head() * sizeof(std::uint32_t)), memory));
        means_.reset(memory);
    }
    cuda::MeasureMean m;
    m.rows = aside_.as<std::uint16_t>(), m.places = q.upload<std::int32_t>(Queue::Use::slots, places);
    m.turns = q.turns_of_positions(keys.rope, layout_.head_dim(), positions);
    m.n = static_cast<int>(places.size()), m.n_head = layout_.n_head(), m.head_dim = layout_.head_dim();
    m.rope = rope_layout(keys.rope), m.magnitude = keys.magnitude, m.scales = keys.scales ? scales_.as<float>() : nullptr;
    m.offset = offsets_.as<float>() + id * offset_size(), m.mean = mean(id), m.done = mean_done(id), m.number = ++mean_number_[id];
    q.launch([m](const Lanes& lanes) { return cuda::measure_mean(m, lanes.main); });
}

void CudaStore::fetch_mean(int id, std::uint16_t* mu) const {
    const auto there = [&] {
        for (int h = 0; h < layout_.n_head(); h++)
            if (mean_done(id)[h] != mean_number_[id]) return false;
        return true;
    };
    if (!there()) Queue::synchronize_all(device_);
    std::atomic_thread_fence(std::memory_order_acquire);
    std::copy_n(mean(id), layout_.n_embd(), mu);
}

/// Rows that were set aside, in runs of places that succeed each other.
void CudaStore::write_aside(Queue& q, const StoreRows& rows, cuda::EncodeArgs e) {
    e.x_is_half = true, e.token_stride = layout_.n_embd(), e.head_stride = layout_.head_dim();
    const cuda::EncodeArgs all = e;
    for (std::size_t i = 0, end; i < rows.aside.size(); i = end) {
        for (end = i + 1; end < rows.aside.size() && rows.aside[end] == rows.aside[end - 1] + 1;) end++;
        e.x = aside_.as<std::uint16_t>() + rows.aside[i] * layout_.n_embd(), e.n = static_cast<int>(end - i), e.cells = all.cells + i;
        if (all.turns) e.turns = all.turns + i * 2 * layout_.head_dim(), e.offset_ids = all.offset_ids + i;
        q.launch([plan = plan_, e](const Lanes& lanes) { return cuda::encode(plan, e, lanes.main); });
    }
}

}  // namespace turboquant
