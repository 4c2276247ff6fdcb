// The encoder on a GPU against the CPU's, over one grid driven by the list of codecs, compared in row form; rows out and in, decoding,
// context shift, concurrent appends, graphs.
#include <gtest/gtest.h>

#include "tests/cuda/encode_batch.h"

#ifdef TQ_HAS_CUDA
namespace turboquant::cuda::test {
namespace {

class GpuEncode : public Gpu, public testing::WithParamInterface<CodecId> {
  protected:
    CodecId codec() const { return GetParam(); }
    int bits() const { return codec_info(codec()).bits; }
    bool trellis() const { return codec_info(codec()).family == Family::trellis; }
    bool rotated() const { return codec_info(codec()).rotated; }

    void compare(Batch& b) {
        ok(encode(b.plan, b.args(), nullptr));
        ok(cudaDeviceSynchronize());
        EXPECT_EQ(b.bad.read()[0], 0u);
        const std::vector<std::uint8_t> now = b.tiles.read(), got = b.rows(), cpu = b.rows_of_cpu();
        ASSERT_EQ(got, b.rows_on_host(now)) << "rows out";
        const std::size_t r = row_bytes(codec(), b.shape.head_dim), n = got.size() / r, code_bytes = r - (rotated() ? 2 : 0);
        std::size_t equal = 0, codes_equal = 0;
        for (std::size_t i = 0; i < n; ++i) {
            equal += std::equal(got.begin() + i * r, got.begin() + (i + 1) * r, cpu.begin() + i * r);
            codes_equal += std::equal(got.begin() + i * r, got.begin() + i * r + code_bytes, cpu.begin() + i * r);
        }
        total += n, total_codes += codes_equal, total_equal += equal;
        // Near ties may go the other way; at 8 bits there are many.
        EXPECT_GE(codes_equal, n - n / 25 - 1);
        const std::vector<float> source = b.source(), a = b.decode(got), c = b.decode(cpu);
        const double e = squared(a, source), e_cpu = squared(c, source);
        EXPECT_NEAR(e, e_cpu, 1e-3 * e_cpu + 1e-12);
        // Cells beside the batch are as they were.
        std::vector<std::uint8_t> row(r), before(r);
        for (std::int64_t cell = 0; cell < static_cast<std::int64_t>(b.n_tiles) * 64; cell += 5) {
            if (std::ranges::find(b.cells, cell) != b.cells.end()) continue;
            for (std::size_t h = 0; h < kHeads; ++h) {
                fragment_get_row(b.shape, now.data() + cell / 64 * b.stride + h * b.tile, static_cast<int>(cell % 64), row.data());
                fragment_get_row(b.shape, b.old.data() + cell / 64 * b.stride + h * b.tile, static_cast<int>(cell % 64), before.data());
                ASSERT_EQ(row, before) << cell;
            }
        }
        // Same input, same bytes.
        b.tiles.write(b.old);
        ok(encode(b.plan, b.args(), nullptr));
        ASSERT_EQ(b.tiles.read(), now) << "again";
    }
    std::size_t total = 0, total_codes = 0, total_equal = 0;
};

TEST_P(GpuEncode, EqualsTheCpu) {
    for (const int d : kHeadDims)
        for (const Side side : {Side::key, Side::value}) {
            const bool key = side == Side::key;
            const Options all[] = {{.n = 1},
                                   {.n = 7, .offset = key, .scales = key},
                                   {.n = 64, .half = true, .scattered = true},
                                   {.n = 64, .mode = NormMode::eden},
                                   {.n = 1000, .offset = key, .mode = key ? NormMode::corrected : NormMode::eden},
                                   {.n = 1000, .half = true, .mode = NormMode::plain},
                                   {.n = 1000, .scattered = true}};
            for (const Options& o : all) {
                SCOPED_TRACE(std::to_string(d) + (key ? " key " : " value ") + std::to_string(o.n) + (o.half ? " half" : "") +
                             (o.scattered ? " scattered" : "") + (o.offset ? " offset" : ""));
                if (o.scattered && o.n == 1000 && trellis() && d > 128) continue;
                Batch b({codec(), side, d}, o);
                compare(b);
                if (HasFatalFailure()) return;
            }
        }
    std::cout << codec_info(codec()).name << ": " << total << " vectors, codes equal to the CPU's in " << total_codes << ", and scales in "
              << total_equal << "\n";
}

// Large batches: whole tiles, blocks of 64 tokens, and the tiles at both ends.
TEST_P(GpuEncode, WholeTiles) {
    for (const Side side : {Side::key, Side::value})
        for (const int d : {128, 80}) {
            Batch b({codec(), side, d}, {.n = 9000, .half = true});
            compare(b);
        }
}

TEST_P(GpuEncode, RowsInAreRowsOut) {
    for (const Side side : {Side::key, Side::value})
        for (const int d : {64, 80, 128, 576}) {
            Batch b({codec(), side, d}, {.n = 100, .scattered = true});
            ok(encode(b.plan, b.args(), nullptr));
            const std::vector<std::uint8_t> rows = b.rows(), now = b.tiles.read();
            b.tiles.write(b.old);
            DeviceArray<std::uint8_t> in(rows);
            ok(set_rows(b.plan, b.d_cells.get(), b.o.n, in.get(), b.plan.row_bytes, nullptr));
            ASSERT_EQ(b.tiles.read(), now);
        }
}

TEST_P(GpuEncode, DecodesAsTheCpu) {
    for (const Side side : {Side::key, Side::value})
        for (const int d : kHeadDims) {
            Batch b({codec(), side, d}, {.n = 40, .offset = side == Side::key, .scales = side == Side::key});
            ok(encode(b.plan, b.args(), nullptr));
            const std::vector<float> expected = b.decode(b.rows());
            DeviceArray<float> out(expected.size());
            DecodeArgs a;
            a.cells = b.d_cells.get(), a.n = b.o.n, a.out = out.get(), a.out_is_half = false, a.token_stride = kHeads * b.d,
            a.head_stride = b.d;
            ok(decode_rows(b.plan, a, nullptr));
            double energy = 0;
            for (const float v : expected) energy += static_cast<double>(v) * v;
            EXPECT_LT(squared(out.read(), expected), 1e-10 * energy) << d;
            if (side == Side::value) continue;
            // With the offset and the scales given back: the input, but for the quantization error.
            a.scales = b.d_scales.get(), a.turns = b.d_turns.get(), a.offsets = b.d_offsets.get(), a.offset_ids = b.d_ids.get();
            a.offset_stride = kHeads * 2 * b.d;
            ok(decode_rows(b.plan, a, nullptr));
            double x2 = 0;
            for (const float v : b.x) x2 += static_cast<double>(v) * v;
            EXPECT_LT(squared(out.read(), b.x), bits() >= 3 ? 1.0 * x2 : 6 * x2) << d;
        }
}

// A shift is decoding, turning, encoding: the error grows by one more quantization and no more.
TEST_P(GpuEncode, Shift) {
    const int d = 128;
    Batch b({codec(), Side::key, d}, {.n = 100});
    ok(encode(b.plan, b.args(), nullptr));
    std::vector<float> turned = b.decode(b.rows());
    const RopeLayout rope{.n_dims = 64, .n_offset = 16, .adjacent = true};
    std::vector<double> frequencies;
    for (int i = 0; i < 32; ++i) frequencies.push_back(std::pow(1e4, -i / 32.0));
    const DeviceArray<float> digits(make_turns(frequencies));
    std::vector<std::int32_t> shifts(b.o.n);
    for (int i = 0; i < b.o.n; ++i) shifts[i] = i * 977 % 70001;
    const DeviceArray<std::int32_t> d_shifts(shifts);
    DeviceArray<float> turns(b.o.n * 2 * d), workspace(b.o.n * kHeads * d);
    ok(spread_turns(digits.get(), 32, rope, d, d_shifts.get(), b.o.n, turns.get(), nullptr));
    ok(rotate_rows(b.plan, b.d_cells.get(), b.o.n, turns.get(), rope, workspace.get(), b.bad.get(), nullptr));
    double energy = 0;
    for (int i = 0; i < b.o.n; ++i)
        for (int h = 0; h < kHeads; ++h)
            for (int k = 0; k < 32; ++k) {
                float* p = turned.data() + (i * kHeads + h) * d + 16 + 2 * k;
                const double angle = shifts[i] * frequencies[k], c = std::cos(angle), s = std::sin(angle), u = p[0], v = p[1];
                p[0] = static_cast<float>(u * c - v * s), p[1] = static_cast<float>(v * c + u * s);
            }
    for (const float v : turned) energy += static_cast<double>(v) * v;
    EXPECT_LT(squared(workspace.read(), turned), 1e-9 * energy);
    const double error = squared(b.decode(b.rows()), turned) / energy;
    const double one[] = {0, .5, .16, .045, .0125, .0035, .0009, 1, 1e-4};
    EXPECT_LT(error, rotated() ? one[bits()] : 1e-6);
}

TEST_P(GpuEncode, NotFiniteBecomesZero) {
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
        Batch b({codec(), Side::value, 128}, {.n = 5});
        std::vector<float> x = b.x;
        x[3 * kHeads * b.d + 7] = bad;
        b.d_x.write(x);
        ok(encode(b.plan, b.args(), nullptr));
        EXPECT_EQ(b.bad.read()[0], 1u);
        const std::vector<float> y = b.decode(b.rows());
        for (std::size_t k = 0; k < b.d; ++k) EXPECT_EQ(y[3 * kHeads * b.d + k], 0.0f);
        for (std::size_t k = 0; k < b.d; ++k) EXPECT_NE(y[2 * kHeads * b.d + k], 0.0f);
    }
}

TEST_P(GpuEncode, Graph) {
    Batch b({codec(), Side::value, 128}, {.n = 33});
    ok(encode(b.plan, b.args(), nullptr));
    const std::vector<std::uint8_t> now = b.tiles.read();
    b.tiles.write(b.old);
    cudaStream_t stream;
    ok(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    ok(encode(b.plan, b.args(), stream));
    ok(cudaStreamEndCapture(stream, &graph));
    ok(cudaGraphInstantiate(&exec, graph, 0));
    ok(cudaGraphLaunch(exec, stream));
    ok(cudaStreamSynchronize(stream));
    EXPECT_EQ(b.tiles.read(), now);
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
}

// Each token in a launch of its own, on two streams at once: words that tokens share take the bits of all.
TEST_P(GpuEncode, ConcurrentAppends) {
    Batch b({codec(), Side::value, 128}, {.n = 64});
    ok(encode(b.plan, b.args(), nullptr));
    const std::vector<std::uint8_t> now = b.tiles.read();
    b.tiles.write(b.old);
    cudaStream_t streams[2];
    for (cudaStream_t& s : streams) ok(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    ok(cudaDeviceSynchronize());
    for (int i = 0; i < 64; ++i) {
        EncodeArgs a = b.args();
        a.x = b.d_x.get() + i * kHeads * b.d, a.cells += i, a.n = 1;
        ok(encode(b.plan, a, streams[i % 2]));
    }
    ok(cudaDeviceSynchronize());
    EXPECT_EQ(b.tiles.read(), now);
    for (cudaStream_t& s : streams) cudaStreamDestroy(s);
}

TEST_F(Gpu, EncodeRefusesByName) {
    Device device;
    ok(query_device(0, device));
    DeviceArray<std::uint8_t> memory(1 << 20);
    EncodePlan plan;
    const auto refused = [&](TileShape s) {
        const TileView view{s, memory.get(), 1 << 14, 1 << 15, nullptr};
        return plan_encode(view, 2, NormMode::plain, device, memory.get(), nullptr, plan).message();
    };
    EXPECT_NE(refused({CodecId::outlier3, Side::key, 128, 16}).find("composite"), std::string::npos);
    EXPECT_NE(refused({CodecId::turbo4, Side::key, 100}).find("head size"), std::string::npos);
}

// Formats that differ between heads, in one launch.
TEST_F(Gpu, EncodeHeadsOfDifferentFormats) {
    const CodecId codecs[] = {CodecId::turbo4, CodecId::tcq3, CodecId::turbo2, CodecId::tcq2};
    const int d = 128, n = 100;
    std::vector<HeadTiles> heads;
    std::size_t stride = 0;
    for (const CodecId c : codecs) heads.push_back({c, stride}), stride += tile_bytes({c, Side::key, d});
    SplitMix64 random(3);
    std::vector<float> x(n * 4 * d);
    for (float& f : x) f = static_cast<float>(random.normal());
    std::vector<std::int64_t> cells(n);
    for (int i = 0; i < n; ++i) cells[i] = i;
    DeviceArray<std::uint8_t> tiles(std::vector<std::uint8_t>(2 * stride));
    const TileView view{{codecs[0], Side::key, d}, tiles.get(), 0, stride, heads.data()};
    DeviceArray<std::uint8_t> memory(encode_plan_bytes(view, 4));
    const DeviceArray<float> d_x(x);
    const DeviceArray<std::int64_t> d_cells(cells);
    DeviceArray<std::uint32_t> bad(1);
    Device device;
    ok(query_device(0, device));
    EncodePlan plan;
    ok(plan_encode(view, 4, NormMode::corrected, device, memory.get(), nullptr, plan));
    EncodeArgs a;
    a.x = d_x.get(), a.token_stride = 4 * d, a.head_stride = d, a.cells = d_cells.get(), a.n = n, a.not_finite = bad.get();
    ok(encode(plan, a, nullptr));
    const std::vector<std::uint8_t> now = tiles.read();
    for (int h = 0; h < 4; ++h) {
        const TileShape s{codecs[h], Side::key, d};
        std::vector<std::uint8_t> cpu(tile_bytes(s)), row(row_bytes(codecs[h], d)), other(row.size());
        int equal = 0;
        for (int i = 0; i < n; ++i) {
            tile_encode(s, cpu.data(), i % 64, {x.data() + (i * 4 + h) * d, d});
            tile_get_row(s, cpu.data(), i % 64, row.data());
            fragment_get_row(s, now.data() + i / 64 * stride + heads[h].at, i % 64, other.data());
            equal += std::equal(row.begin(), row.end() - 2, other.begin());
        }
        EXPECT_GE(equal, n - 3) << codec_info(codecs[h]).name;
    }
}

INSTANTIATE_TEST_SUITE_P(Codecs, GpuEncode, testing::ValuesIn([] {
                             std::vector<CodecId> ids;
                             for (const CodecInfo& c : kCodecs)
                                 if (has_fragment_order(c.id)) ids.push_back(c.id);
                             return ids;
                         }()),
                         [](const auto& i) { return std::string(codec_info(i.param).name); });

}  // namespace
}  // namespace turboquant::cuda::test
#endif
