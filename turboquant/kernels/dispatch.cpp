#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/attention/turns.h"
#include "turboquant/codec/composite.h"
#include "turboquant/kernels/kernel_table.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace turboquant {
namespace {

struct Level {
    SimdLevel level;
    std::string_view name;
    const Kernels* kernels;  // null: not compiled for this architecture
    bool (*usable)();
};

#if defined(__x86_64__) || defined(_M_X64)
constexpr const Kernels *kAvx2 = &kKernelsAvx2, *kAvx512 = &kKernelsAvx512, *kNeon = nullptr;
// Clang 14 knows no name for it in __builtin_cpu_supports. With AVX2 there, the system saves the registers.
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
bool has_neon() { return false; }
#elif defined(__aarch64__)
constexpr const Kernels *kAvx2 = nullptr, *kAvx512 = nullptr, *kNeon = &kKernelsNeon;
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#if defined(__linux__)
bool has_neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }  // NEON itself is always there, the dot products are not
#else
bool has_neon() { return true; }  // Apple: all have it
#endif
#else
constexpr const Kernels *kAvx2 = nullptr, *kAvx512 = nullptr, *kNeon = nullptr;
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_neon() { return false; }
#endif

const Level kLevels[] = {
    {SimdLevel::scalar, "scalar", &kKernelsScalar, [] { return true; }},
    {SimdLevel::neon, "neon", kNeon, has_neon},
    {SimdLevel::avx2, "avx2", kAvx2, has_avx2},
    {SimdLevel::avx512, "avx512", kAvx512, has_avx512},
};

std::vector<SimdLevel> levels(bool usable_only) {
    std::vector<SimdLevel> r;
    for (const Level& l : kLevels)
        if (l.kernels && (!usable_only || l.usable())) r.push_back(l.level);
    return r;
}

}  // namespace

std::string_view simd_level_name(SimdLevel level) { return kLevels[static_cast<int>(level)].name; }

std::span<const SimdLevel> available_simd_levels() {
    static const std::vector<SimdLevel> list = levels(true);
    return list;
}

std::span<const SimdLevel> compiled_simd_levels() {
    static const std::vector<SimdLevel> list = levels(false);
    return list;
}

std::optional<SimdLevel> find_simd_level(std::string_view name) {
    for (const Level& l : kLevels)
        if (l.name == name) return l.level;
    return std::nullopt;
}

const Kernels& kernels() { return kernels(available_simd_levels().back()); }

const Kernels& kernels(SimdLevel level) {
    std::string names;
    for (const SimdLevel l : available_simd_levels()) {
        if (l == level) return *kLevels[static_cast<int>(l)].kernels;
        names.append(names.empty() ? "" : ", ").append(simd_level_name(l));
    }
    throw std::invalid_argument("SIMD level '" + std::string(simd_level_name(level)) +
                                "' is not available on this machine; available: " + names);
}

SimdLevel kernels_level(const Kernels& k) { return k.level(); }

namespace {

bool encode_composites(const EncodeArgs& args) {
    const int d = args.shape.head_dim;
    std::vector<float> x(d);
    bool finite = true;
    for (int i = 0; i < args.n; ++i) {
        std::uint8_t* tile = args.tiles + args.cells[i] / kTileKeys * args.tile_stride;
        const int slot = static_cast<int>(args.cells[i] % kTileKeys);
        try {
            std::copy_n(args.x + i * args.x_stride, d, x.begin());
            if (args.turns && args.offsets[i]) {
                const float *offset = args.offsets[i] + args.offset_at, *turn = args.turns + static_cast<std::size_t>(i) * 2 * d;
                for (int k = 0; k < d; ++k) x[k] -= turned(offset, turn, d, k);
            }
            composite_encode(args.shape, tile, slot, x, args.norm_mode);
        } catch (const std::domain_error&) {
            std::ranges::fill(x, 0.0f);
            composite_encode(args.shape, tile, slot, x, args.norm_mode);
            finite = false;
        }
    }
    return finite;
}

}  // namespace

void to_halves(const Kernels& k, const float* x, std::size_t n, std::uint16_t* out) { k.to_halves(x, n, out); }

bool encode(const Kernels& k, const EncodeArgs& args) {
    if (is_composite(args.shape.codec)) return encode_composites(args);
    return k.encode(args, codec_tables(args.shape.codec, args.shape.head_dim));
}

void encode_residuals(const Kernels& k, const EncodeArgs& args, std::uint8_t* const* rows) {
    k.encode_residuals(args, rows, codec_tables(args.shape.codec, args.shape.head_dim), residual_tables(args.shape.head_dim));
}

}  // namespace turboquant
