// Look-ups of the attention kernels, made from the codebooks.
#include <cuda_runtime_api.h>

#include <cmath>
#include <functional>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/trellis.h"
#include "turboquant/cuda/attention.h"

namespace turboquant::cuda {
namespace {

std::uint32_t byte_of(int v) { return static_cast<std::uint32_t>(v) & 255; }

void pack(const std::function<int(int)>& level, int n, std::uint32_t* words) {
    for (int i = 0; i < n; i += 4)
        words[i / 4] = byte_of(level(i)) | byte_of(level(i + 1)) << 8 | byte_of(level(i + 2)) << 16 | byte_of(level(i + 3)) << 24;
}

// 16 levels as sums of two bytes (formats.cuh, Operands::sum): the table that is not meant adds the sign of its entry, 0 or -1, which is
// taken off the other's. Entries i and i + 8 are solved together.
void pack_sum(const std::function<int(int)>& level, std::uint32_t* words) {
    int low[8], high[8];
    for (int i = 0; i < 8; ++i)
        for (int signs = 0; signs < 4; ++signs) {
            const int of_low = -(signs & 1), of_high = -(signs >> 1);
            low[i] = level(i) - of_high, high[i] = level(8 + i) - of_low;
            if ((low[i] < 0) == (of_low < 0) && (high[i] < 0) == (of_high < 0)) break;
        }
    pack([&](int i) { return low[i]; }, 8, words);
    pack([&](int i) { return high[i]; }, 8, words + 2);
}

constexpr double kWideTop = 32000;  // the high byte stays within a signed byte

void fill_scalar(CodecId codec, int head_dim, FormatTable& t, std::uint32_t* lut) {
    const Codebook& book = codebook_for(codec_info(codec).bits, head_dim);
    if (codec_info(codec).levels != Levels::int8) {
        t.step = static_cast<float>(book.centroids.back() / kWideTop);
        for (std::size_t i = 0; i < book.centroids.size(); ++i) {
            const int v = static_cast<int>(std::lround(book.centroids[i] / static_cast<double>(t.step)));
            const int low = static_cast<std::int8_t>(v);
            lut[i] = byte_of(low) | byte_of((v - low) / 256) << 8;
        }
        return;
    }
    t.step = book.i8_step;
    const auto level = [&](int i) { return static_cast<int>(book.i8[static_cast<std::size_t>(i)]); };
    if (codec_info(codec).bits == 4)
        pack_sum(level, t.prmt);
    else
        pack(level, 1 << codec_info(codec).bits, t.prmt);
}

// Selectors hold y = z0^z1 | z1 << 1 and the point p: as p << 2 | y for the octets 0 and 1, as y << 2 | p for 2 and 3 where both have two
// bits.
void fill_trellis(CodecId codec, int head_dim, FormatTable& t, std::uint32_t* lut) {
    const int bits = codec_info(codec).bits;
    const TrellisCodebook& book = trellis_for(bits, head_dim);
    t.step = book.i8_step;
    const auto level = [&](int point, int y) {
        const int z1 = y >> 1, z0 = z1 ^ (y & 1), index = 4 * point + 2 * z1 + z0;
        return static_cast<int>(book.i8[static_cast<std::size_t>(index + (bits == 4 ? 16 : 0))]);  // tcq4: magnitudes
    };
    const auto points_first = [&](int i) { return level(i >> 2, i & 3); };
    const auto points_last = [&](int i) { return level(i & 3, i >> 2); };
    switch (bits) {
        case 1:
            return pack(points_first, 4, t.prmt);
        case 2:
            return pack(points_first, 8, t.prmt);
        case 3:
            pack_sum(points_first, t.prmt);
            return pack_sum(points_last, t.prmt + 4);
        case 4:
            pack(points_first, 16, t.prmt);
            return pack(points_last, 16, t.prmt + 4);
        default:
            for (int i = 0; i < 64; ++i) lut[i] = byte_of(level(i & 15, i >> 4));
    }
}

constexpr std::size_t kLutWords = kFragmentCodecCount * std::size_t{256};

}  // namespace

int format_index(CodecId codec) { return fragment_codec_index(codec); }

std::size_t attention_table_bytes(int head_dim) {
    const int odd = head_dim / (head_dim & -head_dim);
    return (kLutWords + 2 * static_cast<std::size_t>(head_dim) + static_cast<std::size_t>(odd) * odd) * 4;
}

Status upload_attention_tables(AttentionTables& tables, int head_dim, void* device, Stream stream) {
    if (!head_dim_supported(head_dim)) return bad_argument("attention tables: unsupported head size");
    tables = {};
    tables.head_dim = head_dim;
    std::vector<std::uint32_t> words(kLutWords);
    for (int i = 0; i < kFragmentCodecCount; ++i) {
        const CodecId codec = kFragmentCodecs[i];
        std::uint32_t* lut = words.data() + 256 * i;
        if (codec == CodecId::raw)
            tables.formats[i].step = 1;
        else if (codec_info(codec).family == Family::trellis)
            fill_trellis(codec, head_dim, tables.formats[i], lut);
        else
            fill_scalar(codec, head_dim, tables.formats[i], lut);
    }
    const Rotation& r = rotation_for(head_dim);
    std::vector<float> floats(r.signs_in().begin(), r.signs_in().end());
    floats.insert(floats.end(), r.signs_out().begin(), r.signs_out().end());
    floats.insert(floats.end(), r.hartley().begin(), r.hartley().end());
    auto* lut = static_cast<std::uint32_t*>(device);
    auto* rest = reinterpret_cast<float*>(lut + kLutWords);
    const auto s = static_cast<cudaStream_t>(stream);
    if (const auto e = cudaMemcpyAsync(lut, words.data(), words.size() * 4, cudaMemcpyHostToDevice, s))
        return status_of(e, "attention tables: copy");
    if (const auto e = cudaMemcpyAsync(rest, floats.data(), floats.size() * 4, cudaMemcpyHostToDevice, s))
        return status_of(e, "attention tables: copy");
    if (const auto e = cudaStreamSynchronize(s)) return status_of(e, "attention tables: copy");
    tables.lut = lut;
    tables.signs_in = rest, tables.signs_out = rest + head_dim, tables.hartley = rest + 2 * head_dim;
    return {};
}

}  // namespace turboquant::cuda
