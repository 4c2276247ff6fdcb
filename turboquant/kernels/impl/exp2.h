// 2^x and tanh(x) on registers.
#pragma once

namespace turboquant {
namespace {

// Relative error < 3e-7 (test: kernels.*exp2); results below 2^-126 become 0, x > 126 is cut off. The coefficients are those of the
// degree-6 Taylor series of 2^f, |f| <= 1/2: ln(2)^n / n!.
inline Simd::F exp2(Simd::F x) {
    x = Simd::min(Simd::max(x, Simd::splat(-127)), Simd::splat(126));
    const Simd::F n = Simd::round(x), f = Simd::sub(x, n);
    Simd::F p = Simd::splat(1.5403530e-4f);
    p = Simd::fma(p, f, Simd::splat(1.3333558e-3f));
    p = Simd::fma(p, f, Simd::splat(9.6181291e-3f));
    p = Simd::fma(p, f, Simd::splat(5.5504109e-2f));
    p = Simd::fma(p, f, Simd::splat(2.4022651e-1f));
    p = Simd::fma(p, f, Simd::splat(6.9314718e-1f));
    p = Simd::fma(p, f, Simd::splat(1));
    return Simd::scale_exp2(p, n);
}

inline float exp2(float x) {
    float lanes[Simd::kFloats];
    Simd::store(lanes, exp2(Simd::splat(x)));
    return lanes[0];
}

constexpr float kLog2e = 1.44269504f;

// 1 - 2/(e^2x + 1): absolute error < 1e-6, which a logit's cap of some tens multiplies.
inline Simd::F tanh(Simd::F x) {
    const Simd::F e = exp2(Simd::mul(x, Simd::splat(2 * kLog2e)));
    return Simd::sub(Simd::splat(1), Simd::div(Simd::splat(2), Simd::add(e, Simd::splat(1))));
}

}  // namespace
}  // namespace turboquant
