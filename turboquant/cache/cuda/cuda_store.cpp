#include "turboquant/cache/cuda/cuda_store.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "turboquant/cache/key_offset.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

constexpr std::size_t kLeastSlots = 256;  // of exact rows: the usual windows never grow
constexpr std::size_t kChunk = 4096;      // rows that go over the bus at once

/// f(at, m) for pieces of n rows, m from row `at` on.
template <class F>
void in_chunks(std::int64_t n, F&& f) {
    for (std::int64_t at = 0; at < n; at += kChunk) f(at, std::min<std::int64_t>(kChunk, n - at));
}

}  // namespace

CudaStore::CudaStore(const Layout& layout, std::uint8_t* memory, int device) : TileStore(layout), device_(device), memory_(memory) {
    std::vector<std::size_t> head_at;
    std::vector<std::uint8_t> head_format, plain;
    for (int h = 0; h < layout.n_head(); h++) {
        const CodecId codec = layout.shape(h).codec;
        if (cuda::format_index(codec) < 0)
            throw std::invalid_argument(std::string(codec_info(codec).name) +
                                        " is not kept on a GPU: take a turbo or tcq format, raw, or the CPU's device");
        if (std::ranges::find(formats_, codec) == formats_.end()) formats_.push_back(codec);
        head_at.push_back(layout.head_at(h)), head_format.push_back(static_cast<std::uint8_t>(cuda::format_index(codec)));
        plain.push_back(!codec_info(codec).rotated);
    }
    if (!cuda::attention_serves(layout.head_dim()))
        throw std::invalid_argument("heads of " + std::to_string(layout.head_dim()) +
                                    " values (MLA) are not kept on a GPU: take the CPU's device");
    must(cuda::use_device(device));
    const cuda::Device& d = DeviceTables::of(device).device();
    const TileView view{layout.shape(), memory, tile_bytes(layout.shape()), layout.tile_stride(),
                        layout.heads().empty() ? nullptr : layout.heads().data()};
    must(plan_memory_.reserve(cuda::encode_plan_bytes(view, layout.n_head()), nullptr));
    must(cuda::plan_encode(view, layout.n_head(), layout.norm_mode(), d, plan_memory_.as<void>(), nullptr, plan_));
    if (!layout.heads().empty()) put(head_at_, head_at), put(head_format_, head_format);
    if (std::ranges::find(plain, 1) != plain.end()) put(plain_heads_, plain);
}

cuda::Tiles CudaStore::tiles(std::int64_t stream) const {
    cuda::Tiles t;
    t.tiles = memory_ + stream * layout_.stream_bytes();
    t.seq_stride = layout_.stream_bytes(), t.head_stride = tile_bytes(layout_.shape()), t.tile_stride = layout_.tile_stride();
    t.codec = layout_.shape().codec;
    t.head_at = head_at_.as<std::size_t>(), t.head_format = head_format_.as<std::uint8_t>();
    return t;
}

const std::int64_t* CudaStore::places(Queue& q, std::int64_t first, std::int64_t n) const {
    std::vector<std::int64_t> places(n);
    for (std::int64_t i = 0; i < n; i++) places[i] = layout_.place(first + i);
    return q.upload<std::int64_t>(Queue::Use::places, places);
}

void CudaStore::sync_offsets(Queue& q, const KeyTransform& keys) const {
    // Only what this graph gave may still wait and read what they are.
    const std::pair<const Queue*, std::uint64_t> use{&q, q.graph()};
    const bool used = std::exchange(offsets_used_, use) == use;
    if (offsets_version_ == keys.version) return;
    if (used) q.catch_up(), q.settle();
    must(offsets_.reserve(CellPositions::kMaxOffsets * offset_size() * sizeof(float), q.stream()));
    for (std::size_t id = 0; id < keys.mu.size(); id++)
        if (keys.mu[id])
            must(cuda::to_device(offsets_.as<float>() + id * offset_size(), keys.mu[id], offset_size() * sizeof(float), q.stream()));
    if (keys.scales) put(scales_, keys.scales, layout_.n_embd(), q.stream());
    const RopeTable& rope = keys.rope;
    const int pairs = rope.n_dims / 2, d = layout_.head_dim();
    std::vector<std::uint8_t> dim_freq(d);
    for (int i = 0; i < d; i++) {
        const int at = i - rope.n_offset;
        dim_freq[i] = static_cast<std::uint8_t>(at < 0 || at >= rope.n_dims         ? pairs
                                                : rope.pairs == RopePairs::adjacent ? at / 2
                                                                                    : at % pairs);
    }
    put(dim_freq_, dim_freq.data(), dim_freq.size(), q.stream());
    offsets_version_ = keys.version;
}

