// What models do to a cache beside writing rows and attending over all of them: sparse attention gathers rows or attends over a part of the
// cells, attention with a bias of its own multiplies matrices; and what they keep for their layers that is no cache of keys and values.
#include <algorithm>
#include <cmath>
#include <ostream>

#include "tests/ggml/op_rig.h"

namespace turboquant::conformance {
namespace {

constexpr CacheShape kShape{64, 64, 2, 256, 2};
constexpr int kWritten = 200;  ///< per stream

/// Both streams, in two batches each.
void fill(OpRig& rig) {
    const auto n_embd = static_cast<size_t>(rig.shape().n_embd_k());
    for (int stream = 0; stream < rig.shape().n_streams; stream++)
        for (int first = 0; first < kWritten; first += 100) {
            std::vector<int64_t> rows;
            for (int i = first; i < first + 100; i++) rows.push_back(stream * rig.shape().n_cells + i);
            const uint32_t seed = 1 + 10 * stream + first;
            rig.write(rows, gaussian(rows.size() * n_embd, seed), gaussian(rows.size() * n_embd, seed + 5));
        }
}

/// A part of a KV tensor as llama.cpp shows it: [dim, head, cell, stream].
ggml_tensor* cells(ggml_context* c, ggml_tensor* t, int first, int n, int stream = 0, int n_streams = 1) {
    return ggml_view_4d(c, t, kShape.k_dim, kShape.n_head_kv, n, n_streams, ggml_row_size(t->type, kShape.k_dim), t->nb[1], t->nb[2],
                        t->nb[2] * static_cast<size_t>(stream) + t->nb[1] * static_cast<size_t>(first));
}

struct ReadCase {
    const char* name;
    ggml_tensor* (*build)(ggml_context* c, ggml_tensor* k, ggml_tensor* v, const OpRig::Input& input);
};
void PrintTo(const ReadCase& c, std::ostream* out) { *out << c.name; }

const std::vector<float>& queries() {
    static const std::vector<float> q = gaussian(size_t{64} * 3 * 4, 3);
    return q;
}
constexpr int32_t kPicked[] = {199, 3, 64, 65, 130, 3};
/// f16 zeros: all cells are seen.
const std::vector<ggml_fp16_t> kSeen(size_t{256} * 4);

ggml_tensor* attend_over(ggml_context* c, ggml_tensor* k, ggml_tensor* v, const OpRig::Input& input) {
    ggml_tensor* q = input(GGML_TYPE_F32, queries().data(), 64, 3, 4);
    ggml_tensor* mask = input(GGML_TYPE_F16, kSeen.data(), k->ne[2], 3, 1);
    return ggml_flash_attn_ext(c, q, ggml_permute(c, k, 0, 2, 1, 3), ggml_permute(c, v, 0, 2, 1, 3), mask, 0.125f, 0, 0);
}

const ReadCase kReads[] = {
    {"ProductWithKeys",  // T5: a bias is added to the scores
     [](ggml_context* c, ggml_tensor* k, ggml_tensor*, const OpRig::Input& input) {
         ggml_tensor* q = input(GGML_TYPE_F32, queries().data(), 64, 3, 2);
         return ggml_mul_mat(c, ggml_permute(c, cells(c, k, 0, 192), 0, 2, 1, 3), q);
     }},
    {"TransposedValues",  // the same, without flash attention
     [](ggml_context* c, ggml_tensor*, ggml_tensor* v, const OpRig::Input&) {
         ggml_tensor* t = ggml_cont(c, ggml_transpose(c, ggml_permute(c, cells(c, v, 0, 192), 0, 2, 1, 3)));
         return ggml_cast(c, t, GGML_TYPE_F32);
     }},
    {"PickedRows",  // MiniMax M3
     [](ggml_context* c, ggml_tensor* k, ggml_tensor*, const OpRig::Input& input) {
         return ggml_get_rows(c, ggml_view_2d(c, k, k->ne[0], 200, k->nb[1], 0), input(GGML_TYPE_I32, kPicked, std::size(kPicked), 1, 1));
     }},
    {"CopyToF32",
     [](ggml_context* c, ggml_tensor*, ggml_tensor* v, const OpRig::Input&) { return ggml_cast(c, cells(c, v, 0, 200), GGML_TYPE_F32); }},
    {"Joined",  // DeepSeek 4: two caches one after the other
     [](ggml_context* c, ggml_tensor* k, ggml_tensor* v, const OpRig::Input&) {
         return ggml_cast(c, ggml_concat(c, cells(c, k, 0, 70), cells(c, v, 10, 90), 2), GGML_TYPE_F32);
     }},
    {"OneHeadFromTheMiddle",
     [](ggml_context* c, ggml_tensor* k, ggml_tensor*, const OpRig::Input&) {
         return ggml_cast(c, ggml_view_2d(c, k, 64, 40, k->nb[1], k->nb[1] * 101 + ggml_row_size(k->type, 64)), GGML_TYPE_F32);
     }},
    {"SecondStream", [](ggml_context* c, ggml_tensor* k, ggml_tensor*,
                        const OpRig::Input&) { return ggml_cast(c, cells(c, k, 5, 100, 1), GGML_TYPE_F32); }},
    {"BothStreams", [](ggml_context* c, ggml_tensor* k, ggml_tensor*,
                       const OpRig::Input&) { return ggml_cast(c, cells(c, k, 5, 100, 0, 2), GGML_TYPE_F32); }},
    {"AttentionOverPartOfTheCells",  // MiniMax M3
     [](ggml_context* c, ggml_tensor* k, ggml_tensor* v, const OpRig::Input& input) {
         return attend_over(c, cells(c, k, 70, 64), cells(c, v, 70, 64), input);
     }},
    {"AttentionWithValuesOfItsOwn",  // gathered before
     [](ggml_context* c, ggml_tensor* k, ggml_tensor* v, const OpRig::Input& input) {
         return attend_over(c, cells(c, k, 0, 192), ggml_cast(c, cells(c, v, 0, 192), GGML_TYPE_F16), input);
     }},
};

class OtherReads : public testing::TestWithParam<ReadCase> {
  protected:
    static std::vector<float> read(OpRig& rig) {
        return rig.compute([&](ggml_context* c, const OpRig::Input& input) { return GetParam().build(c, rig.k(), rig.v(), input); });
    }
    static std::vector<float> look(OpRig& rig) {
        AttendOp a;
        a.n_streams = 2, a.n_kv = kShape.n_cells, a.q = gaussian(size_t{2} * 4 * 64, 7), a.scale = 0.125f;
        for (int i = 0; i < 2 * a.n_kv; i++) a.mask.push_back(i % a.n_kv < kWritten ? 0 : -INFINITY);
        return rig.attend(a);
    }
};

TEST_P(OtherReads, GetDecodedRowsAndChangeNothing) {
    OpRig f16("f16", kShape), raw(compressed("raw"), kShape), turbo8(compressed("turbo8"), kShape), untouched(compressed("turbo8"), kShape);
    for (OpRig* rig : {&f16, &raw, &turbo8, &untouched}) fill(*rig);
    const std::vector<float> reference = read(f16);
    EXPECT_LT(relative_error(read(raw), reference), 1e-6);
    const double error = relative_error(read(turbo8), reference);  // of a vector: sqrt(.00005)
    EXPECT_GT(error, 2e-3);
    EXPECT_LT(error, 1.5e-2);
    EXPECT_EQ(look(turbo8), look(untouched));
}

INSTANTIATE_TEST_SUITE_P(Cases, OtherReads, testing::ValuesIn(kReads), [](const auto& test) { return std::string(test.param.name); });

TEST(OtherReads, OfRowsThatWereNeverWrittenGiveZeros) {
    OpRig rig("turbo4", kShape);
    const std::vector<float> rows =
        rig.compute([&](ggml_context* c, const OpRig::Input&) { return ggml_cast(c, cells(c, rig.k(), 0, 200), GGML_TYPE_F32); });
    EXPECT_EQ(std::ranges::count(rows, 0.0f), static_cast<long>(rows.size()));
}

TEST(OtherWrites, OfOperationsThatACompressedCacheCannotDoAreRefusedBeforeTheyRun) {
    OpRig rig("turbo4", kShape);
    fill(rig);
    const std::vector<float> x = gaussian(size_t{128} * 4, 3);
    const auto copy = [&](ggml_context* c, const OpRig::Input& input) {
        return ggml_cpy(c, input(GGML_TYPE_F32, x.data(), 128, 4, 1), ggml_view_2d(c, rig.k(), 128, 4, rig.k()->nb[1], 0));
    };
    take_log();
    try {
        rig.compute(copy);
        FAIL() << "it ran";
    } catch (const std::runtime_error& e) {
        EXPECT_NE(std::string(e.what()).find("writes its KV cache with CPY"), std::string::npos) << e.what();
    }
    // The cache serves on.
    const std::vector<float> rows =
        rig.compute([&](ggml_context* c, const OpRig::Input&) { return ggml_cast(c, cells(c, rig.k(), 0, 200), GGML_TYPE_F32); });
    EXPECT_TRUE(std::ranges::all_of(rows, [](float f) { return std::isfinite(f); }));
}

/// State of a layer that is no KV cache, by its name: keys of an indexer, n-gram state, with heads of any size.
class PlainState : public testing::TestWithParam<std::string> {};

TEST_P(PlainState, StaysAsItIsAndIsComputedOnAsWithoutADevice) {
    constexpr CacheShape shape{36, 36, 1, 64, 1};
    std::vector<std::vector<float>> results;
    for (const char* device_name : {"f16", "turbo4"}) {
        take_log();
        OpRig rig(device_name, shape, GetParam());
        if (std::string(device_name) != "f16") {
            const std::string log = take_log();
            EXPECT_NE(log.find("not compressed: cache_" + GetParam() + "k"), std::string::npos) << log;
        }
        std::vector<int64_t> rows;
        for (int i = 0; i < 50; i++) rows.push_back(63 - i);
        const std::vector<float> x = gaussian(size_t{50} * 36, 1), y = gaussian(size_t{50} * 36, 2);
        rig.write(rows, x, y);
        // In place, copied within, read.
        for (int i = 0; i < 2; i++)
            results.push_back(rig.compute([&](ggml_context* c, const OpRig::Input&) {
                ggml_tensor* half = ggml_view_2d(c, rig.k(), 36, 32, rig.k()->nb[1], 0);
                ggml_tensor* scaled = ggml_scale_inplace(c, ggml_cast(c, half, GGML_TYPE_F32), 0.5f);
                ggml_tensor* back = ggml_cpy(c, scaled, ggml_view_2d(c, rig.k(), 36, 32, rig.k()->nb[1], 32 * rig.k()->nb[1]));
                return ggml_cast(c, back, GGML_TYPE_F32);
            }));
    }
    EXPECT_EQ(results[0], results[2]);
    EXPECT_EQ(results[1], results[3]);
}

INSTANTIATE_TEST_SUITE_P(Names, PlainState, testing::Values("idx_", "ple_"), [](const auto& test) { return test.param.substr(0, 3); });

}  // namespace
}  // namespace turboquant::conformance
