// What a cache knows of its cells, shared by all its layers: the token position of each, and which key offset was removed from it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "turboquant/cache/save_order.h"

namespace turboquant {

class LayerCache;

/// Every sequence gets a key offset of its own (key_offset.h), measured on its own first tokens, so that its answers do not depend on what
/// the cache held before. Sequences are not visible where cells are written; a token at position 0 begins one, and a token at position p
/// goes on with the one whose last token stands at p-1. A wrong guess costs nothing but that: any offset is exact as long as cell and
/// attention agree on it.
class CellPositions {
  public:
    static constexpr int kMaxOffsets = SaveOrder::kMaxOffsets;
    static constexpr std::int32_t kMaxPosition = 1 << 24;  ///< beyond any context; a position and an offset id share four bytes
    static_assert(std::int64_t{kMaxOffsets} * kMaxPosition <= std::int64_t{1} << 31);

    CellPositions(std::int64_t n_cells, std::int64_t n_streams);

    /// At most n sequences of a stream get an offset of their own from now on; those beyond share the newest (devices take few in a call).
    void limit_offsets(int n) { most_offsets_ = n; }

    std::int64_t n_cells() const { return n_cells_; }
    std::size_t size() const { return cells_.size(); }
    std::size_t bytes() const { return size() * sizeof(std::int32_t); }

    /// row = stream * n_cells + cell. Position -1: unknown, never written, or not below kMaxPosition; no offset was removed from such a
    /// cell, and its id is 0.
    std::int32_t at(std::int64_t row) const { return position_of(cells_[row]); }
    int offset_id(std::int64_t row) const { return id_of(cells_[row]); }
    /// Changes whenever a cell does.
    std::uint64_t version() const { return version_; }
    /// f(row) for the cells that changed since a version, some twice. False: that is too long ago to know.
    template <class F>
    bool each_change(std::uint64_t since, F&& f) const {
        if (version_ - since > kRecent) return false;
        for (; since < version_; since++) f(recent_[since % kRecent]);
        return true;
    }
    /// No two caches of a process have the same.
    std::uint64_t serial() const { return serial_; }
    /// All cells as a device takes them, four bytes each.
    std::span<const std::int32_t> packed() const { return cells_; }
    static std::int32_t position_of(std::int32_t packed) { return packed < 0 ? -1 : packed % kMaxPosition; }
    static int id_of(std::int32_t packed) { return packed < 0 ? 0 : packed / kMaxPosition; }
    /// An id is used again for another sequence when no cell has it any more; its generation then changes.
    std::uint32_t generation(int id) const { return ids_[id].generation; }

    /// Tokens at positions pos[i] are about to be written to rows[i]. `beside`, if it is not empty, marks those that share their position
    /// with the token before them in their sequence (M-RoPE: but for the first one, the tokens of an image).
    void place(std::span<const std::int64_t> rows, std::span<const std::int32_t> pos, std::span<const std::uint8_t> beside = {});
    /// As place, for models without RoPE, where positions do not matter: all cells share offset 0.
    void place_without_rope(std::span<const std::int64_t> rows);
    void forget(std::int64_t row) { cells_[row] = -1, note(row); }
    /// Whether the token of this row shares its position with the one before it in its sequence.
    bool beside(std::int64_t row) const { return !beside_.empty() && beside_[row]; }

    /// A restored cell. `saved`: what names the offset in the saved state; equal names get the same id until the next place().
    /// `known`: an id that already has this offset, or -1.
    int restore(std::int64_t row, std::int32_t pos, std::pair<int, std::uint32_t> saved, int known);
    /// A layer did not get the offset of this id with a restored state: nothing else is restored to it.
    void lose(int id) { ids_[id].lost = true; }
    bool lost(int id) const { return ids_[id].lost; }
    SaveOrder& save_order() { return save_order_; }

    void copy_stream(std::int64_t src, std::int64_t dst);
    void clear();

    /// A context shift arrives once per layer, but moves the shared positions once: `generation` counts the shifts a layer has seen, and
    /// only the first layer to see a new one moves the positions. shift[row] is added where a position is known.
    void shift(std::span<const std::int32_t> shift, std::uint64_t& generation);

    /// The layer whose RoPE input sets the positions (the first that has one: the input may be gone when later layers run), or null.
    const LayerCache* setter = nullptr;
    /// The layer that restored rows are placed by: the first with offset removal, or null.
    const LayerCache* restorer = nullptr;

  private:
    struct Id {
        std::uint32_t generation = 0;
        std::int32_t last_pos = -2;  ///< of the last token written
        std::int64_t stream = -1, last_row = -1;
        std::uint64_t used = 0;  ///< time of the last token
        bool lost = false;
    };
    static constexpr std::size_t kRecent = 256;
    void note(std::int64_t row) { recent_[version_++ % kRecent] = row; }
    void note_all() { version_ += kRecent + 1; }

    int begin_sequence(std::int64_t stream);  ///< -1: whatever else its stream holds
    bool stands_at(int id, std::int64_t stream, std::int32_t pos) const;
    int stay_beside(std::int64_t stream, std::int32_t pos, int previous) const;
    int continue_sequence(std::int64_t stream, std::int32_t pos, int previous);
    void put(std::int64_t row, std::int32_t pos, int id, bool beside);

    std::uint64_t serial_;
    std::int64_t n_cells_;
    int most_offsets_ = kMaxOffsets;   ///< of a stream
    std::vector<std::int32_t> cells_;  ///< position + kMaxPosition * id, or -1
    std::vector<bool> beside_;         ///< empty until a token is
    Id ids_[kMaxOffsets];
    std::uint64_t clock_ = 0, shifts_ = 0, version_ = 0;
    std::array<std::int64_t, kRecent> recent_{};  ///< by the version before: the row that changed
    std::map<std::pair<int, std::uint32_t>, int> restored_;
    SaveOrder save_order_;
};

}  // namespace turboquant
