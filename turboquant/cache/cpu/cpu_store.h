// The store in host memory, over the CPU kernels.
#pragma once

#include "turboquant/cache/tile_store.h"
#include "turboquant/kernels/kernels.h"
#include "turboquant/kernels/rows.h"

namespace turboquant {

class CpuStore final : public TileStore {
  public:
    /// `memory`: reserved_bytes() of the geometry that the layout came from, all zero, 64-byte aligned, outliving the store.
    CpuStore(const Layout& layout, std::uint8_t* memory, const Kernels& k);

    bool write(StoreContext& ctx, const StoreRows& rows, const KeyTransform* keys) override;
    const char* attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, const StreamCall& call) const override;
    void read(StoreContext& ctx, std::int64_t first, std::int64_t n, float* x) const override;
    void rows_out(StoreContext& ctx, std::int64_t first, std::int64_t n, std::uint8_t* out, std::size_t stride) const override;
    bool takes_residuals() const override { return true; }
    void rows_in(StoreContext& ctx, std::int64_t first, std::int64_t n, const std::uint8_t* in, std::size_t stride) override;
    void rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) override;
    void copy_stream(std::int64_t src, std::int64_t dst) override;
    void set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t> written) override;

    /// Tiles of all heads of one stream. Valid as long as the store, until set_outliers.
    TileView view(std::int64_t stream) const;

  private:
    bool write_part(const StoreRows& rows, const KeyTransform* keys, int ith, int parts);
    std::uint8_t* tile(std::int64_t row, int head) const {
        return memory_ + layout_.place(row) / kTileKeys * layout_.tile_stride() + layout_.head_at(head);
    }
    StreamTiles tiles() const { return {view(0), memory_, layout_.n_head()}; }
    std::vector<std::int64_t> places(std::int64_t first, std::int64_t n) const;

    std::uint8_t* memory_;
    const Kernels* kernels_;
    std::vector<std::uint8_t> masks_;  ///< of outlier channels: [n_head][head_dim]
};

/// Stores in `memory`, which is as CpuStore wants it.
StoreFactory cpu_store_in(std::uint8_t* memory, const Kernels& k = kernels());

}  // namespace turboquant
