// Made the files beside it, with the library of version 0.1.0 (commit 708f404), scalar kernels; never built since. The cache's code moves
// on, the files do not. A file: u32 rows of keys, u32 rows of values, then the rows as they were handed to llama.cpp, keys first:
// 128 fp16 values each, two KV heads of 64, the tokens at kPositions of a sequence of 72 (of 5 in measuring.rows).
#include <cstdio>
#include <fstream>

#include "../../cache/key_cache.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

constexpr int kCells = 128;
const Kernels& kn() { return kernels(SimdLevel::scalar); }

struct Case {
    std::string name;
    HeadCodecs codecs;
    WindowSizes windows{2, 2};
    bool offset = true;
    std::string scales;
    int n_tokens = 72;
};

std::vector<std::uint16_t> save(const Case& c, Side side, const std::vector<std::int32_t>& positions) {
    KvTensor::Geometry g{side, c.codecs, default_norm_mode(side), kEmbd, kCells, 1, kOutlierRatio, c.windows};
    std::vector<std::uint8_t> memory(KvTensor::reserved_bytes(g) + 64);
    KvTensor kv(g, reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64));
    kv.bind_head_dim(kDim);
    const bool offset = side == Side::key && c.offset && codec_info(c.codecs.of(0)).rotated;
    if (offset) kv.enable_offset(), kv.offset()->set_rope(rope());
    if (offset && !c.scales.empty()) kv.offset()->set_scales(c.scales);
    CellPositions cells(kCells, 1);
    const auto pos = iota32(c.n_tokens);
    const auto rows = iota64(c.n_tokens);
    std::vector<float> x = biased_keys(pos, side == Side::key ? some_bias() : std::vector<float>(kEmbd), side == Side::key ? 1 : 2),
                       rounded;
    cells.place(rows, pos);
    if (kv.exact()) kv.exact()->round(x.data(), kEmbd, rows, cells, rounded), x = rounded;
    if (offset)
        kv.encode_keys(kn(), x.data(), kEmbd, rows, cells);
    else
        kv.encode_rows(kn(), x.data(), kEmbd, rows);
    if (kv.exact()) kv.exact()->add(kn(), x.data(), rows, cells), kv.exact()->trim(cells);
    std::vector<std::uint16_t> out(positions.size() * kEmbd);
    for (std::size_t i = 0; i < positions.size(); i++) kv.save_row(positions[i], cells, std::span(out).subspan(i * kEmbd, kEmbd));
    return out;
}

}  // namespace

int main(int, char** argv) {
    std::vector<Case> cases;
    for (const CodecInfo& c : kCodecs)
        cases.push_back({std::string(c.name), c.id, c.id == CodecId::raw ? WindowSizes{0, 0} : WindowSizes{2, 2}});
    cases.push_back({"mixed", HeadCodecs({CodecId::tcq3, CodecId::turbo8})});
    std::string letters;
    for (int i = 0; i < kEmbd; i++) letters += static_cast<char>('a' + i / 2 % 5);
    cases.push_back({"scaled", CodecId::turbo4, {2, 2}, true, letters});
    cases.push_back({"no-offset", CodecId::turbo4, {2, 2}, false});
    cases.push_back({"no-windows", CodecId::tcq3, {0, 0}});
    cases.push_back({"measuring", CodecId::turbo4, {2, 2}, true, "", 5});
    for (const Case& c : cases) {
        const bool composite = is_composite(c.codecs.of(0));
        const std::vector<std::int32_t> positions = c.n_tokens == 5 ? iota32(5)
                                                    : composite     ? std::vector{0, 20, 71}
                                                                    : std::vector{0, 1, 20, 21, 22, 23, 70, 71};
        std::ofstream f(std::string(argv[1]) + "/" + c.name + ".rows", std::ios::binary);
        const std::uint32_t n[] = {static_cast<std::uint32_t>(positions.size()), static_cast<std::uint32_t>(positions.size())};
        f.write(reinterpret_cast<const char*>(n), sizeof n);
        for (const Side side : {Side::key, Side::value}) {
            const auto out = save(c, side, positions);
            f.write(reinterpret_cast<const char*>(out.data()), static_cast<std::streamsize>(out.size() * 2));
        }
    }
}
