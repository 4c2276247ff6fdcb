// Helpers of the codec tests: deterministic vectors and a hash to pin bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/random.h"

namespace turboquant::test {

inline std::vector<float> gaussian(SplitMix64& random, int n) {
    std::vector<float> x(n);
    for (float& v : x) v = static_cast<float>(random.normal());
    return x;
}

inline std::vector<std::uint8_t> random_bytes(SplitMix64& random, std::size_t n) {
    std::vector<std::uint8_t> bytes(n);
    for (auto& b : bytes) b = static_cast<std::uint8_t>(random.bits());
    return bytes;
}

inline double dot(std::span<const float> a, std::span<const float> b) {
    double s = 0;
    for (std::size_t i = 0; i < a.size(); ++i) s += static_cast<double>(a[i]) * b[i];
    return s;
}

/// |a - b|^2 / |a|^2
inline double relative_error(std::span<const float> a, std::span<const float> b) {
    double e = 0;
    for (std::size_t i = 0; i < a.size(); ++i) e += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    return e / dot(a, a);
}

/// FNV-1a, 64 bits.
inline std::uint64_t hash(std::span<const std::uint8_t> bytes) {
    std::uint64_t h = 0xcbf29ce484222325u;
    for (std::uint8_t b : bytes) h = (h ^ b) * 0x100000001b3u;
    return h;
}

inline std::string hex(std::span<const std::uint8_t> bytes) {
    std::string s;
    char two[3];
    for (std::uint8_t b : bytes) {
        std::snprintf(two, sizeof two, "%02x", b);
        s += two;
    }
    return s;
}

/// Every codec with every head size; composites have tests of their own (composite_test.cpp).
inline std::vector<std::pair<CodecId, int>> codecs_and_sizes() {
    std::vector<std::pair<CodecId, int>> all;
    for (const CodecInfo& c : kCodecs)
        for (int d : kHeadDims)
            if (!is_composite(c.id)) all.emplace_back(c.id, d);
    return all;
}

}  // namespace turboquant::test
