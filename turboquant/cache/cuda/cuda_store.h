// The store in the memory of a GPU: tiles in fragment order, by the kernels of turboquant/cuda. Verbs are given to the stream of their
// context (queue.h) and return at once, but for those that give something to the host.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "turboquant/cache/cuda/queue.h"
#include "turboquant/cuda/encode.h"

namespace turboquant {

class CudaStore final : public TileStore {
  public:
    /// `memory`: as CpuStore's, on the GPU of this number. Throws std::invalid_argument for formats that GPUs do not have, and
    /// std::runtime_error.
    CudaStore(const Layout& layout, std::uint8_t* memory, int device);

    /// Always true: whether all was finite is known later (Queue::take_not_finite).
    bool write(StoreContext& ctx, const StoreRows& rows, const KeyTransform* keys) override;
    const char* attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, const StreamCall& call) const override;
    const char* attend_streams(StoreContext& ctx, const TileStore& values, std::int64_t first_stream,
                               std::span<const StreamCall> calls) const override;
    bool exact_in_pairs() const override { return true; }
    std::size_t spare_exact_slots() const override { return kFewRows; }
    bool has_masks() const override { return true; }
    /// The mask was there before the graph; waits for the device.
    void see_cells(StoreContext& ctx, const StepMask& m, std::vector<std::uint16_t>& seen) const override;
    bool inputs_on_host() const override { return false; }
    void set_aside(StoreContext& ctx, const float* x, std::size_t stride, std::span<const std::int32_t> places) override;
    std::size_t rows_set_aside_by_write() const override { return kFewRows; }
    void when_free(StoreContext& ctx, std::function<void()> f) override { Queue::of(ctx, device_).after_graph(std::move(f)); }
    void fetch(std::span<const std::int32_t> places, std::uint16_t* rows) const override;
    void measure(StoreContext& ctx, int id, std::span<const std::int32_t> places, std::span<const std::int32_t> positions,
                 const KeyTransform& keys) override;
    void fetch_mean(int id, std::uint16_t* mu) const override;
    void read(StoreContext& ctx, std::int64_t first, std::int64_t n, float* x) const override;
    void rows_out(StoreContext& ctx, std::int64_t first, std::int64_t n, std::uint8_t* out, std::size_t stride) const override;
    void rows_in(StoreContext& ctx, std::int64_t first, std::int64_t n, const std::uint8_t* in, std::size_t stride) override;
    void rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) override;
    void copy_stream(std::int64_t src, std::int64_t dst) override;
    void exact_out(std::int32_t slot, std::uint16_t* row) const override;
    void exact_in(std::int32_t slot, const std::uint16_t* row) override;
    void move_exact(StoreContext& ctx, std::span<const SlotMove> moves, std::size_t n_slots) override;
    void set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t> written) override;

  private:
    cuda::Tiles tiles(std::int64_t stream) const;
    cuda::Tiles exact_tiles() const;
    void reserve_exact(Queue& q, std::size_t n_slots);
    const float* keep(Queue& q, const StoreRows& rows, const float* x, std::size_t stride, float* out = nullptr);
    void sync_offsets(Queue& q, const KeyTransform& keys) const;
    void put_aside(Queue& q, std::span<const std::int32_t> places, cuda::KeepRows& k);
    void write_aside(Queue& q, const StoreRows& rows, cuda::EncodeArgs e);
    std::uint16_t* mean(int id) const;
    volatile std::uint32_t* mean_done(int id) const;
    const std::int64_t* places(Queue& q, std::int64_t first, std::int64_t n) const;
    const char* attend_together(StoreContext& ctx, const TileStore& values, std::int64_t first_stream,
                                std::span<const StreamCall> calls) const;
    bool set_term(Queue& q, const Queue::Step& step, std::span<const StreamCall> calls, bool prefill, AttentionArgs& a,
                  cuda::AttentionArgs& c) const;
    std::size_t offset_size() const { return 2 * layout_.n_embd(); }

    /// A batch of so many rows is set aside by the launch that keeps it, and encoded beside other work.
    static constexpr std::size_t kFewRows = 32;

    int device_;
    std::uint8_t* memory_;
    cuda::EncodePlan plan_, exact_plan_;
    cuda::DeviceArray plan_memory_, exact_plan_memory_, head_at_, head_format_, plain_heads_;
    std::vector<CodecId> formats_;  ///< each once
    /// Copies of the key transform: offsets by id ([n_head][2][head_dim]), scales, and the frequency of each dim.
    mutable cuda::DeviceArray offsets_, scales_, dim_freq_;
    mutable std::uint64_t offsets_version_ = 0;
    mutable std::pair<const Queue*, std::uint64_t> offsets_used_{};  ///< the graph of the last launch that reads them
    /// Exact rows by slot: as they are (fp16), and rotated in tiles of raw.
    cuda::DeviceArray exact_halves_, exact_memory_;
    std::size_t exact_slots_ = 0;
    cuda::DeviceArray later_;  ///< rows that the second stream encodes
    cuda::DeviceArray aside_;  ///< [place][n_embd] halves
    /// Means by id that the device measures, [id][n_embd] halves, and after each those of its heads that are there; memory of the host.
    struct DropShared {
        void operator()(void* p) const { cuda::release_shared(p); }
    };
    std::unique_ptr<void, DropShared> means_;
    std::array<std::uint32_t, CellPositions::kMaxOffsets> mean_number_{};
};

/// Stores on a GPU in `memory`, which is as CudaStore wants it.
StoreFactory cuda_store_in(std::uint8_t* memory, int device);

}  // namespace turboquant
