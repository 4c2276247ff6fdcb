// A compressed cache with everything an attention call needs, drawn from a fixed seed, and measures of error.
#pragma once

#include <cmath>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/attention/turns.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/random.h"
#include "turboquant/codec/tile.h"

namespace turboquant::test {

enum class Mask { none, causal, random, window, some_rows_empty };

struct Case {
    CodecId k = CodecId::turbo4, v = CodecId::turbo4;
    int k_dim = 64, v_dim = 64;
    int n_head = 2, n_head_kv = 1, n_tokens = 1, n_kv = 128;
    Mask mask = Mask::none;
    int mask_heads = 1;
    float max_bias = 0, softcap = 0;
    bool sinks = false;
    int n_freq = 0;
    bool successive = false;                    // positions of the score term: p, p+1, ... in most tiles
    int first_pos = 7;                          // of successive positions
    int mla_out = 0;                            // > 0: v is k, so many values
    float sharpness = 1;                        // of the queries: how peaked the softmax is
    std::vector<CodecId> k_heads{}, v_heads{};  // formats per KV head instead of k, v
    bool random_codes = false;                  // tiles of random bits (scales in [.5, 2)) instead of encoded vectors: many, fast
    float term_size = 0;                        // rms of the score term in logits; 0: as it comes

    friend std::ostream& operator<<(std::ostream& o, const Case& c) {
        o << codec_info(c.k).name << "x" << c.k_dim << "/" << codec_info(c.v).name << "x" << c.v_dim << " heads " << c.n_head << "/"
          << c.n_head_kv << " tokens " << c.n_tokens << " kv " << c.n_kv << " mask " << static_cast<int>(c.mask) << "x" << c.mask_heads
          << " alibi " << c.max_bias << " cap " << c.softcap << " sinks " << c.sinks << " freq " << c.n_freq << (c.successive ? "s" : "")
          << " mla " << c.mla_out << " sharp " << c.sharpness;
        if (c.random_codes) o << " random codes, term " << c.term_size;
        for (const CodecId id : c.k_heads) o << " k:" << codec_info(id).name;
        for (const CodecId id : c.v_heads) o << " v:" << codec_info(id).name;
        return o;
    }
};

/// Owns all memory of one call. Not copyable: args point into it.
class Problem {
  public:
    explicit Problem(const Case& c, std::uint64_t seed = 1) : c_(c), random_(seed) {
        k_heads = places(c.k, c.k_heads, Side::key, c.k_dim), v_heads = places(c.v, c.v_heads, Side::value, c.v_dim);
        args.k = view(shape(k_heads[0].codec, Side::key, c.k_dim), k_heads, !c.k_heads.empty());
        args.v = c.mla_out ? args.k : view(shape(v_heads[0].codec, Side::value, c.v_dim), v_heads, !c.v_heads.empty());
        fill_tiles(args.k, k_tiles, k_heads, keys, 1);
        if (!c.mla_out) fill_tiles(args.v, v_tiles, v_heads, values, 0.3f);
        const int v_out = c.mla_out ? c.mla_out : c.v_dim;
        q = normals(static_cast<std::size_t>(c.n_tokens) * c.n_head * c.k_dim, c.sharpness);
        out.assign(static_cast<std::size_t>(c.n_tokens) * c.n_head * v_out, std::nanf(""));
        args.n_head = c.n_head, args.n_head_kv = c.n_head_kv, args.n_tokens = c.n_tokens, args.n_kv = c.n_kv;
        args.q = q.data(), args.q_token_stride = static_cast<std::size_t>(c.n_head) * c.k_dim, args.q_head_stride = c.k_dim;
        args.out = out.data(), args.out_token_stride = static_cast<std::size_t>(c.n_head) * v_out, args.out_head_stride = v_out;
        if (c.mla_out) args.v = args.k;
        args.v_is_k = c.mla_out > 0, args.v_dim_out = v_out;
        args.scale = 1 / std::sqrt(static_cast<float>(c.k_dim));
        args.logit_softcap = c.softcap, args.max_bias = c.max_bias;
        fill_mask();
        if (c.sinks) sinks = normals(c.n_head, 1), args.sinks = sinks.data();
        if (c.n_freq) fill_term();
    }
    Problem(const Problem&) = delete;
    Problem& operator=(const Problem&) = delete;

