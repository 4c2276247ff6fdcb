// Windows of residuals (WindowForm::residual): what is kept of a row, through writing, rotating, copying, saving and attention.
#include <gtest/gtest.h>

#include "tests/cache/key_cache.h"
#include "turboquant/cache/layer_cache.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/residual.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

constexpr int kCells = 256, kSink = 2, kRecent = 8;
constexpr double kLeast = 0.004, kMost = 0.02;  // of the code's squared error is left (codec/residual.h)

class ResidualWindow : public OverStores {};
TQ_OVER_CPU_STORES(ResidualWindow);  // GPUs keep fp16 windows

std::string letters() {
    std::string s;
    for (int i = 0; i < kEmbd; i++) s += static_cast<char>('a' + i / 2 % 5);
    return s;
}

struct Window {
    explicit Window(Side side, const HeadCodecs& codecs = CodecId::turbo3, const std::string& scales = "",
                    WindowSizes windows = {kSink, kRecent, WindowForm::residual})
        : kv({side, codecs, default_norm_mode(side), kEmbd, kCells, 2, kOutlierRatio, windows}, kDim) {
        if (side == Side::value) return;
        kv->enable_offset(), kv->offset()->set_rope(rope());
        if (!scales.empty()) kv->offset()->set_scales(scales);
    }
    /// Rows of x from `from` on, at their positions.
    void write(const std::vector<float>& x, int from, int n) {
        const auto rows = iota64(n, from);
        cells.place(rows, iota32(n, from));
        kv->write(serial(), {x.data() + static_cast<std::ptrdiff_t>(from) * kEmbd, kEmbd, rows, {}, {}}, cells, kv->offset() != nullptr);
        kv->end_batch(serial(), cells);
    }
    /// Mean squared errors of the rows of the window against x, of what is kept of them and of their codes alone, and how many there are.
    struct Errors {
        double kept = 0, code = 0;
        int n = 0;
    };
    Errors errors(const std::vector<float>& x, std::int64_t first = 0) const {
        Errors e;
        std::vector<float> code(kEmbd);
        for (std::int64_t row = first; row < first + kCells; row++) {
            const auto kept = kv->exact_row(row, cells);
            if (!kept) continue;
            kv->read_row(row, cells, code);
            for (int i = 0; i < kEmbd; i++) {
                const float is = x[(row - first) * kEmbd + i];
                e.kept += std::pow((*kept)[i] - is, 2) / kEmbd, e.code += std::pow(code[i] - is, 2) / kEmbd;
            }
            e.n++;
        }
        return e;
    }
    std::vector<std::uint16_t> save(int n) {
        std::vector<std::uint16_t> out(static_cast<std::size_t>(n) * kEmbd);
        cells.save_order().begin(&*kv, 0);
        SavedRowWriter writer(out.data(), kEmbd, 0, cells.save_order());
        kv->save_rows(serial(), 0, n, cells, writer);
        return out;
    }
    RestoreResult restore(const std::vector<std::uint16_t>& rows) {
        const auto n = static_cast<std::int64_t>(rows.size() / kEmbd);
        if (!kv->offset()) cells.place(iota64(static_cast<int>(n)), iota32(static_cast<int>(n)));
        const RestoreResult r = kv.restore_rows(0, n, rows.data(), cells, kv->offset() != nullptr);
        const RestoreResult end = kv->finish_restore(serial(), cells);
        kv->end_batch(serial(), cells);
        return worse(r, end);
    }

    CellPositions cells{kCells, 2};
    HeldTensor kv;
};

}  // namespace

constexpr WindowSizes kHalves{kSink, kRecent, WindowForm::halves};

