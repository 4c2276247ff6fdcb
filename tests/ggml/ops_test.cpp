// The two operations of a KV cache, SET_ROWS and FLASH_ATTN_EXT, in every combination that llama.cpp builds: against attention in double
// precision, and beside ggml's own CPU kernels over f16.
#include <cmath>
#include <map>
#include <ostream>

#include "tests/ggml/op_rig.h"

namespace turboquant::conformance {
namespace {

/// Relative error of attention over Gaussian keys and values: about sqrt(2 D) with D the codec's squared error per unit norm, because keys
/// and values contribute alike (scores of unit variance).
const std::map<std::string, double> kSquaredError = {{"turbo4", .0094},  {"turbo3", .0342},  {"turbo2", .1170}, {"turbo5", .0025},
                                                     {"turbo6", .00065}, {"turbo8", .00005}, {"tcq4", .0060},   {"tcq3", .0220},
                                                     {"tcq2", .0807},    {"tcq5", .0017},    {"tcq1", .2900}};

enum class Mask { none, causal, window, holes };

struct OpCase {
    const char* name;
    CacheShape shape;
    int n_head = 4, n_tokens = 1, written = 200;
    Mask mask = Mask::causal;
    float max_bias = 0, softcap = 0;
    bool sinks = false, rope = false;
};

void PrintTo(const OpCase& c, std::ostream* out) { *out << c.name; }

// Sizes are llama.cpp's: n_kv is padded to 256, cells that were not written are masked.
const OpCase kCases[] = {
    {"Decode", {128, 128, 2, 512, 1}, 8, 1, 300},
    {"Prefill", {128, 128, 2, 512, 1}, 8, 37, 300},
    {"OneCell", {128, 128, 2, 256, 1}, 4, 1, 1},
    {"NoMaskFullCache", {128, 128, 2, 256, 1}, 4, 2, 256, Mask::none},
    {"OneHeadEach", {128, 128, 4, 256, 1}, 4, 5},
    {"GroupOf7", {128, 128, 2, 256, 1}, 14, 3},
    {"Head64", {64, 64, 2, 256, 1}, 4, 9},
    {"Head80", {80, 80, 2, 256, 1}, 4, 9},
    {"Head96", {96, 96, 2, 256, 1}, 4, 9},
    {"Head112", {112, 112, 2, 256, 1}, 4, 9},
    {"Head192", {192, 192, 2, 256, 1}, 4, 9},
    {"Head256", {256, 256, 1, 256, 1}, 4, 9},
    {"Head512", {512, 512, 1, 256, 1}, 4, 3},
    {"KWiderThanV", {192, 128, 2, 256, 1}, 4, 9},
    {"VWiderThanK", {64, 128, 2, 256, 1}, 4, 9},
    {"MlaDecode", {576, 512, 1, 256, 1, true}, 8, 1},
    {"MlaPrefill", {576, 512, 1, 256, 1, true}, 8, 11},
    {"SlidingWindow", {128, 128, 2, 512, 1}, 4, 17, 500, Mask::window},
    {"Holes", {128, 128, 2, 512, 1}, 4, 17, 400, Mask::holes},
    {"SoftCap", {256, 256, 1, 256, 1}, 4, 9, 200, Mask::causal, 0, 2},
    {"Alibi", {128, 128, 4, 256, 1}, 4, 9, 200, Mask::causal, 8},
    {"AlibiTwelveHeads", {64, 64, 12, 256, 1}, 12, 3, 200, Mask::causal, 8},
    {"Sinks", {64, 64, 2, 256, 1}, 8, 9, 200, Mask::causal, 0, 0, true},
    {"SinksSlidingWindow", {64, 64, 2, 512, 1}, 8, 9, 500, Mask::window, 0, 0, true},
    {"ThreeStreams", {128, 128, 2, 256, 3}, 4, 1},
    {"ThreeStreamsPrefill", {64, 96, 2, 256, 3}, 4, 13},
    {"Rope", {128, 128, 2, 256, 1}, 4, 9, 200, Mask::causal, 0, 0, false, true},
    {"RopeStreams", {64, 64, 2, 256, 2}, 4, 9, 200, Mask::causal, 0, 0, false, true},
};

/// What is written and asked, the same for every device.
struct Scene {
    std::vector<int64_t> rows;
    std::vector<int32_t> pos;
    std::vector<float> k, v;     ///< in the order of writing
    std::vector<float> cache_v;  ///< by cell
    AttendOp attend;

