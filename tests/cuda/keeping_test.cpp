// Attention that begins beside the launch that keeps rows exactly: it must read those rows, not what lay in their slots before.
#include "tests/cuda/attention_rig.h"

#ifdef TQ_HAS_CUDA
#include <gtest/gtest.h>

#include "tests/cuda/rotation_signs.h"
#include "turboquant/cuda/step.h"

namespace turboquant::cuda::test {
namespace {

using enum CodecId;
using turboquant::test::Case;

class CudaKeeping : public Gpu {};

TEST_F(CudaKeeping, AttentionBesideReadsWhatIsKept) {
    constexpr int n_head_kv = 2, n_slots = 256, n = 5;
    for (const CodecId id : {turbo4, tcq3, turbo8})
        for (const int d : {64, 128})
            for (const int n_kv : {64, 1000}) {
                SCOPED_TRACE(std::string(codec_info(id).name) + " " + std::to_string(d) + " " + std::to_string(n_kv));
                const std::size_t n_embd = static_cast<std::size_t>(n_head_kv) * d;
                Case c{.k = id,
                       .v = id,
                       .k_dim = d,
                       .v_dim = d,
                       .n_head = 8,
                       .n_head_kv = n_head_kv,
                       .n_kv = n_kv,
                       .n_freq = d / 2,
                       .successive = true};
                c.random_codes = true, c.sharpness = 12, c.term_size = 3;
                turboquant::test::Problem problem(c);
                const turboquant::AttentionArgs* one = &problem.args;
                Rig rig({one}, false, true);
                const DeviceBytes* signs = rig.keep(rotation_signs(d));
                const DeviceBytes* slots = rig.keep(std::vector<std::int32_t>{0, 70, 130, 200, 255});
                KeepRows keep[2][2];  // of two batches: keys, values
                for (int side = 0; side < 2; ++side) {
                    const DeviceBytes* tiles = rig.keep(std::vector<std::uint16_t>(n_slots * n_embd));
                    const DeviceBytes* halves = rig.keep(std::vector<std::uint16_t>(n_slots * n_embd));
                    Tiles t;
                    t.tiles = tiles->as<std::uint8_t>(), t.head_stride = 128 * d, t.tile_stride = 128 * n_embd, t.codec = raw;
                    (side ? rig.args.exact_v : rig.args.exact_k) = t;
                    for (int batch = 0; batch < 2; ++batch) {
                        std::vector<float> x(n * n_embd);
                        for (std::size_t i = 0; i < x.size(); ++i)
                            x[i] = 2 * std::sin(static_cast<float>((i * 37 + 11 * side + 101 * batch) % 1009));
                        KeepRows& k = keep[batch][side];
                        k.x = rig.keep(x)->as<float>(), k.stride = n_embd, k.n = n, k.n_head = n_head_kv, k.head_dim = d,
                        k.keys = side == 0;
                        k.slots = slots->as<std::int32_t>(), k.signs = k.matrix = signs->as<float>();
                        k.halves = halves->as<std::uint16_t>(), k.tiles = tiles->as<std::uint8_t>(), k.tile_stride = t.tile_stride;
                    }
                }
                rig.args.exact_n = rig.keep(std::vector<std::int32_t>{n_slots})->as<std::int32_t>();
                std::vector<float> expected[2];
                for (int batch = 0; batch < 2; ++batch)
                    expected[batch] = rig.run_after([&](Stream stream) {
                        must(keep_rows(keep[batch][0], stream, &keep[batch][1]));
                        must(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
                    });
                ASSERT_NE(expected[0], expected[1]);
                rig.args.beside_keeping = true;
                for (int i = 0; i < 40; ++i) {
                    const std::vector<float> out =
                        rig.run_after([&](Stream stream) { must(keep_rows(keep[i % 2][0], stream, &keep[i % 2][1])); });
                    ASSERT_EQ(out, expected[i % 2]) << i;
                }
            }
}

}  // namespace
}  // namespace turboquant::cuda::test
#endif
