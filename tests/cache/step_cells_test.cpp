// Positions and terms of a call's cells, followed from step to step: always what a fresh look at all cells gives.
#include "turboquant/cache/step_cells.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "turboquant/attention/attention.h"

namespace turboquant {
namespace {

constexpr int kCells = 1000;

struct Followed {
    CellPositions cells{kCells, 2};
    StepCells held;
    std::vector<std::uint16_t> mask = std::vector<std::uint16_t>(kCells, kMaskHidden);
    SerialExecutor executor;
    std::uint64_t number = 0;

    /// Whether what is held is that of a fresh one; and its number changes with the contents, and (`stays`) only with them.
    void check(int n_kv, int stream, bool stays = false, bool masked = true) {
        const StepMask m{nullptr, masked ? mask.data() : nullptr, kCells, kCells, 1, 1, n_kv, stream};
        const std::vector<std::int32_t> pos = held.cell_pos;
        const std::vector<std::uint8_t> term = held.cell_term;
        held.set(executor, m, cells);
        StepCells fresh;
        fresh.set(executor, m, cells);
        EXPECT_EQ(held.ids, fresh.ids);
        EXPECT_EQ(held.cell_pos, fresh.cell_pos);
        EXPECT_EQ(held.cell_term, fresh.cell_term);
        EXPECT_NE(held.cells_number, 0u);
        const bool same = pos == held.cell_pos && term == held.cell_term;
        if (!same) {
            EXPECT_NE(held.cells_number, number);
        }
        if (stays) {
            EXPECT_EQ(held.cells_number, number);
        }
        number = held.cells_number;
    }
    void write(std::int64_t row, std::int32_t pos) { cells.place(std::vector<std::int64_t>{row}, std::vector<std::int32_t>{pos}); }
};

TEST(StepCells, DecodingChangesNothing) {
    Followed f;
    for (int i = 0; i < 300; i++) {
        f.write(i, i), f.mask[i] = 0;
        // The first cell's position gives all that are hidden theirs; the first of a wider view is a new one.
        f.check(512, 0, i > 0);
    }
    for (int i = 300; i < 700; i++)
        f.write(i, i), f.mask[i] = 0, f.check((i + 256) / 256 * 256, 0, (i + 1) % 256 != 0 && i % 256 != 0 && i > 600);
}

TEST(StepCells, Streams) {
    Followed f;
    for (int i = 0; i < 100; i++) {
        f.write(i, i), f.write(kCells + i, i), f.mask[i] = 0;
        f.check(256, i % 7 == 0);  // one holds another stream now and then
    }
}

TEST(StepCells, WhateverHappens) {
    std::mt19937 rng(3);
    const auto one_of = [&](int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); };
    for (int round = 0; round < 20; round++) {
        Followed f;
        std::int32_t next = 0;
        std::uint64_t shifts = 0;
        int n_kv = 512;
        for (int i = 0; i < 400; i++) {
            switch (one_of(12)) {
                case 0:
                    f.mask[one_of(n_kv)] = kMaskHidden;
                    break;
                case 1:
                    f.mask[one_of(n_kv)] = 0;
                    break;
                case 2:
                    f.cells.forget(one_of(n_kv));
                    break;
                case 3:
                    f.write(one_of(n_kv), one_of(4) == 0 ? 0 : one_of(kCells));
                    break;
                case 4:
                    if (one_of(8) == 0) {
                        std::vector<std::int32_t> shift(f.cells.size(), -one_of(3));
                        f.cells.shift(shift, shifts);
                    }
                    break;
                case 5:
                    if (one_of(10) == 0) n_kv = 64 * (1 + one_of(kCells / 64));
                    break;
                case 6:
                    if (one_of(20) == 0) f.cells.copy_stream(one_of(2), one_of(2));
                    break;
                case 7:
                    if (one_of(30) == 0) f.cells.clear(), next = 0;
                    break;
                case 8:
                    for (int k = one_of(300); k > 0; k--) f.cells.forget(one_of(kCells));  // more than is remembered
                    break;
                default:
                    if (next < n_kv) f.write(next, next), f.mask[next++] = 0;
            }
            f.check(n_kv, 0, false, one_of(20) != 0);
        }
    }
}

// Several tokens at a time are looked at as a whole, and a single one after them.
TEST(StepCells, AfterABatch) {
    Followed f;
    std::vector<std::uint16_t> two(2 * kCells, kMaskHidden);
    for (int i = 0; i < 200; i++) {
        f.write(i, i), f.mask[i] = 0;
        if (i % 5 == 0) {
            two[i] = 0;
            f.held.set(f.executor, {nullptr, two.data(), kCells, kCells, 1, 2, 256, 0}, f.cells);
        }
        f.check(256, 0);
    }
}

}  // namespace
}  // namespace turboquant
