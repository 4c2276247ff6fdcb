// What the cache takes: the size declared to llama.cpp, the formula, and the memory of the process while a context fills.
#include <malloc.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "tests/ggml/support.h"
#include "turboquant/codec/tile.h"

namespace turboquant::conformance {
namespace {

constexpr int kLayers = 6, kHeads = 2, kHeadDim = 64;  // of the demo model

/// Large blocks always come as fresh pages: none is in RAM from the context before.
[[maybe_unused]] const int kFreshPages = mallopt(M_MMAP_THRESHOLD, 1 << 16);

/// Bytes of n cells: tiles of 64 cells for keys and values of every head and layer, four bytes per cell for its position and
/// offset id, and an offset in fp16 for the keys of every layer.
size_t formula(const std::string& name, size_t n) {
    const CodecId codec = *find_codec(name);
    const size_t tiles = (n + kTileKeys - 1) / kTileKeys;
    return tiles * kLayers * kHeads * (tile_bytes({codec, Side::key, kHeadDim}) + tile_bytes({codec, Side::value, kHeadDim})) + 4 * n +
           (codec_info(codec).rotated ? 2 * kLayers * kHeads * kHeadDim : 0);
}

size_t f16_bytes(size_t n) { return n * kLayers * kHeads * kHeadDim * 2 * sizeof(uint16_t); }

/// Anonymous memory of the process that is in RAM (files mapped, as the model is, do not count).
size_t resident_bytes() {
    malloc_trim(0);
    std::ifstream in("/proc/self/smaps_rollup");  // counted page by page: figures in "status" may be some pages late on each processor
    for (std::string line; std::getline(in, line);)
        if (line.starts_with("Anonymous:")) return static_cast<size_t>(std::stoull(line.substr(10))) * 1024;
    return 0;
}

/// The KV buffer sizes that llama.cpp logs, in MiB.
double logged_kv_mib(const std::string& log) {
    const std::string words = "KV buffer size = ";
    double mib = 0;
    for (size_t at = log.find(words); at != log.npos; at = log.find(words, at + 1)) mib += std::stod(log.substr(at + words.size()));
    return mib;
}

class Memory : public testing::TestWithParam<std::string> {};

TEST_P(Memory, BufferIsWhatTheFormulaSays) {
    const uint32_t n_ctx = 4096;
    const std::string name = compressed(GetParam());
    const turboquant_kv_stats none = kv_stats(name);
    EXPECT_EQ(none.n_tensors, 0u);
    take_log();
    ContextPtr ctx = make_context(demo(name), {.n_ctx = n_ctx});
    const double logged = logged_kv_mib(take_log()) * (1 << 20);
    feed(ctx.get(), text_tokens(demo(name), 100));
    const turboquant_kv_stats s = kv_stats(name);
    EXPECT_EQ(s.n_tensors, 2u * kLayers);
    EXPECT_EQ(s.format_bytes, formula(GetParam(), n_ctx));
    EXPECT_EQ(s.f16_bytes, static_cast<double>(f16_bytes(n_ctx)));
    EXPECT_NEAR(s.bits_per_value, 16 * static_cast<double>(s.format_bytes) / s.f16_bytes, 1e-6);
    EXPECT_GE(s.reserved_bytes, s.format_bytes);
    EXPECT_LE(s.reserved_bytes, 1.05 * s.format_bytes) << "the worst case over head sizes must not be far from the case at hand";
    EXPECT_NEAR(logged, s.format_bytes, 0.03 * s.format_bytes + 0.01 * (1 << 20));
    if (GetParam() == "turbo4") {
        EXPECT_LE(logged, 0.27 * s.f16_bytes);
    }
    // 100 of 4,096 cells: two tiles of each stream of tiles, rounded up to pages.
    const size_t pages = 2 * kLayers * 2 * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    EXPECT_LE(s.touched_bytes, formula(GetParam(), 128) + pages + 4 * n_ctx);
    EXPECT_GE(s.touched_bytes, formula(GetParam(), 100) / 2);
    ctx.reset();
    EXPECT_EQ(kv_stats(name).n_tensors, 0u) << "freed with the context";
}

constexpr size_t kFirst = 512;

/// Growth of the process from the first batch to a full context.
double growth(const std::string& name, uint32_t n_ctx, turboquant_kv_stats* stats) {
    llama_model* model = demo(name);
    const ContextPtr ctx = make_context(model, {.n_ctx = n_ctx, .n_ubatch = kFirst});
    const std::vector<llama_token> tokens = random_tokens(llama_vocab_n_tokens(llama_model_get_vocab(model)), static_cast<int>(n_ctx), 5);
    feed(ctx.get(), std::span(tokens).first(kFirst), 0, 0, kFirst);
    const auto before = static_cast<double>(resident_bytes());
    feed(ctx.get(), std::span(tokens).subspan(kFirst), static_cast<llama_pos>(kFirst), 0, kFirst);
    const double after = static_cast<double>(resident_bytes());
    if (stats) *stats = kv_stats(name);
    return after - before;
}

class MemoryGrowth : public testing::TestWithParam<std::string> {};

TEST_P(MemoryGrowth, AFullContextTakesTheFormulaAndNothingElse) {
    if (std::string(TQ_SANITIZERS) != "") GTEST_SKIP() << "sanitizers keep memory of their own";
    const uint32_t n_ctx = 4096;
    // llama.cpp touches all of its f16 cache when it clears it, so what grows there is all but the cache: the mask, bookkeeping.
    static const double others = growth("f16", n_ctx, nullptr);
    turboquant_kv_stats s{};
    const double grown = growth(compressed(GetParam()), n_ctx, &s) - others;
    const double expected = static_cast<double>(s.format_bytes) * (n_ctx - kFirst) / n_ctx;
    EXPECT_LE(grown, 1.03 * expected + (1 << 17));
    EXPECT_GE(grown, 0.97 * expected - (1 << 20)) << "llama.cpp's own attention takes some scratch with f16 that it does not with us";
    EXPECT_LE(s.touched_bytes, 1.03 * static_cast<double>(s.format_bytes) + (1 << 18));
    EXPECT_GE(s.touched_bytes, 0.97 * static_cast<double>(s.format_bytes));
}

INSTANTIATE_TEST_SUITE_P(Formats, Memory, testing::ValuesIn(kFormats), [](const auto& test) { return test.param; });
INSTANTIATE_TEST_SUITE_P(Formats, MemoryGrowth, testing::Values("turbo4", "raw"), [](const auto& test) { return test.param; });

TEST(MemoryOfContexts, ClearGivesMemoryBack) {
    const ContextPtr ctx = make_context(demo("turbo4"), {.n_ctx = 4096});
    feed(ctx.get(), random_tokens(1000, 2048, 1));
    const size_t full = kv_stats("turbo4").touched_bytes;
    llama_memory_clear(llama_get_memory(ctx.get()), true);
    const size_t empty = kv_stats("turbo4").touched_bytes;
    EXPECT_GT(full, formula("turbo4", 2000));
    EXPECT_LT(empty, 5 * 4096 + 65536u);
}

}  // namespace
}  // namespace turboquant::conformance
