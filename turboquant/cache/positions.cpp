#include "turboquant/cache/positions.h"

#include <algorithm>
#include <atomic>
#include <bitset>

namespace turboquant {

CellPositions::CellPositions(std::int64_t n_cells, std::int64_t n_streams) : n_cells_(n_cells), cells_(n_cells * n_streams, -1) {
    static std::atomic<std::uint64_t> last{0};
    serial_ = ++last;
}

void CellPositions::put(std::int64_t row, std::int32_t pos, int id, bool beside) {
    if (beside) beside_.resize(cells_.size());
    if (!beside_.empty()) beside_[row] = beside;
    cells_[row] = pos + kMaxPosition * id;
    note(row);
    ids_[id].last_pos = pos;
    ids_[id].stream = row / n_cells_, ids_[id].last_row = row;
    ids_[id].used = ++clock_;
}

int CellPositions::begin_sequence(std::int64_t stream) {
    std::bitset<kMaxOffsets> in_use, in_stream;
    for (const std::int32_t cell : cells_)
        if (cell >= 0) in_use.set(cell / kMaxPosition);
    for (std::int64_t row = stream * n_cells_; stream >= 0 && row < (stream + 1) * n_cells_; row++)
        if (cells_[row] >= 0) in_stream.set(cells_[row] / kMaxPosition);
    const auto newest = [&](const std::bitset<kMaxOffsets>& among) {
        int best = -1;
        for (int id = 0; id < kMaxOffsets; id++)
            if (among.test(id) && (best < 0 || ids_[id].used > ids_[best].used)) best = id;
        return best;
    };
    if (static_cast<int>(in_stream.count()) >= most_offsets_) return newest(in_stream);
    int best = -1;
    for (int id = 0; id < kMaxOffsets; id++)
        if (!in_use.test(id) && (best < 0 || ids_[id].used < ids_[best].used)) best = id;
    // More sequences left traces than there are ids: share the newest offset.
    if (best < 0) return newest(std::bitset<kMaxOffsets>().set());
    ids_[best] = {ids_[best].generation + 1, -2, -1, -1, ++clock_, false};
    return best;
}

/// The last token of a sequence stands at this position: one whose cell was not given to another token since.
bool CellPositions::stands_at(int id, std::int64_t stream, std::int32_t pos) const {
    const Id& s = ids_[id];
    return s.stream == stream && s.last_pos == pos && cells_[s.last_row] == pos + kMaxPosition * id;
}

int CellPositions::continue_sequence(std::int64_t stream, std::int32_t pos, int previous) {
    if (previous >= 0 && stands_at(previous, stream, pos - 1)) return previous;
    // Of sequences of equal length, batches list them in the same order every time: the one that waited longest.
    int best = -1;
    for (int id = 0; id < kMaxOffsets; id++)
        if (stands_at(id, stream, pos - 1) && (best < 0 || ids_[id].used < ids_[best].used)) best = id;
    if (best >= 0) return best;
    // Cut back, shifted or restored: some cell holds the token before.
    for (std::int64_t row = stream * n_cells_; row < (stream + 1) * n_cells_; row++)
        if (at(row) == pos - 1 && (best < 0 || ids_[offset_id(row)].used > ids_[best].used)) best = offset_id(row);
    return best >= 0 ? best : begin_sequence(stream);
}

/// The sequence whose last token stands at the same position, the one written last of several; -1: none does.
int CellPositions::stay_beside(std::int64_t stream, std::int32_t pos, int previous) const {
    if (previous >= 0 && stands_at(previous, stream, pos)) return previous;
    int best = -1;
    for (int id = 0; id < kMaxOffsets; id++)
        if (stands_at(id, stream, pos) && (best < 0 || ids_[id].used > ids_[best].used)) best = id;
    return best;
}

void CellPositions::place(std::span<const std::int64_t> rows, std::span<const std::int32_t> pos, std::span<const std::uint8_t> beside) {
    restored_.clear();
    int id = -1;
    for (std::size_t i = 0; i < rows.size(); i++) {
        if (pos[i] < 0 || pos[i] >= kMaxPosition) {
            forget(rows[i]);
            continue;
        }
        const std::int64_t stream = rows[i] / n_cells_;
        const int same = !beside.empty() && beside[i] ? stay_beside(stream, pos[i], id) : -1;
        id = same >= 0 ? same : pos[i] == 0 ? begin_sequence(stream) : continue_sequence(stream, pos[i], id);
        put(rows[i], pos[i], id, same >= 0);
    }
}

void CellPositions::place_without_rope(std::span<const std::int64_t> rows) {
    for (const std::int64_t row : rows) put(row, static_cast<std::int32_t>(row % n_cells_), 0, false);
}

int CellPositions::restore(std::int64_t row, std::int32_t pos, std::pair<int, std::uint32_t> saved, int known) {
    const auto found = restored_.find(saved);
    const int id = known >= 0 ? known : found != restored_.end() && !lost(found->second) ? found->second : begin_sequence(-1);
    restored_[saved] = id;
    put(row, pos, id, cells_[row] != pos + kMaxPosition * id && ids_[id].last_pos == pos);
    return id;
}

void CellPositions::copy_stream(std::int64_t src, std::int64_t dst) {
    std::copy_n(cells_.begin() + src * n_cells_, n_cells_, cells_.begin() + dst * n_cells_);
    if (!beside_.empty()) std::copy_n(beside_.begin() + src * n_cells_, n_cells_, beside_.begin() + dst * n_cells_);
    note_all();
}

void CellPositions::clear() {
    std::fill(cells_.begin(), cells_.end(), -1);
    beside_.clear();
    note_all();
    restored_.clear();
    for (Id& id : ids_) id = {id.generation + 1};
}

void CellPositions::shift(std::span<const std::int32_t> shift, std::uint64_t& generation) {
    if (++generation <= shifts_) return;
    shifts_ = generation;
    note_all();
    for (std::size_t i = 0; i < std::min(cells_.size(), shift.size()); i++)
        if (const auto row = static_cast<std::int64_t>(i); cells_[i] >= 0)
            cells_[i] = std::clamp(at(row) + shift[i], 0, kMaxPosition - 1) + kMaxPosition * offset_id(row);
    for (Id& id : ids_) id.last_pos = -2;  // found again by their cells
}

}  // namespace turboquant
