// The stores that the tests of the cache run over: a test of a suite derived from OverStores runs once with each.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "tests/cache/spec_store.h"
#include "turboquant/cache/cpu/cpu_store.h"
#include "turboquant/cache/kv_tensor.h"

namespace turboquant::test {

enum class StoreKind { cpu, spec };
inline void PrintTo(StoreKind kind, std::ostream* out) { *out << (kind == StoreKind::cpu ? "cpu" : "spec"); }

class OverStores : public testing::TestWithParam<StoreKind> {
  protected:
    void SetUp() override { current = GetParam(); }

  public:
    static inline StoreKind current = StoreKind::cpu;
};

/// A KV tensor with its memory, over the store of the test that runs.
class HeldTensor {
  public:
    explicit HeldTensor(const KvGeometry& g) : memory_(reserved_bytes(g) + 64) {
        auto* aligned = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + 63) / 64 * 64);
        StoreFactory cpu = cpu_store_in(aligned);
        kv_ = std::make_unique<KvTensor>(
            g, OverStores::current == StoreKind::cpu ? std::move(cpu)
                                                     : [](const Layout& layout) { return std::make_unique<SpecStore>(layout); });
    }
    HeldTensor(const KvGeometry& g, int head_dim) : HeldTensor(g) { kv_->bind_head_dim(head_dim); }
    /// As the owner of a buffer does it.
    void clear() {
        std::fill(memory_.begin(), memory_.end(), std::uint8_t{0});
        kv_->reset();
    }
    KvTensor* operator->() const { return kv_.get(); }
    KvTensor& operator*() const { return *kv_; }

  private:
    std::vector<std::uint8_t> memory_;
    std::unique_ptr<KvTensor> kv_;
};

/// On the calling thread.
inline StoreContext& serial() {
    static SerialExecutor executor;
    static StoreContext ctx{&executor, {}};
    return ctx;
}

}  // namespace turboquant::test

#define TQ_OVER_STORES(suite)                                                                                                     \
    INSTANTIATE_TEST_SUITE_P(Stores, suite, testing::Values(turboquant::test::StoreKind::cpu, turboquant::test::StoreKind::spec), \
                             [](const auto& i) { return testing::PrintToString(i.param); })