TEST_P(ResidualWindow, TakesOffWhatItsBitsAreWorth) {
    const auto x = biased_keys(iota32(100), some_bias(), 1);
    for (const Side side : {Side::key, Side::value})
        for (const CodecId codec : {CodecId::turbo3, CodecId::tcq2, CodecId::turbo8})
            for (const std::string& scales : {std::string(), side == Side::key ? letters() : ""}) {
                SCOPED_TRACE(testing::Message()
                             << codec_info(codec).name << (side == Side::key ? " keys" : " values") << (scales.empty() ? "" : ", scaled"));
                Window w(side, codec, scales);
                w.write(x, 0, 70);  // the offset of the keys is measured on the first 64
                for (int at = 70; at < 100; at++) w.write(x, at, 1);
                const Window::Errors e = w.errors(x);
                EXPECT_EQ(e.n, kSink + kRecent);
                // Keys that the offset was measured on are encoded from fp16 values, whose error counts beside that of 8 bits.
                EXPECT_LT(e.kept, kMost * e.code + (side == Side::key ? 1e-4 * e.n : 0));
                EXPECT_GT(e.kept, kLeast * e.code);
            }
}

// While an offset is measured, codes change, and what they leave with them.
TEST_P(ResidualWindow, FollowsTheOffsetThatIsMeasured) {
    const auto x = biased_keys(iota32(20), some_bias(), 2);
    Window w(Side::key);
    for (int at = 0; at < 20; at++) {
        w.write(x, at, 1);
        const Window::Errors e = w.errors(x);
        EXPECT_LT(e.kept, kMost * e.code + 1e-4 * e.n) << at;
    }
}

TEST_P(ResidualWindow, DoesNotDependOnHowAPromptWasCut) {
    const auto x = biased_keys(iota32(90), some_bias(), 3);
    for (const Side side : {Side::key, Side::value}) {
        Window whole(side), cut(side);
        whole.write(x, 0, 90);
        for (int at = 0; at < 90; at += 15) cut.write(x, at, 15);
        for (std::int64_t row = 0; row < 90; row++)
            EXPECT_EQ(whole.kv->exact_row(row, whole.cells), cut.kv->exact_row(row, cut.cells)) << row;
    }
}

// A row that leaves the window keeps its code, and nothing else changes.
TEST_P(ResidualWindow, LeavesTheCodes) {
    const auto x = biased_keys(iota32(90), some_bias(), 3);
    for (const Side side : {Side::key, Side::value}) {
        Window with(side), without(side, CodecId::turbo3, "", {0, 0, WindowForm::halves});
        with.write(x, 0, 90), without.write(x, 0, 90);
        std::vector<float> a(kEmbd), b(kEmbd);
        for (std::int64_t row = 0; row < 90; row++) {
            with.kv->read_row(row, with.cells, a), without.kv->read_row(row, without.cells, b);
            EXPECT_EQ(a, b) << row;
        }
    }
}

// A sequence that is cut back, and cells that are written anew by another one: no residual stays on a code that is not its own.
TEST_P(ResidualWindow, GoesWithWhatItStoodOn) {
    const auto x = biased_keys(iota32(120), some_bias(), 12), y = biased_keys(iota32(40), some_bias(), 13);
    for (const Side side : {Side::key, Side::value}) {
        Window w(side);
        w.write(x, 0, 100);
        auto z = x;
        std::copy(y.begin(), y.begin() + 20 * kEmbd, z.begin() + 90 * kEmbd);
        w.write(z, 90, 20);  // cut back to 90
        Window::Errors e = w.errors(z);
        EXPECT_GE(e.n, kSink + kRecent);
        EXPECT_LT(e.kept, kMost * e.code + 1e-4 * e.n);
        // Another sequence over the last cells.
        const auto rows = iota64(30, 85);
        w.cells.place(rows, iota32(30));
        w.kv->write(serial(), {y.data(), kEmbd, rows, {}, {}}, w.cells, w.kv->offset() != nullptr);
        w.kv->end_batch(serial(), w.cells);
        std::copy(y.begin(), y.begin() + 30 * kEmbd, z.begin() + 85 * kEmbd);
        e = w.errors(z);
        EXPECT_GE(e.n, kSink + kRecent);
        EXPECT_LT(e.kept, kMost * e.code + 1e-4 * e.n);
    }
}