void CudaStore::reserve_exact(Queue& q, std::size_t n_slots) {
    n_slots = (n_slots + kTileKeys - 1) / kTileKeys * kTileKeys;
    if (n_slots <= exact_slots_) return;
    q.catch_up();
    n_slots = std::max({n_slots, kLeastSlots, (exact_slots_ + exact_slots_ / 2) / kTileKeys * kTileKeys});
    const TileShape raw{CodecId::raw, layout_.side(), layout_.head_dim(), 0};
    const std::size_t tile = tile_bytes(raw), halves = layout_.n_embd() * sizeof(std::uint16_t),
                      tiles_of_slots = tile * layout_.n_head() / kTileKeys;
    cuda::DeviceArray new_halves, new_tiles;
    must(new_halves.reserve(n_slots * halves, q.stream()));
    must(new_tiles.reserve(n_slots * tiles_of_slots, q.stream()));
    // Slots that hold nothing must not hold numbers that are none.
    must(cuda::clear_tiles(new_tiles.as<void>(), n_slots * tiles_of_slots, q.stream()));
    if (exact_slots_) {
        must(cuda::copy_tiles(new_halves.as<void>(), exact_halves_.as<void>(), exact_slots_ * halves, q.stream()));
        must(cuda::copy_tiles(new_tiles.as<void>(), exact_memory_.as<void>(), exact_slots_ * tiles_of_slots, q.stream()));
    }
    must(cuda::synchronize(q.stream()));
    exact_halves_.swap(new_halves), exact_memory_.swap(new_tiles);
    exact_slots_ = n_slots;
    const TileView view{raw, exact_memory_.as<std::uint8_t>(), tile, tile * layout_.n_head(), nullptr};
    must(exact_plan_memory_.reserve(cuda::encode_plan_bytes(view, layout_.n_head()), q.stream()));
    must(cuda::plan_encode(view, layout_.n_head(), NormMode::plain, q.tables().device(), exact_plan_memory_.as<void>(), q.stream(),
                           exact_plan_));
}

cuda::Tiles CudaStore::exact_tiles() const {
    cuda::Tiles t;
    t.tiles = exact_memory_.as<std::uint8_t>();
    t.head_stride = tile_bytes({CodecId::raw, layout_.side(), layout_.head_dim(), 0}), t.tile_stride = t.head_stride * layout_.n_head();
    t.codec = CodecId::raw;
    return t;
}