    explicit Scene(const OpCase& c) {
        const CacheShape& s = c.shape;
        const size_t n = static_cast<size_t>(c.written) * s.n_streams;
        k = gaussian(n * s.n_embd_k(), 1), v = gaussian(n * s.n_embd_v(), 2);
        if (c.rope)  // a constant part before RoPE, as real keys have
            for (size_t i = 0; i < k.size(); i++) k[i] += 2 * std::sin(static_cast<float>(i % static_cast<size_t>(s.n_embd_k())));
        cache_v.resize(static_cast<size_t>(s.n_cells) * s.n_streams * s.n_embd_v());
        for (size_t i = 0; i < n; i++) {
            const size_t stream = i / static_cast<size_t>(c.written), at = i % static_cast<size_t>(c.written);
            rows.push_back(static_cast<int64_t>(stream * s.n_cells + at));
            pos.push_back(static_cast<int32_t>(at));
            std::copy_n(v.begin() + static_cast<long>(i) * s.n_embd_v(), s.n_embd_v(), cache_v.begin() + rows.back() * s.n_embd_v());
        }
        attend.n_head = c.n_head, attend.n_tokens = c.n_tokens, attend.n_kv = s.n_cells, attend.n_streams = s.n_streams;
        attend.scale = 1 / std::sqrt(static_cast<float>(s.k_dim));
        attend.max_bias = c.max_bias, attend.softcap = c.softcap;
        attend.q = gaussian(static_cast<size_t>(s.n_streams) * c.n_tokens * c.n_head * s.k_dim, 3);
        if (c.sinks) attend.sinks = gaussian(c.n_head, 4, 3);
        if (c.mask == Mask::none) return;
        for (int st = 0; st < s.n_streams; st++)
            for (int t = 0; t < c.n_tokens; t++) {
                const int at = c.written - c.n_tokens + t;
                for (int i = 0; i < s.n_cells; i++) {
                    const bool seen =
                        i <= at && !(c.mask == Mask::window && i <= at - 96) && !(c.mask == Mask::holes && i % 7 < 3 && i != at);
                    // With ALiBi llama.cpp's mask holds the distance.
                    attend.mask.push_back(!seen ? -INFINITY : c.max_bias > 0 ? static_cast<float>(i - at) : 0.0f);
                }
            }
    }

    /// Relative error of a device's attention.
    double error(const OpCase& c, const std::string& device_name) const {
        OpRig rig(device_name, c.shape);
        std::vector<float> written;
        const auto rope = c.rope ? std::optional<RopeOp>(RopeOp{c.shape.k_dim, 2}) : std::nullopt;
        const size_t n_k = c.shape.n_embd_k(), n_v = c.shape.n_embd_v();
        // In unequal parts, so that tiles are met half full.
        for (size_t at = 0, n = 150; at < rows.size(); at += n, n = 33) {
            n = std::min(n, rows.size() - at);
            const auto part = rig.write(std::span(rows).subspan(at, n), std::span(k).subspan(at * n_k, n * n_k),
                                        std::span(v).subspan(at * n_v, n * n_v), rope, std::span(pos).subspan(at, n));
            written.insert(written.end(), part.begin(), part.end());
        }
        std::vector<float> cache_k(static_cast<size_t>(c.shape.n_cells) * c.shape.n_streams * n_k);
        for (size_t i = 0; i < rows.size(); i++)
            std::copy_n(written.begin() + static_cast<long>(i * n_k), n_k, cache_k.begin() + rows[i] * static_cast<long>(n_k));
        return relative_error(rig.attend(attend), reference_attention(c.shape, attend, as_f16(cache_k), as_f16(cache_v)));
    }
};

class Ops : public testing::TestWithParam<OpCase> {};

/// Why a case is not for the device at hand, or null.
const char* not_served(const OpCase& c) {
    if (!on_gpu() || c.shape.k_dim == c.shape.v_dim) return nullptr;
    return "on a GPU heads of keys and values are of one size; others are refused when the context is made";
}

TEST_P(Ops, RawIsNoWorseThanGgmlsOwnF16) {
    if (const char* why = not_served(GetParam())) GTEST_SKIP() << why;
    const Scene scene(GetParam());
    const double raw = scene.error(GetParam(), "raw"), ggml = scene.error(GetParam(), "f16");
    EXPECT_LT(raw, 1e-5);
    EXPECT_LT(raw, 1.1 * ggml + 1e-6);
    EXPECT_LT(ggml, 3e-3);  // the reference is right
}

TEST_P(Ops, FormatsErrAsTheirCodecDoes) {
    const OpCase& c = GetParam();
    if (const char* why = not_served(c)) GTEST_SKIP() << why;
    const Scene scene(c);
    for (const auto& [name, squared] : kSquaredError) {
        const double error = scene.error(c, compressed(name));
        // With one cell only its value errs; a cap below the scores' spread hides a part of the keys' error; MLA's values are the keys.
        const double expected = std::sqrt((c.written == 1 ? 1 : 2) * squared);
        EXPECT_GT(error, 0.6 * expected) << name;
        EXPECT_LT(error, 1.35 * expected) << name;
    }
}

INSTANTIATE_TEST_SUITE_P(Grid, Ops, testing::ValuesIn(kCases), [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace turboquant::conformance