TEST_P(ResidualWindow, RotatesWithItsRows) {
    auto x = biased_keys(iota32(80), some_bias(), 4);
    Window w(Side::key);
    w.write(x, 0, 80);
    std::vector<std::int32_t> shift(2 * kCells);
    std::fill_n(shift.begin() + 40, 40, -30);
    w.kv->rotate(serial(), rope(), shift);
    std::uint64_t generation = 0;
    w.cells.shift(shift, generation);
    std::vector<float> table(kDim);
    rope_table(rope(), -30, table);
    for (int row = 40; row < 80; row++)
        for (int h = 0; h < kHeads; h++) rope_apply(rope(), table, std::span(x).subspan(row * kEmbd + h * kDim, kDim));
    const Window::Errors e = w.errors(x);
    EXPECT_EQ(e.n, kSink + kRecent);
    EXPECT_LT(e.kept, 2.5 * kMost * e.code) << "twice the residual's error: decoded, and coded again";
    EXPECT_GT(e.kept, kLeast * e.code);
}

TEST_P(ResidualWindow, GoesWithACopiedStream) {
    const auto x = biased_keys(iota32(80), some_bias(), 5);
    for (const Side side : {Side::key, Side::value}) {
        Window w(side);
        w.write(x, 0, 80);
        w.kv->freeze();
        w.kv->copy_stream(0, 1);
        w.cells.copy_stream(0, 1);
        const Window::Errors from = w.errors(x), to = w.errors(x, kCells);
        EXPECT_EQ(to.n, from.n);
        EXPECT_EQ(to.kept, from.kept);
    }
}

TEST_P(ResidualWindow, SavedStateBringsItBackBitForBit) {
    const auto x = biased_keys(iota32(90), some_bias(), 6);
    const HeadCodecs mixed({CodecId::tcq3, CodecId::turbo4});
    for (const Side side : {Side::key, Side::value})
        for (const HeadCodecs& codecs : {HeadCodecs(CodecId::turbo3), mixed, HeadCodecs(CodecId::turbo8)})
            for (const std::string& scales : {std::string(), side == Side::key ? letters() : ""})
                for (const int n : {20, 90}) {  // the offset is still measured, or it is not
                    SCOPED_TRACE(testing::Message()
                                 << to_string(codecs) << ' ' << n << (side == Side::key ? " keys " : " values ") << scales);
                    Window from(side, codecs, scales), to(side, codecs, scales);
                    from.write(x, 0, n);
                    const auto saved = from.save(n);
                    ASSERT_EQ(to.restore(saved), RestoreResult::ok);
                    int kept = 0;
                    for (std::int64_t row = 0; row < n; row++) {
                        const auto was = from.kv->exact_row(row, from.cells), is = to.kv->exact_row(row, to.cells);
                        if (!was) continue;
                        EXPECT_EQ(was, is) << row;
                        kept++;
                        if (packed_header(std::span(saved).subspan(row * kEmbd, kEmbd)))
                            EXPECT_TRUE(packed_header(std::span(saved).subspan(row * kEmbd, kEmbd))->residual);
                        else
                            EXPECT_TRUE(side == Side::key && n < 64) << "keys of which the offset is measured are saved in fp16";
                    }
                    EXPECT_EQ(kept, kSink + kRecent);
                    EXPECT_EQ(to.save(n), saved);
                }
}