    /// Runs f (which fills args.out) and returns a copy of the output.
    template <class F>
    std::vector<float> run(F f) {
        std::fill(out.begin(), out.end(), std::nanf(""));
        f(args);
        return out;
    }
    std::vector<float> reference() {
        return run([](const AttentionArgs& a) { reference_attention(a); });
    }

    AttentionArgs args;
    std::vector<std::uint8_t> k_tiles, v_tiles;
    std::vector<HeadTiles> k_heads, v_heads;
    std::vector<float> keys, values;  ///< uncompressed, [head][n_kv][dim]
    std::vector<std::uint8_t> cell_term;
    std::vector<float> q, out, sinks, q_term, turns;
    std::vector<std::uint16_t> mask;
    std::vector<std::int32_t> cell_pos;

  private:
    static TileShape shape(CodecId codec, Side side, int dim) {
        return {codec, side, dim, codec_info(codec).family == Family::outliers ? dim / 8 : 0};
    }

    std::vector<float> normals(std::size_t n, float scale) {
        std::vector<float> x(n);
        for (float& v : x) v = scale * static_cast<float>(random_.normal());
        return x;
    }

    int n_tiles() const { return (c_.n_kv + kTileKeys - 1) / kTileKeys; }

    // Heads one after the other in a tile of all of them.
    std::vector<HeadTiles> places(CodecId all, const std::vector<CodecId>& heads, Side side, int dim) const {
        std::vector<HeadTiles> all_heads;
        std::size_t at = 0;
        for (int h = 0; h < c_.n_head_kv; ++h) {
            all_heads.push_back({heads.empty() ? all : heads[h], at});
            at += tile_bytes(shape(all_heads.back().codec, side, dim));
        }
        return all_heads;
    }

    TileView view(TileShape first, const std::vector<HeadTiles>& heads, bool differ) const {
        const std::size_t last = tile_bytes(shape(heads.back().codec, first.side, first.head_dim));
        return {first, nullptr, tile_bytes(first), heads.back().at + last, differ ? heads.data() : nullptr};
    }

    // Tile memory starts as zeros: cells past n_kv are never written.
    void fill_tiles(TileView& view, std::vector<std::uint8_t>& tiles, const std::vector<HeadTiles>& heads, std::vector<float>& x,
                    float spread) {
        const std::size_t d = view.shape.head_dim;
        tiles.assign(n_tiles() * view.tile_stride, 0);
        view.tiles = tiles.data();
        if (c_.random_codes) return draw_rows(view, tiles, heads);
        x = normals(static_cast<std::size_t>(c_.n_head_kv) * c_.n_kv * d, 1);
        for (int j = 0; j < c_.n_kv; ++j) {
            const float size = std::exp(spread * static_cast<float>(random_.normal()));  // norms differ between vectors
            for (int h = 0; h < c_.n_head_kv; ++h)
                for (std::size_t i = 0; i < d; ++i) x[(static_cast<std::size_t>(h) * c_.n_kv + j) * d + i] *= size;
        }
        for (int h = 0; h < c_.n_head_kv; ++h)
            for (int j = 0; j < c_.n_kv; ++j)
                tile_encode(shape(heads[h].codec, view.shape.side, view.shape.head_dim),
                            tiles.data() + j / kTileKeys * view.tile_stride + heads[h].at, j % kTileKeys,
                            {x.data() + (static_cast<std::size_t>(h) * c_.n_kv + j) * d, d});
    }

