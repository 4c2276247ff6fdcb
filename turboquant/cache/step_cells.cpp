#include "turboquant/cache/step_cells.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <span>

#include "turboquant/attention/attention.h"

namespace turboquant {
namespace {

constexpr int kBlock = 2048;  // cells whose flags stay in the first-level cache while all rows of the mask pass

/// seen[j] != 0: some query sees cell j.
void find_visible(Executor& executor, const StepMask& m, std::vector<std::uint16_t>& seen) {
    seen.assign(m.n_kv, m.mask ? 0 : 1);
    if (!m.mask) return;
    const int blocks = (m.n_kv + kBlock - 1) / kBlock;
    const std::int64_t work = static_cast<std::int64_t>(m.n_kv) * m.n_tokens;
    const int parts = work < 1 << 18 ? 1 : std::min(executor.n_threads(), blocks);
    executor.run(parts, [&](int ith) {
        for (int b = ith; b < blocks; b += parts) {
            const int first = b * kBlock, n = std::min(kBlock, m.n_kv - first);
            std::uint16_t* to = seen.data() + first;
            for (int t = 0; t < m.n_tokens; t++) {
                const std::uint16_t* row = m.mask + t * m.token_stride + first;
                for (int j = 0; j < n; j++) to[j] = static_cast<std::uint16_t>(to[j] | (row[j] ^ kMaskHidden));
            }
        }
    });
}

/// Numbers ids in the order in which they come up.
class OffsetList {
  public:
    explicit OffsetList(std::vector<int>& ids) : ids_(ids) { ids.clear(), std::fill(std::begin(index_), std::end(index_), -1); }
    std::uint8_t of(int id) {
        if (index_[id] < 0) index_[id] = static_cast<int>(ids_.size()), ids_.push_back(id);
        return static_cast<std::uint8_t>(index_[id]);
    }