// States of caches with fp16 windows, of other formats, or without windows, and the way back.
TEST_P(ResidualWindow, StatesGoBetweenWindowsOfAllKinds) {
    const auto x = biased_keys(iota32(90), some_bias(), 7);
    for (const Side side : {Side::key, Side::value})
        for (const CodecId codec : {CodecId::turbo3, CodecId::turbo2}) {
            SCOPED_TRACE(testing::Message() << codec_info(codec).name << (side == Side::key ? " keys" : " values"));
            Window f16(side, CodecId::turbo3, "", kHalves), bits(side), to_bits(side, codec), to_f16(side, codec, "", kHalves),
                to_none(side, codec, "", {0, 0, WindowForm::halves});
            f16.write(x, 0, 90), bits.write(x, 0, 90);
            ASSERT_EQ(to_bits.restore(f16.save(90)), RestoreResult::ok);
            Window::Errors e = to_bits.errors(x);
            EXPECT_EQ(e.n, kSink + kRecent);
            EXPECT_LT(e.kept, kMost * e.code + 1e-4 * e.n);
            EXPECT_GT(e.kept, kLeast * e.code);
            // What is kept becomes fp16 values: the error of both stays.
            const auto saved = bits.save(90);
            ASSERT_EQ(to_f16.restore(saved), RestoreResult::ok);
            e = to_f16.errors(x);
            EXPECT_EQ(e.n, kSink + kRecent);
            for (std::int64_t row = 0; row < 90; row++) {
                const auto was = bits.kv->exact_row(row, bits.cells), is = to_f16.kv->exact_row(row, to_f16.cells);
                ASSERT_EQ(was.has_value(), is.has_value()) << row;
                for (int i = 0; was && i < kEmbd; i++) EXPECT_NEAR((*is)[i], (*was)[i], 2e-3 * std::abs((*was)[i]) + 1e-3) << row;
            }
            // And on: a state of it brings back the same.
            const auto again = to_f16.save(90);
            Window second(side, codec, "", kHalves);
            ASSERT_EQ(second.restore(again), RestoreResult::ok);
            EXPECT_EQ(second.save(90), again);
            ASSERT_EQ(to_none.restore(saved), RestoreResult::ok);
            std::vector<float> row(kEmbd);
            double error = 0, size = 0;
            for (int i = 0; i < 90; i++) {
                to_none.kv->read_row(i, to_none.cells, row);
                for (int k = 0; k < kEmbd; k++)
                    error += std::pow(row[k] - x[i * kEmbd + k], 2), size += side == Side::key ? 1 : std::pow(x[i * kEmbd + k], 2);
            }
            EXPECT_LT(error / size, codec == CodecId::turbo3 ? 0.04 : 0.15) << "of keys: beside the variance of what the offset leaves, 1";
        }
}

// A damaged row in a window is a zero vector, without a residual.
TEST_P(ResidualWindow, DamageIsZero) {
    const auto x = biased_keys(iota32(90), some_bias(), 7);
    for (const Side side : {Side::key, Side::value}) {
        Window from(side), to(side);
        from.write(x, 0, 90);
        auto saved = from.save(90);
        const auto row = std::span(saved).subspan(85 * kEmbd, kEmbd);
        const auto header = packed_header(row);
        ASSERT_TRUE(header && header->residual);
        const std::span<std::uint8_t> residual = packed_residual(row, *header);
        residual[residual_bytes(kDim) - 1] = 0x7c;  // its scale is infinite
        EXPECT_EQ(to.restore(saved), RestoreResult::damaged);
        std::vector<float> is(kEmbd, 1);
        EXPECT_FALSE(to.kv->exact_row(85, to.cells));
        EXPECT_TRUE(to.kv->exact_row(84, to.cells));
        to.kv->read_row(85, to.cells, is);
        if (side == Side::value) {
            EXPECT_EQ(is, std::vector<float>(kEmbd));
        }
    }
}