/// Keeps what is to be kept of a batch; returns the batch with what is to be rounded rounded, n_embd apart, or null if nothing is.
const float* CudaStore::keep(Queue& q, const StoreRows& rows, const float* x, std::size_t stride, float* out) {
    const bool any_rounded = std::ranges::find(rows.rounded, 1) != rows.rounded.end();
    const auto last = std::ranges::max_element(rows.exact_slots);
    const bool any_kept = last != rows.exact_slots.end() && *last >= 0;
    if (!any_rounded && !any_kept) return nullptr;
    cuda::KeepRows k;
    const std::size_t n = rows.rows.size(), values = n * layout_.n_embd();
    k.x = x, k.stride = stride, k.n = static_cast<int>(n), k.n_head = layout_.n_head(), k.head_dim = layout_.head_dim();
    k.keys = layout_.side() == turboquant::Side::key;
    if (any_rounded) {
        k.rounded = q.upload<std::uint8_t>(Queue::Use::rounded, rows.rounded);
        k.out = out ? out : q.memory<float>(k.keys ? Queue::Use::form : Queue::Use::form_values, values);
    }
    if (any_kept) {
        reserve_exact(q, static_cast<std::size_t>(*last) + 1);
        k.slots = q.upload<std::int32_t>(Queue::Use::slots, rows.exact_slots);
        const DeviceTables::Rotation rotation = q.tables().rotation(layout_.head_dim());
        k.matrix = rotation.matrix, k.signs = rotation.signs, k.plain = plain_heads_.as<std::uint8_t>();
        k.halves = exact_halves_.as<std::uint16_t>(), k.tiles = exact_memory_.as<std::uint8_t>(), k.tile_stride = exact_plan_.tile_stride;
    }
    // Few rows have that part also where none is set aside, so that a sequence's launches stay the same when its offset is measured.
    if (!rows.to_aside.empty())
        put_aside(q, rows.to_aside, k);
    else if (rows.x && !rows.on_host && n <= kFewRows && aside_.bytes())
        put_aside(q, std::vector<std::int32_t>(n, -1), k);
    q.keep(k, rows.exact_slots);
    return k.out;
}

bool CudaStore::write(StoreContext& ctx, const StoreRows& rows, const KeyTransform* keys) {
    const std::size_t n = rows.rows.size();
    if (n == 0) return true;
    Queue& q = Queue::of(ctx, device_);
    const float* x = rows.x;
    std::size_t stride = rows.stride;
    if (rows.on_host) {
        q.catch_up();
        float* to = q.memory<float>(Queue::Use::rows, (n - 1) * stride + layout_.n_embd());
        must(cuda::to_device(to, x, ((n - 1) * stride + layout_.n_embd()) * sizeof(float), q.stream()));
        x = to;
    }
    // Few rows that all queries of their batch see exactly: nobody reads their codes before the next graph.
    bool later = n <= kFewRows && !rows.on_host && rows.aside.empty() && rows.seen_exactly && rows.rounded.size() == n &&
                 rows.exact_slots.size() == n && std::ranges::min(rows.exact_slots) >= 0;
    // Where keys and values lie in different slots, their row is not seen exactly.
    later = later && q.same_slots(rows.exact_slots);
    // Attention begins with exact rows while these are encoded.
    const bool batch = q.deferring() && n > kFewRows && !rows.on_host && rows.aside.empty(),
               with_other_side = batch && q.other_side_waits(layout_.side());
    if ((!later || q.rows_move()) && !with_other_side) q.settle();
    if (later) q.reserve(later_, kFewRows * layout_.n_embd() * sizeof(float));
    if (const float* rounded = keep(q, rows, x, stride, later ? later_.as<float>() : nullptr)) x = rounded, stride = layout_.n_embd();
    std::vector<std::int64_t> places(n);
    for (std::size_t i = 0; i < n; i++) places[i] = layout_.place(rows.rows[i]);
    cuda::EncodeArgs e;
    e.x = x, e.token_stride = stride, e.head_stride = layout_.head_dim(), e.n = static_cast<int>(n);
    e.cells = q.upload<std::int64_t>(Queue::Use::places, places), e.not_finite = q.not_finite();
    if (keys) {
        sync_offsets(q, *keys);
        if (keys->scales) e.scales = scales_.as<float>();
        std::vector<std::int32_t> ids(n, -1), positions(n);
        for (std::size_t i = 0; i < n; i++)
            if (const std::int32_t cell = keys->cells[rows.rows[i]]; cell >= 0)
                ids[i] = CellPositions::id_of(cell), positions[i] = CellPositions::position_of(cell);
        e.offset_ids = q.upload<std::int32_t>(Queue::Use::ids, ids);
        e.turns = q.turns_of_positions(keys->rope, layout_.head_dim(), positions);
        e.offsets = offsets_.as<float>(), e.offset_stride = offset_size();
    }
    if (!rows.aside.empty()) return write_aside(q, rows, e), true;
    if (later)
        q.encode_later(plan_, e);
    else if (batch)
        q.encode_batch(plan_, e);
    else
        q.launch([plan = plan_, e](const Lanes& lanes) { return cuda::encode(plan, e, lanes.main); });
    return true;
}

