// The stores that the tests of the cache run over: a test of a suite derived from OverStores runs once with each.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "tests/cache/spec_store.h"
#include "turboquant/cache/cpu/cpu_store.h"
#include "turboquant/cache/cuda/cuda_store.h"
#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/saved_rows.h"

namespace turboquant::test {

/// cuda: the store of GPUs over kernels of the host (tests/cuda/host_kernels.cpp).
enum class StoreKind { cpu, spec, cuda };
inline void PrintTo(StoreKind kind, std::ostream* out) {
    *out << (kind == StoreKind::cpu ? "cpu" : kind == StoreKind::spec ? "spec" : "cuda");
}

class OverStores : public testing::TestWithParam<StoreKind> {
  protected:
    void SetUp() override { current = GetParam(); }

  public:
    static inline StoreKind current = StoreKind::cpu;
    /// Whether the store of the test that runs takes a format, at a head size.
    static bool serves(CodecId codec, int head_dim) {
        return current != StoreKind::cuda || (!is_composite(codec) && cuda::attention_serves(head_dim));
    }
};

/// On the calling thread.
inline StoreContext& serial() {
    static SerialExecutor executor;
    static StoreContext ctx{&executor};
    return ctx;
}

/// A KV tensor with its memory, over the store of the test that runs.
class HeldTensor {
  public:
    explicit HeldTensor(const KvGeometry& g) : memory_(reserved_bytes(g) + 64) {
        auto* aligned = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + 63) / 64 * 64);
        StoreFactory store = cpu_store_in(aligned);
        if (OverStores::current == StoreKind::spec) store = [](const Layout& layout) { return std::make_unique<SpecStore>(layout); };
        if (OverStores::current == StoreKind::cuda) store = cuda_store_in(aligned, 0);
        kv_ = std::make_unique<KvTensor>(g, std::move(store));
    }
    HeldTensor(const KvGeometry& g, int head_dim) : HeldTensor(g) { kv_->bind_head_dim(head_dim); }
    /// As the owner of a buffer does it.
    void clear() {
        std::fill(memory_.begin(), memory_.end(), std::uint8_t{0});
        kv_->reset();
        carried_.clear();
    }
    /// As llama.cpp's state (saved_row.h), n_embd halves a row.
    void save_row(std::int64_t row, CellPositions& cells, std::span<std::uint16_t> out) const {
        cells.save_order().begin(kv_.get(), row);
        SavedRowWriter writer(out.data(), out.size(), row, cells.save_order());
        kv_->save_rows(serial(), row, 1, cells, writer);
    }
    RestoreResult restore_rows(std::int64_t first, std::int64_t n, const std::uint16_t* in, CellPositions& cells, bool places) {
        SavedRowReader reader(in, static_cast<std::size_t>(kv_->geometry().n_embd), kv_->geometry().side, carried_);
        return kv_->restore_rows(serial(), first, n, reader, cells, places);
    }
    KvTensor* operator->() const { return kv_.get(); }
    KvTensor& operator*() const { return *kv_; }

  private:
    std::vector<std::uint8_t> memory_;
    std::unique_ptr<KvTensor> kv_;
    CarriedOffsets carried_;
};

}  // namespace turboquant::test

#define TQ_OVER_SOME_STORES(suite, ...) \
    INSTANTIATE_TEST_SUITE_P(Stores, suite, testing::Values(__VA_ARGS__), [](const auto& i) { return testing::PrintToString(i.param); })
#define TQ_OVER_STORES(suite) \
    TQ_OVER_SOME_STORES(suite, turboquant::test::StoreKind::cpu, turboquant::test::StoreKind::spec, turboquant::test::StoreKind::cuda)
/// Formats that GPUs do not have.
#define TQ_OVER_CPU_STORES(suite) TQ_OVER_SOME_STORES(suite, turboquant::test::StoreKind::cpu, turboquant::test::StoreKind::spec)