  private:
    std::vector<int>& ids_;
    int index_[CellPositions::kMaxOffsets];
};

/// The same where there is but one.
struct OnlyOffset {
    int id;
    bool seen = false, others = false;
    std::uint8_t of(int other) {
        (other == id ? seen : others) = true;
        return 0;
    }
};

/// A run of cells of one sequence that are all seen, which is the rule: at once, or false.
template <class List>
bool plan_block(const std::int32_t* cells, const std::uint16_t* seen, int n, List& list, std::int32_t* pos, std::uint8_t* term) {
    constexpr auto kMask = static_cast<std::uint32_t>(CellPositions::kMaxPosition) - 1;
    static_assert((kMask & (kMask + 1)) == 0 && CellPositions::kMaxOffsets <= 128);  // so a negative cell has no id
    const int id = CellPositions::id_of(cells[0]);
    const std::uint32_t first = static_cast<std::uint32_t>(id) * (kMask + 1);
    bool hidden = false;
    for (int j = 0; j < n; j++) hidden |= seen[j] == 0;
    std::uint32_t others = 0;
    for (int j = 0; j < n; j++) others |= (static_cast<std::uint32_t>(cells[j]) ^ first) & ~kMask;
    if (hidden || others) return false;
    for (int j = 0; j < n; j++) pos[j] = static_cast<std::int32_t>(static_cast<std::uint32_t>(cells[j]) & kMask);
    std::fill_n(term, n, list.of(id));
    return true;
}

/// Position and term of the cell before a tile.
struct Before {
    std::int32_t pos = -1;
    std::uint8_t term = 0;
};

template <class List>
void plan_tile(const std::int32_t* cells, const std::uint16_t* seen, int n, Before before, List& list, std::int32_t* pos,
               std::uint8_t* term) {
    if (plan_block(cells, seen, n, list, pos, term)) return;
    for (int j = 0; j < n; j++) {
        if (seen[j]) {
            pos[j] = CellPositions::position_of(cells[j]);
            term[j] = pos[j] >= 0 ? list.of(CellPositions::id_of(cells[j])) : 0;
        } else {
            // Hidden cells go on from their neighbours: successive positions and one term per tile are the fast case, and what a hidden
            // cell held before must not choose between two ways to round.
            term[j] = before.term;
            pos[j] = before.pos >= 0 ? before.pos + 1 : -1;
        }
        before = {pos[j], term[j]};
    }
}

/// No two contents of a process have one number.
std::uint64_t next_number() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

}  // namespace

void StepCells::set(Executor& executor, const StepMask& m, const CellPositions& cells, const SeeCells& see) {
    if (see || !follow(m, cells)) {
        static thread_local std::vector<std::uint16_t> seen;
        see ? see(m, seen) : find_visible(executor, m, seen);
        set_all(m, cells, seen);
        mask_.clear();
        if (m.n_tokens == 1 && m.mask && !see) mask_.assign(m.mask, m.mask + m.n_kv);
    }
    cells_ = m.n_tokens == 1 && !see ? &cells : nullptr, serial_ = cells.serial(), version_ = cells.version(), stream_ = m.stream;
}

void StepCells::set_all(const StepMask& m, const CellPositions& cells, const std::vector<std::uint16_t>& seen) {
    const std::int32_t* packed = cells.packed().data() + m.stream * cells.n_cells();
    cell_pos.resize(m.n_kv), cell_term.resize(m.n_kv);
    OffsetList list(ids);
    for (int first = 0; first < m.n_kv; first += kTileKeys) {
        const Before before = first ? Before{cell_pos[first - 1], cell_term[first - 1]} : Before{};
        plan_tile(packed + first, seen.data() + first, std::min(kTileKeys, m.n_kv - first), before, list, cell_pos.data() + first,
                  cell_term.data() + first);
    }
    cells_number = next_number();
}

/// Tiles of which a cell or what is seen of it changed, ascending; takes over the mask. False: not known, or too many.
bool StepCells::find_changes(const StepMask& m, const CellPositions& cells) {
    const std::int64_t row = m.stream * cells.n_cells();
    tiles_.clear();
    const auto note = [&](std::int64_t changed) {
        if (changed >= row && changed < row + m.n_kv) tiles_.push_back(static_cast<int>((changed - row) / kTileKeys));
    };
    if (!cells.each_change(version_, note)) return false;
    for (int at = 0; m.mask && at < m.n_kv; at += kBlock) {
        const int end = std::min(at + kBlock, m.n_kv);
        if (std::memcmp(mask_.data() + at, m.mask + at, (end - at) * sizeof mask_[0]) == 0) continue;
        for (int first = at; first < end; first += kTileKeys) {
            const std::size_t bytes = std::min(kTileKeys, end - first) * sizeof mask_[0];
            if (std::memcmp(mask_.data() + first, m.mask + first, bytes) == 0) continue;
            std::memcpy(mask_.data() + first, m.mask + first, bytes);
            tiles_.push_back(first / kTileKeys);
        }
    }
    std::ranges::sort(tiles_);
    tiles_.erase(std::ranges::unique(tiles_).begin(), tiles_.end());
    return tiles_.size() < cell_pos.size() / kTileKeys / 4 + 4;
}

/// From the call before; false where that cannot be, or may not be the same as set_all.
bool StepCells::follow(const StepMask& m, const CellPositions& cells) {
    if (m.n_tokens != 1 || cells_ != &cells || serial_ != cells.serial() || stream_ != m.stream || ids.size() != 1 ||
        cell_pos.size() != static_cast<std::size_t>(m.n_kv) || mask_.size() != (m.mask ? cell_pos.size() : 0) || !find_changes(m, cells))
        return false;
    const std::int32_t* packed = cells.packed().data() + m.stream * cells.n_cells();
    OnlyOffset only{ids[0]};
    bool changed = false;
    std::int32_t pos[kTileKeys];
    std::uint8_t term[kTileKeys];
    std::uint16_t seen[kTileKeys];
    for (std::size_t i = 0; i < tiles_.size(); i++) {
        const int first = tiles_[i] * kTileKeys, n = std::min(kTileKeys, m.n_kv - first);
        for (int j = 0; j < n; j++) seen[j] = m.mask ? mask_[first + j] ^ kMaskHidden : 1;
        const Before before = first ? Before{cell_pos[first - 1], cell_term[first - 1]} : Before{};
        plan_tile(packed + first, seen, n, before, only, pos, term);
        if (std::equal(pos, pos + n, cell_pos.begin() + first) && std::equal(term, term + n, cell_term.begin() + first)) continue;
        changed = true;
        std::copy_n(pos, n, cell_pos.begin() + first), std::copy_n(term, n, cell_term.begin() + first);
        // Hidden cells of the next tile may go on from this one's last.
        if (first + n < m.n_kv && (i + 1 == tiles_.size() || tiles_[i + 1] != tiles_[i] + 1))
            tiles_.insert(tiles_.begin() + static_cast<std::ptrdiff_t>(i) + 1, tiles_[i] + 1);
    }
    if (only.others || (!tiles_.empty() && !only.seen)) return false;
    if (changed) cells_number = next_number();
    return true;
}

}  // namespace turboquant
