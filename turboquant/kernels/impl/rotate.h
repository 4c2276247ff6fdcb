// The rotation of codec/rotation.h on registers.
#pragma once

namespace turboquant {
namespace {

template <int h, int n>
inline void butterflies(Simd::F (&v)[n]) {
    if constexpr (h < Simd::kFloats) {
        for (int i = 0; i < n; ++i) v[i] = Simd::butterfly<h>(v[i]);
        butterflies<2 * h>(v);
    } else if constexpr (h < n * Simd::kFloats) {
        constexpr int s = h / Simd::kFloats;
        for (int i = 0; i < n; ++i)
            if (!(i & s)) {
                const Simd::F a = v[i], b = v[i + s];
                v[i] = Simd::add(a, b);
                v[i + s] = Simd::sub(a, b);
            }
        butterflies<2 * h>(v);
    }
}

// out = WHT(x * signs), unnormalized, p values.
template <int p>
inline void walsh_hadamard(const float* x, const float* signs, float* out) {
    constexpr int n = p / Simd::kFloats;
    Simd::F v[n];
    for (int i = 0; i < n; ++i) v[i] = Simd::mul(Simd::load(x + i * Simd::kFloats), Simd::load(signs + i * Simd::kFloats));
    butterflies<1>(v);
    for (int i = 0; i < n; ++i) Simd::store(out + i * Simd::kFloats, v[i]);
}

inline void hartley(const CodecTables& t, float* y) {
    constexpr int max_odd = 9;
    for (int i = 0; i < t.pow2; i += Simd::kFloats) {
        Simd::F sum[max_odd];
        for (int l = 0; l < t.odd; ++l) {
            sum[l] = Simd::mul(Simd::splat(t.hartley[l * t.odd]), Simd::load(y + i));
            for (int j = 1; j < t.odd; ++j)
                sum[l] = Simd::fma(Simd::splat(t.hartley[l * t.odd + j]), Simd::load(y + j * t.pow2 + i), sum[l]);
        }
        for (int l = 0; l < t.odd; ++l) Simd::store(y + l * t.pow2 + i, sum[l]);
    }
}

// y = scale * signs_b * T * signs_a * x. Forward: a = in, b = out. x and y may be the same.
inline void rotate(const CodecTables& t, const float* x, float* y, float scale, bool inverse) {
    const float *a = inverse ? t.signs_out : t.signs_in, *b = inverse ? t.signs_in : t.signs_out;
    for (int l = 0; l < t.odd; ++l) {
        const int o = l * t.pow2;
        switch (t.pow2) {
            case 16:
                walsh_hadamard<16>(x + o, a + o, y + o);
                break;
            case 32:
                walsh_hadamard<32>(x + o, a + o, y + o);
                break;
            case 64:
                walsh_hadamard<64>(x + o, a + o, y + o);
                break;
            case 128:
                walsh_hadamard<128>(x + o, a + o, y + o);
                break;
            case 256:
                walsh_hadamard<256>(x + o, a + o, y + o);
                break;
            case 512:
                walsh_hadamard<512>(x + o, a + o, y + o);
                break;
        }
    }
    if (t.odd > 1) hartley(t, y);
    const Simd::F s = Simd::splat(scale * t.rotation_norm);
    for (int i = 0; i < t.head_dim; i += Simd::kFloats) Simd::store(y + i, Simd::mul(Simd::load(y + i), Simd::mul(s, Simd::load(b + i))));
}

}  // namespace
}  // namespace turboquant
