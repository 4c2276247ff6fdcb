// The packer of llama.cpp's state: rows of 2*n_embd bytes each (saved_row.h), one after the other.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <span>
#include <vector>

#include "turboquant/cache/save_order.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/cache/snapshot.h"

namespace turboquant {

/// Writes rows to out[i*n_embd ..). `order` numbers offsets and their pieces over all ranges of one state: SaveOrder::begin() before each.
class SavedRowWriter final : public RowWriter {
  public:
    SavedRowWriter(std::uint16_t* out, std::size_t n_embd, std::int64_t first_row, SaveOrder& order)
        : out_(out), n_embd_(n_embd), first_row_(first_row), order_(order) {}

    bool takes_exact() const override { return n_embd_ >= kTagValues; }
    void write(std::int64_t i, const RowSnapshot& row) override;
    std::uint8_t* begin(std::int64_t i, const RowSnapshot& row) override;
    std::size_t stride() const override { return n_embd_ * sizeof *out_; }

  private:
    std::span<std::uint16_t> row(std::int64_t i) const { return {out_ + i * n_embd_, n_embd_}; }

    std::uint16_t* out_;
    std::size_t n_embd_;
    std::int64_t first_row_;
    SaveOrder& order_;
    PackedHeader header_;
};

/// The offsets that the rows of a state carry in pieces, by hash. Kept from range to range of one tensor.
class CarriedOffsets {
  public:
    void add(std::span<const std::uint16_t> row, const PackedHeader& header);
    /// Empty unless all of it has come.
    std::span<const std::uint16_t> find(std::uint32_t hash) const;
    void clear() { *this = {}; }

  private:
    static constexpr std::size_t kMost = 64;  ///< offsets of a state
    struct Carried {
        MuPieces pieces;
        std::vector<std::uint16_t> mu;  ///< empty: not complete
    };
    std::map<std::uint32_t, Carried> by_hash_;
    std::uint32_t last_complete_ = 0;
};

/// Reads the n rows at in[i*n_embd ..). Positions and offsets are read from keys only: tags in the values mean nothing.
class SavedRowReader final : public RowReader {
  public:
    SavedRowReader(const std::uint16_t* in, std::size_t n_embd, Side side, CarriedOffsets& offsets)
        : in_(in), n_embd_(n_embd), side_(side), offsets_(offsets) {}

    RowSnapshot read(std::int64_t i) override;
    std::size_t stride() const override { return n_embd_ * sizeof *in_; }
    std::span<const std::uint16_t> mu(std::uint32_t hash) override { return offsets_.find(hash); }

  private:
    const RowForm* form();

    const std::uint16_t* in_;
    std::size_t n_embd_;
    Side side_;
    CarriedOffsets& offsets_;
    PackedHeader header_;  ///< of the last packed row
    std::list<RowForm> forms_;
};

}  // namespace turboquant
