// A batch of vectors and its tiles on a GPU, with what the CPU's encoder makes of it.
#pragma once

#include "tests/cuda/support.h"

#ifdef TQ_HAS_CUDA
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <vector>

#include "turboquant/attention/turns.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/codec/random.h"
#include "turboquant/cuda/encode.h"
#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/rows.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant::cuda::test {

inline void ok(const Status& s) { ASSERT_TRUE(s.ok()) << s.message(); }
inline void ok(cudaError_t e) { ASSERT_EQ(e, cudaSuccess) << cudaGetErrorString(e); }

template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(std::size_t n) : n_(n) { ok(cudaMalloc(reinterpret_cast<void**>(&p_), std::max<std::size_t>(1, n) * sizeof(T))); }
    explicit DeviceArray(const std::vector<T>& v) : DeviceArray(v.size()) { write(v); }
    ~DeviceArray() { cudaFree(p_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    T* get() const { return p_; }
    void write(const std::vector<T>& v) { ok(cudaMemcpy(p_, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> read() const {
        std::vector<T> v(n_);
        ok(cudaMemcpy(v.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }

  private:
    T* p_ = nullptr;
    std::size_t n_;
};

constexpr int kHeads = 2;

struct Options {
    int n = 1;
    bool offset = false, scales = false, half = false, scattered = false;
    NormMode mode = NormMode::corrected;
};

// A batch on both sides.
struct Batch {
    TileShape shape;
    Options o;
    std::size_t d, tile, stride;
    std::vector<std::int64_t> cells;
    std::vector<float> x, scales, turns, offsets;
    std::vector<std::uint16_t> halves;
    std::vector<std::int32_t> ids;
    std::vector<std::uint8_t> old;
    std::size_t n_tiles;
    HeadTiles heads[kHeads];
    DeviceArray<std::uint8_t> tiles, plan_memory;
    DeviceArray<std::int64_t> d_cells;
    DeviceArray<float> d_x, d_scales, d_turns, d_offsets;
    DeviceArray<std::uint16_t> d_halves;
    DeviceArray<std::int32_t> d_ids;
    DeviceArray<std::uint32_t> bad;
    EncodePlan plan;

    Batch(TileShape s, Options options)
        : shape(s),
          o(options),
          d(s.head_dim),
          tile(tile_bytes(s)),
          stride(kHeads * tile + 64),
          n_tiles((o.n + 70) / 64 + 2),
          tiles(n_tiles * stride),
          plan_memory(encode_plan_bytes(view(), kHeads)),
          d_cells(o.n),
          d_x(o.n * kHeads * d),
          d_scales(kHeads * d),
          d_turns(o.n * 2 * d),
          d_offsets(2 * kHeads * 2 * d),
          d_halves(o.n * kHeads * d),
          d_ids(o.n),
          bad(1) {
        SplitMix64 random(17 + s.head_dim);
        const auto normals = [&](std::size_t n, float size) {
            std::vector<float> v(n);
            for (float& f : v) f = size * static_cast<float>(random.normal());
            return v;
        };
        x = normals(o.n * kHeads * d, 3), scales = normals(kHeads * d, .3f), offsets = normals(2 * kHeads * 2 * d, 5);
        for (float& f : scales) f = std::exp(f);
        for (float& f : x) halves.push_back(to_half(f));
        if (o.half) std::ranges::transform(halves, x.begin(), from_half);
        for (int i = 0; i < o.n; ++i) {
            cells.push_back(o.scattered ? (static_cast<std::int64_t>(i) * 37 + 11) % (64 * static_cast<std::int64_t>(n_tiles)) : i + 70);
            ids.push_back(i % 3 - 1);
            for (std::size_t k = 0; k < 2 * d; ++k) {
                const double angle = i * std::pow(1e4, -static_cast<double>(k % (d / 2)) / static_cast<double>(d / 2));
                turns.push_back(static_cast<float>(k < d ? std::cos(angle) : std::sin(angle)));
            }
        }
        old.resize(n_tiles * stride);
        for (std::uint8_t& b : old) b = static_cast<std::uint8_t>(random.bits());
        tiles.write(old), d_cells.write(cells), d_x.write(x), d_scales.write(scales), d_turns.write(turns), d_offsets.write(offsets);
        d_halves.write(halves), d_ids.write(ids), bad.write({0});
        Device device;
        ok(query_device(0, device));
        ok(plan_encode(view(), kHeads, o.mode, device, plan_memory.get(), nullptr, plan));
    }
    TileView view() const { return {shape, tiles.get(), tile, stride, nullptr}; }
    EncodeArgs args() const {
        EncodeArgs a;
        a.x = o.half ? static_cast<const void*>(d_halves.get()) : d_x.get(), a.x_is_half = o.half;
        a.token_stride = kHeads * d, a.head_stride = d, a.cells = d_cells.get(), a.n = o.n, a.not_finite = bad.get();
        if (o.scales) a.scales = d_scales.get();
        if (o.offset) a.turns = d_turns.get(), a.offsets = d_offsets.get(), a.offset_ids = d_ids.get(), a.offset_stride = kHeads * 2 * d;
        return a;
    }
    // Rows of all cells, [token][head], as the GPU has them.
    std::vector<std::uint8_t> rows() const {
        DeviceArray<std::uint8_t> out(o.n * plan.row_bytes);
        ok(get_rows(plan, d_cells.get(), o.n, out.get(), plan.row_bytes, nullptr));
        return out.read();
    }
    // The same from the tiles, on the host.
    std::vector<std::uint8_t> rows_on_host(const std::vector<std::uint8_t>& all) const {
        const std::size_t r = row_bytes(shape.codec, shape.head_dim);
        std::vector<std::uint8_t> out(o.n * kHeads * r);
        for (int i = 0; i < o.n; ++i)
            for (std::size_t h = 0; h < kHeads; ++h)
                fragment_get_row(shape, all.data() + cells[i] / 64 * stride + h * tile, static_cast<int>(cells[i] % 64),
                                 out.data() + (i * kHeads + h) * r);
        return out;
    }
    // Those of the CPU's encoder.
    std::vector<std::uint8_t> rows_of_cpu() {
        std::vector<std::uint8_t> cpu(n_tiles * stride), out;
        std::vector<float> scaled = x;
        for (std::size_t i = 0; o.scales && i < x.size(); ++i) scaled[i] *= scales[i % (kHeads * d)];
        std::vector<const float*> from;
        for (const std::int32_t id : ids) from.push_back(id < 0 ? nullptr : offsets.data() + id * kHeads * 2 * d);
        for (std::size_t h = 0; h < kHeads; ++h) {
            turboquant::EncodeArgs a;
            a.shape = shape, a.tiles = cpu.data() + h * tile, a.tile_stride = stride, a.x = scaled.data() + h * d, a.x_stride = kHeads * d;
            a.cells = cells.data(), a.n = o.n, a.norm_mode = o.mode;
            if (o.offset) a.turns = turns.data(), a.offsets = from.data(), a.offset_at = h * 2 * d;
            EXPECT_TRUE(turboquant::encode(kernels(), a));
        }
        const std::size_t r = row_bytes(shape.codec, shape.head_dim);
        out.resize(o.n * kHeads * r);
        for (int i = 0; i < o.n; ++i)
            for (std::size_t h = 0; h < kHeads; ++h)
                tile_get_row(shape, cpu.data() + cells[i] / 64 * stride + h * tile, static_cast<int>(cells[i] % 64),
                             out.data() + (i * kHeads + h) * r);
        return out;
    }
    // What was encoded, in the model's space.
    std::vector<float> source() const {
        std::vector<float> v = x;
        for (std::size_t i = 0; i < v.size(); ++i) {
            const std::size_t token = i / (kHeads * d), h = i / d % kHeads, k = i % d;
            if (o.scales) v[i] *= scales[i % (kHeads * d)];
            if (!o.offset || ids[token] < 0) continue;
            const float *off = offsets.data() + (ids[token] * kHeads + h) * 2 * d, *turn = turns.data() + token * 2 * d;
            v[i] -= off[k] * turn[k] + off[d + k] * turn[d + k];
        }
        return v;
    }
    std::vector<float> decode(const std::vector<std::uint8_t>& rows) const {
        const std::size_t r = row_bytes(shape.codec, shape.head_dim);
        std::vector<float> out(rows.size() / r * d);
        std::vector<std::uint8_t> one(tile_bytes(shape));
        for (std::size_t i = 0; i < rows.size() / r; ++i) {
            tile_set_row(shape, one.data(), 0, rows.data() + i * r);
            const std::span<float> y(out.data() + i * d, d);
            tile_decode_rotated(shape, one.data(), 0, y);
            if (codec_info(shape.codec).rotated) rotation_for(shape.head_dim).inverse(y);
        }
        return out;
    }
};

/// |a - b|^2.
inline double squared(const std::vector<float>& a, const std::vector<float>& b) {
    double e = 0;
    for (std::size_t i = 0; i < a.size(); ++i) e += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    return e;
}

}  // namespace turboquant::cuda::test
#endif