void CudaStore::read(StoreContext& ctx, std::int64_t first, std::int64_t n, float* x) const {
    Queue& q = Queue::of(ctx, device_);
    q.catch_up();
    q.settle();
    in_chunks(n, [&](std::int64_t at, std::int64_t m) {
        const std::size_t values = m * layout_.n_embd();
        cuda::DecodeArgs d;
        d.cells = places(q, first + at, m), d.n = static_cast<int>(m);
        d.out = q.memory<float>(Queue::Use::rows, values), d.out_is_half = false;
        d.token_stride = layout_.n_embd(), d.head_stride = layout_.head_dim();
        must(cuda::decode_rows(plan_, d, q.stream()));
        must(cuda::to_host(x + at * layout_.n_embd(), d.out, values * sizeof(float), q.stream()));
    });
}

void CudaStore::rows_out(StoreContext& ctx, std::int64_t first, std::int64_t n, std::uint8_t* out, std::size_t stride) const {
    Queue& q = Queue::of(ctx, device_);
    q.catch_up();
    q.settle();
    std::vector<std::uint8_t> bytes;
    in_chunks(n, [&](std::int64_t at, std::int64_t m) {
        auto* rows = q.memory<std::uint8_t>(Queue::Use::form, m * plan_.row_bytes);
        must(cuda::get_rows(plan_, places(q, first + at, m), static_cast<int>(m), rows, plan_.row_bytes, q.stream()));
        bytes.resize(m * plan_.row_bytes);
        must(cuda::to_host(bytes.data(), rows, bytes.size(), q.stream()));
        for (std::int64_t i = 0; i < m; i++) std::copy_n(bytes.data() + i * plan_.row_bytes, plan_.row_bytes, out + (at + i) * stride);
    });
}

void CudaStore::rows_in(StoreContext& ctx, std::int64_t first, std::int64_t n, const std::uint8_t* in, std::size_t stride) {
    Queue& q = Queue::of(ctx, device_);
    q.catch_up();
    q.settle();
    std::vector<std::uint8_t> bytes;
    in_chunks(n, [&](std::int64_t at, std::int64_t m) {
        bytes.resize(m * plan_.row_bytes);
        for (std::int64_t i = 0; i < m; i++) std::copy_n(in + (at + i) * stride, plan_.row_bytes, bytes.data() + i * plan_.row_bytes);
        auto* rows = q.memory<std::uint8_t>(Queue::Use::form, bytes.size());
        must(cuda::to_device(rows, bytes.data(), bytes.size(), q.stream()));
        must(cuda::set_rows(plan_, places(q, first + at, m), static_cast<int>(m), rows, plan_.row_bytes, q.stream()));
    });
}

void CudaStore::rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    Queue& q = Queue::of(ctx, device_);
    q.catch_up();
    q.settle();
    const auto d = static_cast<std::size_t>(layout_.head_dim());
    const cuda::RopeLayout layout{rope.n_dims, rope.n_offset, rope.pairs == RopePairs::adjacent};
    std::vector<float> table(rope.n_dims), turns;
    std::vector<std::int64_t> cells;
    const auto flush = [&] {
        if (cells.empty()) return;
        auto* to = q.memory<float>(Queue::Use::shifts, turns.size());
        must(cuda::to_device(to, turns.data(), turns.size() * sizeof(float), q.stream()));
        must(cuda::rotate_rows(plan_, q.upload<std::int64_t>(Queue::Use::places, cells), static_cast<int>(cells.size()), to, layout,
                               q.memory<float>(Queue::Use::rows, cells.size() * layout_.n_embd()), q.not_finite(), q.stream()));
        cells.clear(), turns.clear();
    };
    std::int32_t of = 0;  // shift that `table` is for
    for (std::int64_t row = 0; row < static_cast<std::int64_t>(shift.size()); row++) {
        if (shift[row] == 0) continue;
        if (shift[row] != of) rope_table(rope, static_cast<float>(of = shift[row]), table);
        cells.push_back(layout_.place(row));
        const std::size_t at = turns.size();
        turns.resize(at + 2 * d);
        std::fill_n(turns.begin() + static_cast<std::ptrdiff_t>(at), d, 1.0f);
        for (int i = 0; i < rope.n_dims / 2; i++) {
            const auto [a, b] = rope_pair(rope, i);
            turns[at + a] = turns[at + b] = table[2 * i];
            turns[at + d + a] = turns[at + d + b] = table[2 * i + 1];
        }
        if (cells.size() == kChunk) flush();
    }
    flush();
}

