// A cache of keys with a constant part, for the tests of key offsets and of scales.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "tests/cache/stores.h"

namespace turboquant::test {

inline constexpr int kHeads = 2, kDim = 64, kEmbd = kHeads * kDim;

inline RopeParams rope() {
    RopeParams p;
    p.n_dims = kDim;
    return p;
}

/// Keys with a constant part `bias` before RoPE, at positions pos[i].
inline std::vector<float> biased_keys(const std::vector<std::int32_t>& pos, const std::vector<float>& bias, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(pos.size() * kEmbd), table(kDim);
    for (std::size_t i = 0; i < pos.size(); i++) {
        for (int j = 0; j < kEmbd; j++) x[i * kEmbd + j] = bias[j] + normal(rng);
        rope_table(rope(), static_cast<float>(pos[i]), table);
        for (int h = 0; h < kHeads; h++) rope_apply(rope(), table, std::span(x).subspan(i * kEmbd + h * kDim, kDim));
    }
    return x;
}

inline std::vector<float> some_bias() {
    std::vector<float> b(kEmbd);
    for (int i = 0; i < kEmbd; i++) b[i] = i % 7 == 0 ? 20.0f : 0.5f * std::sin(static_cast<float>(i));
    return b;
}

inline std::vector<std::int32_t> iota32(int n, int first = 0) {
    std::vector<std::int32_t> v(n);
    std::iota(v.begin(), v.end(), first);
    return v;
}
inline std::vector<std::int64_t> iota64(int n, int first = 0) {
    std::vector<std::int64_t> v(n);
    std::iota(v.begin(), v.end(), first);
    return v;
}

struct Cache {
    explicit Cache(const HeadCodecs& codec, bool offset = true, const std::string& scales = "")
        : g{Side::key, codec, NormMode::corrected, kEmbd, 512, 2}, kv(g, kDim) {
        if (offset) kv->enable_offset(), kv->offset()->set_rope(rope());
        if (!scales.empty()) kv->offset()->set_scales(scales);
    }
    bool write(const std::vector<float>& x, const std::vector<std::int64_t>& rows, const std::vector<std::int32_t>& pos, int from = 0) {
        cells.place(rows, pos);
        return kv->encode_keys(serial(), {x.data() + from * kEmbd, kEmbd, rows, {}, {}}, cells);
    }
    std::vector<std::uint16_t> save(int first, int n) {
        std::vector<std::uint16_t> out(n * kEmbd);
        for (int i = 0; i < n; i++) kv.save_row(first + i, cells, std::span(out).subspan(i * kEmbd, kEmbd));
        return out;
    }
    /// Mean squared error of what the cache holds against the keys written.
    double error(const std::vector<float>& x, int first, int n) const {
        std::vector<float> out(kEmbd);
        double e = 0;
        for (int i = 0; i < n; i++) {
            kv->read_row(first + i, cells, out);
            for (int j = 0; j < kEmbd; j++) e += std::pow(out[j] - x[i * kEmbd + j], 2);
        }
        return e / (n * kEmbd);
    }
    KvGeometry g;
    CellPositions cells{512, 2};
    HeldTensor kv;
};

}  // namespace turboquant::test