TEST_P(ResidualWindow, IsCounted) {
    Window none(Side::value, CodecId::turbo3, "", {kSink, 0, WindowForm::residual}), some(Side::value);
    const double bits = 8.0 * static_cast<double>(some.kv->format_bytes() - none.kv->format_bytes()) / (2.0 * kEmbd * kRecent);
    EXPECT_EQ(bits, 4 + 16.0 / kDim);
    const auto x = biased_keys(iota32(90), some_bias(), 8);
    some.write(x, 0, 90);
    EXPECT_EQ(some.kv->exact()->bytes(), (kSink + kRecent) * (kEmbd / 2 + 2 * kHeads)) << "of one stream";
}

// Attention sees what is kept: with all cells in the window the output has the error of 2 + 4 bits, not of 2.
TEST_P(ResidualWindow, IsWhatAttentionSees) {
    constexpr int n = 70, n_tokens = 3;
    const auto k = biased_keys(iota32(n), some_bias(), 9), v = biased_keys(iota32(n), std::vector<float>(kEmbd), 10);
    std::vector<float> q = biased_keys(iota32(n_tokens), std::vector<float>(kEmbd), 11);
    std::vector<std::uint16_t> mask(static_cast<std::size_t>(n_tokens) * n);
    for (int t = 0; t < n_tokens; t++)
        for (int j = n - n_tokens + t + 1; j < n; j++) mask[t * n + j] = kMaskHidden;
    const auto attend = [&](CodecId codec, WindowSizes windows) {
        CellPositions cells(kCells, 1);
        LayerCache layer(cells);
        std::vector<std::uint8_t> memory[2];
        for (const Side side : {Side::key, Side::value}) {
            const KvGeometry g{side, codec, default_norm_mode(side), kEmbd, kCells, 1, kOutlierRatio, windows};
            auto& m = memory[side == Side::key];
            m.resize(reserved_bytes(g) + 64);
            auto* aligned = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(m.data()) + 63) / 64 * 64);
            layer.set_tensor(g, OverStores::current == StoreKind::cpu ? cpu_store_in(aligned) : StoreFactory([](const Layout& layout) {
                                 return std::make_unique<SpecStore>(layout);
                             }));
        }
        layer.bind(Side::key, kDim, {}), layer.bind(Side::value, kDim, {});
        layer.set_rope(rope());
        SerialExecutor executor;
        CacheContext ctx;
        ctx.store.executor = &executor;
        layer.write_keys(ctx, {k.data(), kEmbd, iota64(n), {}, {}}, iota32(n));
        layer.write_values(ctx, {v.data(), kEmbd, iota64(n), {}, {}});
        std::vector<float> out(q.size());
        AttentionArgs a;
        a.n_head = a.n_head_kv = kHeads, a.n_tokens = n_tokens, a.n_kv = n, a.v_dim_out = kDim, a.scale = 0.05f;
        a.q_token_stride = a.out_token_stride = kEmbd, a.q_head_stride = a.out_head_stride = kDim;
        a.mask_token_stride = n;
        const StreamQuery query{q.data(), out.data(), mask.data(), mask.data()};
        EXPECT_EQ(layer.attend(ctx, a, 0, {&query, 1}), nullptr);
        return out;
    };
    const std::vector<float> exact = attend(CodecId::raw, {0, 0, WindowForm::halves});
    const auto error = [&](const std::vector<float>& out) {
        double e = 0, size = 0;
        for (std::size_t i = 0; i < out.size(); i++) e += std::pow(out[i] - exact[i], 2), size += std::pow(exact[i], 2);
        return e / size;
    };
    constexpr WindowForm residual = WindowForm::residual;
    const double codes = error(attend(CodecId::turbo2, {0, 0, residual})), some = error(attend(CodecId::turbo2, {2, 20, residual})),
                 all = error(attend(CodecId::turbo2, {2, n, residual})), f16 = error(attend(CodecId::turbo2, {2, n, WindowForm::halves}));
    EXPECT_GT(codes, 0.01);
    EXPECT_LT(some, 0.8 * codes);
    EXPECT_LT(all, 0.03 * codes);
    EXPECT_GT(all, 0.003 * codes);
    EXPECT_LT(f16, 1e-6);
}
