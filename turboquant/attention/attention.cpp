#include "turboquant/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "turboquant/attention/turns.h"
#include "turboquant/codec/codebook.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/residual.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/spec/head_codecs.h"

namespace turboquant {
namespace {

// The transform of rotation.h in double, from the public parts of a Rotation: y = S_b T S_a x. Forward: a = in, b = out; inverse: swapped.
void rotate(const Rotation& r, std::vector<double>& x, bool inverse) {
    const auto a = inverse ? r.signs_out() : r.signs_in(), b = inverse ? r.signs_in() : r.signs_out();
    const int p = r.pow2(), m = r.odd(), d = r.head_dim();
    for (int i = 0; i < d; ++i) x[i] *= a[i];
    for (int h = 1; h < p; h *= 2)
        for (int i = 0; i < d; ++i)
            if (!(i & h)) {
                const double lo = x[i], hi = x[i + h];
                x[i] = lo + hi;
                x[i + h] = lo - hi;
            }
    std::vector<double> y(d);
    for (int l = 0; l < m; ++l)
        for (int j = 0; j < m; ++j)
            for (int i = 0; i < p; ++i) y[l * p + i] += static_cast<double>(r.hartley()[l * m + j]) * x[j * p + i];
    for (int i = 0; i < d; ++i) x[i] = y[i] * b[i] / std::sqrt(static_cast<double>(p));
}

// One slot of a scalar format, by the int8 image of its codebook.
void decode_int8(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<float> y) {
    const Codebook& book = codebook_for(codec_info(shape.codec).bits, shape.head_dim);
    const std::uint8_t* scale = tile + tile_code_bytes(shape) + 2 * static_cast<std::size_t>(scale_index(shape.order, slot));
    const float step = book.i8_step * from_half(static_cast<std::uint16_t>(scale[0] | scale[1] << 8));
    for (int i = 0; i < shape.head_dim; ++i) y[i] = static_cast<float>(book.i8[get_code(shape, tile, slot, i)]) * step;
}

// All cells of one head, decoded: [n_kv][head_dim], rotated space (model's space for raw).
std::vector<float> decode_head(const TileView& view, int head, int n_kv, ReferenceLevels levels) {
    const TileShape shape = view.head_shape(head);
    const CodecInfo& info = codec_info(shape.codec);
    const bool int8 = levels == ReferenceLevels::int8 && info.levels == Levels::int8 && info.family == Family::scalar;
    const std::size_t d = view.shape.head_dim;
    std::vector<float> rows(n_kv * d);
    for (int j = 0; j < n_kv; ++j)
        (int8 ? decode_int8 : tile_decode_rotated)(shape, view.head_tiles(head) + j / kTileKeys * view.tile_stride, j % kTileKeys,
                                                   {rows.data() + j * d, d});
    return rows;
}

double dot(const double* a, const float* b, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// Bits of e_j: see ScoreTerm.
double score_term(const ScoreTerm& term, std::size_t n_rows, std::size_t row, int j) {
    if (!term.n_freq || term.cell_pos[j] < 0) return 0;
    const std::size_t n = term.n_freq, width = turn_width(term.n_freq);
    const float *a = term.q_term + ((term.cell_term ? term.cell_term[j] : 0) * n_rows + row) * 2 * n, *b = a + n;
    std::vector<float> turn(2 * width);
    turn_row(term.turns, term.n_freq, term.cell_pos[j], turn.data());
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * turn[i] + static_cast<double>(b[i]) * turn[width + i];
    return sum;
}

// The mask of row (t, h) at cell j, after patches.
double mask_at(const AttentionArgs& a, int t, int h, int j) {
    const int patch = a.patch.tile ? a.patch.tile[j / kTileKeys] : -1;
    if (patch >= 0)
        return from_half(a.patch.halves[((static_cast<std::size_t>(patch) * a.n_tokens + t) * a.mask_heads + h % a.mask_heads) * kTileKeys +
                                        j % kTileKeys]);
    return a.mask ? from_half(a.mask[t * a.mask_token_stride + h % a.mask_heads * a.mask_head_stride + j]) : 0;
}

// Row i of the exact rows, head `head`, decoded.
std::vector<float> exact_row(const std::uint8_t* base, std::size_t stride, std::int32_t slot, int head, int d) {
    std::vector<float> x(d);
    const std::uint8_t* at = base + slot * stride + static_cast<std::size_t>(head) * row_bytes(CodecId::raw, d);
    for (int i = 0; i < d; ++i) x[i] = from_half(static_cast<std::uint16_t>(at[2 * i] | at[2 * i + 1] << 8));
    return x;
}

// Residuals of one head by cell, where row (t, h) wants them; empty: none.
std::vector<std::vector<float>> residuals_for(const AttentionArgs& a, const std::uint8_t* base, std::size_t stride, std::size_t head_stride,
                                              const std::int32_t* slots, int t, int h, int d) {
    const ExactRowsView& e = a.exact;
    std::vector<std::vector<float>> rows(a.n_kv);
    for (int i = 0; i < e.n && e.on_top(); ++i) {
        if (e.mask && e.mask[(static_cast<std::size_t>(t) * a.mask_heads + h % a.mask_heads) * e.n + i] == kMaskHidden) continue;
        rows[e.cells[i]].resize(d);
        residual_add(base + slots[i] * stride + h / (a.n_head / a.n_head_kv) * head_stride, rows[e.cells[i]]);
    }
    return rows;
}

// One query row over decoded keys and values.
void attend(const AttentionArgs& a, int t, int h, const std::vector<float>& keys, const std::vector<float>& values) {
    const int dk = a.k.shape.head_dim, dv = a.v_is_k ? dk : a.v.shape.head_dim;
    const float* q = a.q + t * a.q_token_stride + h * a.q_head_stride;
    const int n_beside = a.exact.beside() ? a.exact.n : 0;
    std::vector<double> query(q, q + dk), logits(a.n_kv + n_beside), out(dv);
    const auto on_keys = residuals_for(a, a.exact.k, a.exact.k_stride, a.exact.k_head_stride, a.exact.k_slots, t, h, dk);
    const auto on_values = residuals_for(a, a.exact.v, a.exact.v_stride, a.exact.v_head_stride, a.exact.v_slots, t, h, dv);
    if (codec_info(a.k.shape.codec).rotated) rotate(rotation_for(dk), query, false);

    double top = a.sinks ? a.sinks[h] : -std::numeric_limits<double>::infinity();
    const auto set_logit = [&](int i, double score, double mask) {
        double x = a.scale * score;
        if (a.logit_softcap != 0) x = a.logit_softcap * std::tanh(x / a.logit_softcap);
        if (mask != 0) x += static_cast<double>(alibi_slope(a.max_bias, a.n_head, h)) * mask;
        logits[i] = x;
        top = std::max(top, x);
    };
    for (int j = 0; j < a.n_kv; ++j)
        set_logit(j,
                  dot(query.data(), &keys[static_cast<std::size_t>(j) * dk], dk) +
                      dot(query.data(), on_keys[j].data(), static_cast<int>(on_keys[j].size())) +
                      score_term(a.term, static_cast<std::size_t>(a.n_tokens) * a.n_head, static_cast<std::size_t>(t) * a.n_head + h, j),
                  mask_at(a, t, h, j));
    const int head = h / (a.n_head / a.n_head_kv);
    for (int i = 0; i < n_beside; ++i) {
        const float* eq = a.exact.q + t * a.exact.q_token_stride + h * a.exact.q_head_stride;
        const std::vector<double> plain(eq, eq + dk);
        const std::size_t at = (static_cast<std::size_t>(t) * a.mask_heads + h % a.mask_heads) * a.exact.n + i;
        set_logit(a.n_kv + i, dot(plain.data(), exact_row(a.exact.k, a.exact.k_stride, a.exact.k_slots[i], head, dk).data(), dk),
                  a.exact.mask ? from_half(a.exact.mask[at]) : 0);
    }
    double sum = a.sinks ? std::exp(a.sinks[h] - top) : 0;
    for (int j = 0; j < a.n_kv; ++j) {
        if (!(logits[j] > -std::numeric_limits<double>::infinity())) continue;
        const double p = std::exp(logits[j] - top);
        sum += p;
        for (int i = 0; i < dv; ++i) out[i] += p * values[static_cast<std::size_t>(j) * dv + i];
        for (std::size_t i = 0; i < on_values[j].size(); ++i) out[i] += p * on_values[j][i];
    }
    if (codec_info(a.v.shape.codec).rotated) rotate(rotation_for(dv), out, true);
    for (int i = 0; i < n_beside; ++i) {
        if (!(logits[a.n_kv + i] > -std::numeric_limits<double>::infinity())) continue;
        const double p = std::exp(logits[a.n_kv + i] - top);
        sum += p;
        const std::vector<float> value = exact_row(a.exact.v, a.exact.v_stride, a.exact.v_slots[i], head, dv);
        for (int k = 0; k < dv; ++k) out[k] += p * value[k];
    }
    for (int i = 0; i < a.v_dim_out; ++i)
        a.out[t * a.out_token_stride + h * a.out_head_stride + i] = sum > 0 ? static_cast<float>(out[i] / sum) : 0.0f;
    if (a.lse) a.lse[t * a.n_head + h] = static_cast<float>(top + std::log(sum));
}

}  // namespace

void merge_results(const AttentionArgs& a, const AttentionArgs& b, int first, int last) {
    for (int row = first; row < last; ++row) {
        const int t = row / a.n_head, h = row % a.n_head;
        const float la = a.lse[row], lb = b.lse[row], top = std::max(la, lb);
        if (!(top > -std::numeric_limits<float>::infinity())) continue;
        const float ea = std::exp(la - top), eb = std::exp(lb - top), wa = ea / (ea + eb), wb = eb / (ea + eb);
        float* to = a.out + t * a.out_token_stride + h * a.out_head_stride;
        const float* from = b.out + t * b.out_token_stride + h * b.out_head_stride;
        for (int i = 0; i < a.v_dim_out; ++i) to[i] = wa * to[i] + wb * from[i];
        a.lse[row] = top + std::log(ea + eb);
    }
}

float alibi_slope(float max_bias, int n_head, int h) {
    if (max_bias == 0) return 1;
    int n2 = 1;
    while (2 * n2 <= n_head) n2 *= 2;
    const float exponent = h < n2 ? -max_bias * static_cast<float>(h + 1) / static_cast<float>(n2)
                                  : -max_bias / 2 * static_cast<float>(2 * (h - n2) + 1) / static_cast<float>(n2);
    return std::exp2(exponent);
}

namespace {

const char* check_exact_rows(const AttentionArgs& a) {
    const ExactRowsView& e = a.exact;
    const int dk = a.k.shape.head_dim, dv = a.v.shape.head_dim;
    if (e.n < 0 || !e.k || !e.v || !e.k_slots || !e.v_slots) return "exact rows are incomplete";
    if (e.beside()) {
        const auto bytes = [&](int d) { return a.n_head_kv * row_bytes(CodecId::raw, d); };
        if (e.k_stride < bytes(dk) || e.v_stride < bytes(dv)) return "exact rows overlap";
        if (!e.q) return "exact rows are incomplete";
        if ((a.n_tokens > 1 && e.q_token_stride == 0) || (a.n_head > 1 && e.q_head_stride == 0))
            return "a stride of the exact queries is zero";
        return nullptr;
    }
    if (!e.cells) return "residuals without cells";
    const auto apart = [&](std::size_t stride, std::size_t head_stride, int d) {
        return stride >= residual_bytes(d) && (a.n_head_kv == 1 || head_stride >= residual_bytes(d));
    };
    if (!apart(e.k_stride, e.k_head_stride, dk) || !apart(e.v_stride, e.v_head_stride, dv)) return "exact rows overlap";
    for (int i = 0; i < e.n; ++i)
        if (e.cells[i] >= a.n_kv || e.cells[i] < 0 || (i > 0 && e.cells[i] <= e.cells[i - 1]))
            return "the cells of residuals are not in order";
    for (const TileView* v : {&a.k, &a.v})
        if (!codec_info(v->shape.codec).rotated) return "residuals need codes in the rotated space";
    return nullptr;
}

}  // namespace

const char* check_attention_args(const AttentionArgs& a) {
    if (a.n_head <= 0 || a.n_head_kv <= 0 || a.n_head % a.n_head_kv)
        return "the number of query heads is not a multiple of the number of KV heads";
    if (a.n_tokens < 0 || a.n_kv < 0) return "negative number of tokens or cells";
    if (!head_dim_supported(a.k.shape.head_dim) || !head_dim_supported(a.v.shape.head_dim)) return "unsupported head size";
    if (a.k.shape.side != Side::key || a.v.shape.side != (a.v_is_k ? Side::key : Side::value)) return "keys and values are exchanged";
    if (a.v_is_k && (!(a.v.shape == a.k.shape) || a.v.tiles != a.k.tiles || a.v.heads != a.k.heads)) return "v_is_k is set, but v is not k";
    if (a.v_dim_out <= 0 || a.v_dim_out > a.v.shape.head_dim || (!a.v_is_k && a.v_dim_out != a.v.shape.head_dim))
        return "wrong size of the output";
    if (a.n_tokens > 0 && (!a.q || !a.out)) return "no query or no output";
    if (a.n_kv > 0 && (!a.k.tiles || !a.v.tiles)) return "no tiles";
    for (const TileView* v : {&a.k, &a.v})
        for (int h = 0; h < a.n_head_kv; ++h) {
            if (v->heads && !mixes(v->heads[h].codec)) return "formats that cannot stand beside others in one layer";
            if (v->tile_stride < tile_bytes(v->head_shape(h)) && a.n_kv > kTileKeys) return "tiles overlap";
        }
    if (a.n_tokens > 1 && (a.q_token_stride == 0 || a.out_token_stride == 0)) return "token stride is zero";
    if (a.n_head > 1 && (a.q_head_stride == 0 || a.out_head_stride == 0)) return "head stride is zero";
    if (a.mask && a.mask_heads < 1) return "mask without heads";
    if (a.patch.tile && (!a.patch.halves || a.mask_heads < 1)) return "a mask's patches are incomplete";
    if (a.exact.n) {
        if (const char* error = check_exact_rows(a)) return error;
    }
    if (a.term.n_freq < 0) return "negative number of frequencies";
    if (a.term.n_terms < 1) return "no score term to choose from";
    if (a.term.n_freq > 0 && (!a.term.q_term || !a.term.turns || !a.term.cell_pos)) return "incomplete score term";
    return nullptr;
}

void reference_attention(const AttentionArgs& a, ReferenceLevels levels) {
    if (const char* error = check_attention_args(a)) throw std::invalid_argument(std::string("attention: ") + error);
    const int group = a.n_head / a.n_head_kv;
    for (int kv = 0; kv < a.n_head_kv; ++kv) {
        const std::vector<float> keys = decode_head(a.k, kv, a.n_kv, levels);
        const std::vector<float> values = a.v_is_k ? keys : decode_head(a.v, kv, a.n_kv, levels);
        for (int t = 0; t < a.n_tokens; ++t)
            for (int h = kv * group; h < (kv + 1) * group; ++h) attend(a, t, h, keys, values);
    }
}

}  // namespace turboquant