    void draw_rows(const TileView& view, std::vector<std::uint8_t>& tiles, const std::vector<HeadTiles>& heads) {
        for (const HeadTiles& head : heads) {
            const TileShape s = shape(head.codec, view.shape.side, view.shape.head_dim);
            std::vector<std::uint8_t> row(row_bytes(s.codec, s.head_dim));
            const auto put_half = [&](std::size_t at, float x) {
                const std::uint16_t h = to_half(x);
                row[at] = static_cast<std::uint8_t>(h), row[at + 1] = static_cast<std::uint8_t>(h >> 8);
            };
            for (int j = 0; j < c_.n_kv; ++j) {
                for (std::uint8_t& b : row) b = static_cast<std::uint8_t>(random_.bits());
                if (codec_info(s.codec).rotated)
                    put_half(row.size() - 2, static_cast<float>(0.5 + 1.5 * random_.uniform()));
                else
                    for (std::size_t i = 0; i < row.size(); i += 2)
                        put_half(i, static_cast<float>(random_.normal()) / std::sqrt(static_cast<float>(s.head_dim)));
                tile_set_row(s, tiles.data() + j / kTileKeys * view.tile_stride + head.at, j % kTileKeys, row.data());
            }
        }
    }

    void fill_mask() {
        if (c_.mask == Mask::none) return;
        // The mask ends with the last cell: reading past it is an error that the address sanitizer sees.
        mask.resize(static_cast<std::size_t>(c_.n_tokens) * c_.mask_heads * c_.n_kv);
        for (int t = 0; t < c_.n_tokens; ++t)
            for (int h = 0; h < c_.mask_heads; ++h)
                for (int j = 0; j < c_.n_kv; ++j) {
                    const int pos = c_.n_kv - c_.n_tokens + t;
                    const bool hidden = c_.mask == Mask::causal   ? j > pos
                                        : c_.mask == Mask::random ? random_.uniform() < 0.4
                                        : c_.mask == Mask::window ? j > pos || j < pos - 70
                                                                  : t % 2 == 0;
                    const float bias = c_.max_bias != 0          ? static_cast<float>(j - pos)
                                       : c_.mask == Mask::random ? static_cast<float>(random_.normal())
                                                                 : 0;
                    mask[(static_cast<std::size_t>(t) * c_.mask_heads + h) * c_.n_kv + j] = hidden ? kMaskHidden : to_half(bias);
                }
        args.mask = mask.data(), args.mask_heads = c_.mask_heads;
        args.mask_head_stride = c_.n_kv, args.mask_token_stride = static_cast<std::size_t>(c_.mask_heads) * c_.n_kv;
    }

    void fill_term() {
        const int n = 2 * c_.n_freq, max_pos = c_.n_kv + 10;
        const float size = c_.term_size > 0 ? c_.term_size / (std::sqrt(static_cast<float>(c_.n_freq)) * args.scale) : 1;
        q_term = normals(2 * static_cast<std::size_t>(c_.n_tokens) * c_.n_head * n, size);
        std::vector<double> frequencies;
        for (int i = 0; i < c_.n_freq; ++i) frequencies.push_back(std::pow(10000.0, -static_cast<double>(i) / c_.n_freq));
        turns = make_turns(frequencies);
        for (int j = 0; j < c_.n_kv; ++j)
            cell_pos.push_back(c_.successive ? j + c_.first_pos + (j >= 200) : j % 7 == 3 ? -1 : (j * 5) % max_pos);
        for (int j = 0; j < c_.n_kv; ++j) cell_term.push_back(static_cast<std::uint8_t>(c_.successive ? j >= 64 : j % 2));
        args.term = {c_.n_freq, q_term.data(), turns.data(), cell_pos.data(), 2, cell_term.data()};
    }

    Case c_;
    SplitMix64 random_;
};

/// |a - b|^2 / |b|^2; infinite if any value is not finite.
inline double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    double error = 0, energy = 0;
    for (std::size_t i = 0; i < b.size(); ++i) {
        if (!std::isfinite(a[i])) return std::numeric_limits<double>::infinity();
        error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
        energy += static_cast<double>(b[i]) * b[i];
    }
    return energy > 0 ? error / energy : error;
}

}  // namespace turboquant::test