void CudaStore::copy_stream(std::int64_t src, std::int64_t dst) {
    const std::size_t bytes = layout_.stream_bytes();
    if (src == dst) return;
    Queue::apart(device_, [&](Queue& q) { must(cuda::copy_tiles(memory_ + dst * bytes, memory_ + src * bytes, bytes, q.stream())); });
}

void CudaStore::exact_out(std::int32_t slot, std::uint16_t* row) const {
    Queue::apart(device_, [&](Queue& q) {
        const std::size_t n = layout_.n_embd();
        must(cuda::to_host(row, exact_halves_.as<std::uint16_t>() + slot * n, n * sizeof *row, q.stream()));
    });
}

void CudaStore::exact_in(std::int32_t slot, const std::uint16_t* row) {
    Queue::apart(device_, [&](Queue& q) {
        std::vector<float> x(layout_.n_embd());
        std::transform(row, row + x.size(), x.begin(), from_half);
        float* to = q.memory<float>(Queue::Use::rows, x.size());
        must(cuda::to_device(to, x.data(), x.size() * sizeof(float), q.stream()));
        StoreRows one;
        const std::int64_t none = 0;
        one.rows = {&none, 1}, one.exact_slots = {&slot, 1};
        keep(q, one, to, x.size());
    });
}

void CudaStore::move_exact(StoreContext& ctx, std::span<const SlotMove> moves, std::size_t n_slots) {
    if (moves.empty()) return;
    Queue& q = Queue::of(ctx, device_);
    q.settle_batch();  // its rows may lie where moved ones are put meanwhile
    std::vector<std::int64_t> from, to;
    for (const SlotMove& m : moves) from.push_back(m.from), to.push_back(m.to);
    reserve_exact(q, std::max(n_slots, static_cast<std::size_t>(std::ranges::max(to)) + 1));
    const int n = static_cast<int>(moves.size());
    const auto *a = q.upload<std::int64_t>(Queue::Use::from, from), *b = q.upload<std::int64_t>(Queue::Use::to, to);
    auto* rows = q.memory<std::uint8_t>(Queue::Use::form, n * exact_plan_.row_bytes);
    // After a batch nobody waits for them; before attention (rows that were restored) it does.
    q.moving();
    q.beside([plan = exact_plan_, halves = exact_halves_.as<std::uint16_t>(), n_embd = layout_.n_embd(), a, b, n, rows](cuda::Stream side) {
        cuda::Status s = cuda::move_rows(halves, n_embd, a, b, n, side);
        if (s.ok()) s = cuda::get_rows(plan, a, n, rows, plan.row_bytes, side);
        return s.ok() ? cuda::set_rows(plan, b, n, rows, plan.row_bytes, side) : s;
    });
}

void CudaStore::set_outliers(int, std::span<const std::uint8_t>, std::span<const std::int64_t>) {
    throw std::logic_error("formats with outlier channels are not kept on a GPU");
}

StoreFactory cuda_store_in(std::uint8_t* memory, int device) {
    return [memory, device](const Layout& layout) { return std::make_unique<CudaStore>(layout, memory, device); };
}

}  // namespace turboquant
