// What llama.cpp and ggml do to the memory of KV tensors: read and write parts, set bytes, clear, copy.
#include <cmath>
#include <cstring>
#include <random>

#include "tests/ggml/op_rig.h"

namespace turboquant::conformance {
namespace {

constexpr CacheShape kShape{64, 64, 2, 256, 2};
constexpr int kWritten = 180;  ///< per stream: ends within a tile
constexpr RopeOp kRope{64, 2};

struct Written {
    std::vector<int64_t> rows;
    std::vector<int32_t> pos;
    std::vector<float> k, v;
};

Written random_rows(int stream, int first, int n, uint32_t seed) {
    Written w;
    for (int i = first; i < first + n; i++) w.rows.push_back(stream * kShape.n_cells + i), w.pos.push_back(i);
    w.k = gaussian(static_cast<size_t>(n) * kShape.n_embd_k(), seed), w.v = gaussian(static_cast<size_t>(n) * kShape.n_embd_v(), seed + 1);
    for (size_t i = 0; i < w.k.size(); i++) w.k[i] += std::sin(static_cast<float>(i % 128));
    return w;
}

void write(OpRig& rig, const Written& w) { rig.write(w.rows, w.k, w.v, kRope, w.pos); }

/// Attention over the first n cells of each stream.
std::vector<float> look(OpRig& rig, int n = kWritten) {
    AttendOp a;
    a.n_streams = kShape.n_streams, a.n_tokens = 3, a.n_kv = kShape.n_cells;
    a.q = gaussian(static_cast<size_t>(a.n_streams * a.n_tokens * a.n_head * kShape.k_dim), 7);
    a.scale = 0.125f;
    for (int t = 0; t < a.n_streams * a.n_tokens; t++)
        for (int i = 0; i < a.n_kv; i++) a.mask.push_back(i < n ? 0 : -INFINITY);
    return rig.attend(a);
}

using Bytes = std::vector<uint8_t>;
Bytes get(ggml_tensor* t, size_t offset, size_t size) {
    Bytes b(size);
    ggml_backend_tensor_get(t, b.data(), offset, size);
    return b;
}
Bytes get(ggml_tensor* t) { return get(t, 0, ggml_nbytes(t)); }
void set(ggml_tensor* t, const Bytes& b, size_t offset = 0) { ggml_backend_tensor_set(t, b.data(), offset, b.size()); }

class Buffer : public testing::TestWithParam<std::string> {
  protected:
    /// A filled cache.
    std::unique_ptr<OpRig> filled(uint32_t seed = 20, const std::string& spec = GetParam()) const {
        auto rig = std::make_unique<OpRig>(spec, kShape);
        for (int s = 0; s < kShape.n_streams; s++) {
            write(*rig, random_rows(s, 0, 150, seed + 10 * s));
            write(*rig, random_rows(s, 150, kWritten - 150, seed + 10 * s + 5));
        }
        return rig;
    }
    /// An empty cache that knows its head size, as llama.cpp's are when state is restored (it reserves its graphs first).
    std::unique_ptr<OpRig> empty() const {
        auto rig = std::make_unique<OpRig>(GetParam(), kShape);
        write(*rig, random_rows(0, 0, 1, 99));
        ggml_backend_buffer_clear(rig->buffer(), 0);
        return rig;
    }
};

TEST_P(Buffer, WholeTensorsGoOutAndBack) {
    const auto rig = filled();
    const std::vector<float> before = look(*rig);
    const Bytes k = get(rig->k()), v = get(rig->v());
    const auto other = empty();
    set(other->k(), k), set(other->v(), v);
    EXPECT_EQ(look(*other), before);
    EXPECT_EQ(get(other->k()), k);
    EXPECT_EQ(get(other->v()), v);
    set(rig->k(), k), set(rig->v(), v);  // onto itself
    EXPECT_EQ(look(*rig), before);
}

TEST_P(Buffer, PartsReadAreThePartsOfTheWhole) {
    // In order, from the first row on: what a row of keys says of its place depends on which rows were read before it.
    const auto rig = filled();
    for (ggml_tensor* t : {rig->k(), rig->v()}) {
        const Bytes whole = get(t);
        std::mt19937 random(3);
        Bytes parts;
        for (int i = 0; parts.size() < whole.size(); i++) {
            const size_t size = 1 + random() % std::min<size_t>(whole.size() - parts.size(), i % 2 ? 300 : 40000);
            const Bytes part = get(t, parts.size(), size);
            parts.insert(parts.end(), part.begin(), part.end());
        }
        EXPECT_EQ(parts, whole);
    }
}

TEST_P(Buffer, PartsWrittenBackChangeNothing) {
    const auto rig = filled();
    const std::vector<float> before = look(*rig);
    for (ggml_tensor* t : {rig->k(), rig->v()}) {
        const Bytes whole = get(t);
        std::mt19937 random(4);
        for (int i = 0; i < 50; i++) {
            const size_t offset = random() % whole.size(),
                         size = 1 + random() % std::min<size_t>(whole.size() - offset, i % 2 ? 300 : 40000);
            set(t, Bytes(whole.begin() + static_cast<long>(offset), whole.begin() + static_cast<long>(offset + size)), offset);
        }
        EXPECT_EQ(get(t), whole);
    }
    EXPECT_EQ(look(*rig), before);
}

TEST_P(Buffer, RowsRestoredInAnyPiecesAndPlaces) {
    // As a saved sequence comes back into a cache whose free cells lie scattered: each run of cells is one call, by way of views of one
    // stream. Exact windows would differ: the second cache is cut back.
    const auto rig = filled(20, compressed(GetParam()));
    const auto other = filled(20, compressed(GetParam()));
    write(*other, random_rows(0, 30, 60, 500)), write(*other, random_rows(0, 100, 25, 600));
    EXPECT_NE(look(*other), look(*rig));
    for (const bool key : {true, false}) {
        ggml_tensor *from = key ? rig->k() : rig->v(), *to = key ? other->k() : other->v();
        ggml_tensor* stream = ggml_view_2d(other->views(), to, to->ne[0], to->ne[1], to->nb[1], 0);
        ggml_backend_view_init(stream);
        for (int first = 30, n = 1; first < 130; first += n, n = n % 5 + 1)
            set(stream, get(from, static_cast<size_t>(first) * from->nb[1], static_cast<size_t>(n) * from->nb[1]),
                static_cast<size_t>(first) * from->nb[1]);
    }
    EXPECT_EQ(look(*other), look(*rig));
}

TEST_P(Buffer, ClearedCacheIsAsNew) {
    const auto rig = filled();
    const std::vector<float> before = look(*rig);
    ggml_backend_buffer_clear(rig->buffer(), 0);
    for (const float x : look(*rig)) ASSERT_EQ(x, 0);
    for (int s = 0; s < kShape.n_streams; s++) {
        write(*rig, random_rows(s, 0, 150, 20 + 10 * s));
        write(*rig, random_rows(s, 150, kWritten - 150, 25 + 10 * s));
    }
    EXPECT_EQ(look(*rig), before);
}

TEST_P(Buffer, MemsetToZeroMakesZeroVectors) {
    const auto rig = filled();
    ggml_backend_tensor_memset(rig->v(), 0, 0, ggml_nbytes(rig->v()));
    for (const float x : look(*rig)) ASSERT_EQ(x, 0);
    const auto part = filled();
    ggml_backend_tensor_memset(part->v(), 0, 10 * part->v()->nb[1], 20 * part->v()->nb[1]);
    const double change = relative_error(look(*part), look(*filled()));
    EXPECT_GT(change, 0.05);  // 20 of 360 rows
    EXPECT_LT(change, 0.6);
}

TEST_P(Buffer, StreamsAreCopied) {
    const auto rig = filled();
    for (ggml_tensor* t : {rig->k(), rig->v()}) {
        ggml_tensor* stream[2];
        for (size_t s = 0; s < 2; s++) {
            stream[s] = ggml_view_2d(rig->views(), t, t->ne[0], t->ne[1], t->nb[1], s * t->nb[2]);
            ggml_backend_view_init(stream[s]);
        }
        ggml_backend_tensor_copy(stream[0], stream[1]);
        const auto copied = get(stream[1]);  // first: ranges that go forward belong to one state, whose rows are numbered
        EXPECT_EQ(copied, get(stream[0]));
    }
    // The same query over both streams.
    AttendOp a;
    a.n_kv = kShape.n_cells, a.scale = 0.125f;
    a.q = gaussian(static_cast<size_t>(a.n_head * kShape.k_dim), 8);
    for (int i = 0; i < a.n_kv; i++) a.mask.push_back(i < kWritten ? 0 : -INFINITY);
    const std::vector<float> first = rig->attend(a);
    a.first_stream = 1;
    EXPECT_EQ(rig->attend(a), first);
    // And they are apart: writing to one leaves the other.
    write(*rig, random_rows(1, 20, 40, 900));
    EXPECT_NE(rig->attend(a), first);
    a.first_stream = 0;
    EXPECT_EQ(rig->attend(a), first);
}

TEST_P(Buffer, CopiesBetweenCachesAndThroughPlainTensors) {
    const auto rig = filled();
    const std::vector<float> before = look(*rig);
    const auto other = empty();
    ggml_backend_tensor_copy(rig->k(), other->k()), ggml_backend_tensor_copy(rig->v(), other->v());
    EXPECT_EQ(look(*other), before);

    // State kept on the device: plain tensors in the same kind of buffer (llama.cpp's LLAMA_STATE_SEQ_FLAGS_ON_DEVICE).
    Owned<ggml_context> ctx(ggml_init({4 * ggml_tensor_overhead(), nullptr, true}));
    ggml_tensor* k = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F16, ggml_nelements(rig->k()));
    ggml_tensor* v = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F16, ggml_nelements(rig->v()));
    const Owned<ggml_backend_buffer> buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(rig->buffer())));
    ASSERT_TRUE(buffer);
    const auto flat = [&](ggml_tensor* t) {
        ggml_tensor* view = ggml_view_1d(rig->views(), t, ggml_nelements(t), 0);
        ggml_backend_view_init(view);
        return view;
    };
    ggml_backend_tensor_copy(flat(rig->k()), k), ggml_backend_tensor_copy(flat(rig->v()), v);
    ggml_backend_buffer_clear(rig->buffer(), 0);
    EXPECT_NE(look(*rig), before);
    ggml_backend_tensor_copy(k, flat(rig->k())), ggml_backend_tensor_copy(v, flat(rig->v()));
    EXPECT_EQ(look(*rig), before);
}

TEST_P(Buffer, StateOfLlamasOwnCacheIsTakenIn) {
    OpRig plain("f16", kShape);
    for (int s = 0; s < kShape.n_streams; s++) write(plain, random_rows(s, 0, kWritten, 20 + 10 * s));
    const auto rig = empty();
    set(rig->k(), get(plain.k())), set(rig->v(), get(plain.v()));
    const double error = relative_error(look(*rig), look(plain));
    EXPECT_LT(error, GetParam().ends_with("1") ? 1.2 : GetParam().ends_with("2") ? 0.7 : GetParam().ends_with("3") ? 0.4 : 0.2);
}

INSTANTIATE_TEST_SUITE_P(Formats, Buffer, testing::ValuesIn(with_f16()), [](const auto& test) { return test.param; });

/// Bytes that no cache wrote, or that were damaged on their way: what is computed over them is finite.
class Fuzz : public testing::TestWithParam<std::string> {};

TEST_P(Fuzz, AttentionOverDamagedRowsIsFinite) {
    std::mt19937 random(11);
    const auto written = [&](OpRig& rig) {
        for (int s = 0; s < 2; s++) write(rig, random_rows(s, 0, kWritten, 40));
        return look(rig);
    };
    OpRig unharmed(GetParam(), kShape);
    const std::vector<float> expected = written(unharmed);
    for (int round = 0; round < 60; round++) {
        OpRig rig(GetParam(), kShape);
        ASSERT_EQ(written(rig), expected);
        for (ggml_tensor* t : {rig.k(), rig.v()}) {
            Bytes bytes = get(t);
            const size_t n_damage = round % 3 == 0 ? bytes.size() : 1 + random() % 200;
            for (size_t i = 0; i < n_damage; i++) bytes[round % 3 == 0 ? i : random() % bytes.size()] = static_cast<uint8_t>(random());
            const size_t offset = random() % bytes.size(), size = 1 + random() % (bytes.size() - offset);
            set(t, Bytes(bytes.begin() + static_cast<long>(offset), bytes.begin() + static_cast<long>(offset + size)), offset);
            get(t);
        }
        // Rows that cannot be taken count as not written; nothing fails later.
        for (const float x : look(rig)) ASSERT_TRUE(std::isfinite(x)) << "round " << round;
        write(rig, random_rows(0, 60, 70, 41));
        for (const float x : look(rig)) ASSERT_TRUE(std::isfinite(x)) << "round " << round;
        ggml_backend_buffer_clear(rig.buffer(), 0);
        ASSERT_EQ(written(rig), expected) << "round " << round << ": damage outlives the rows that had it";
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, Fuzz, testing::ValuesIn(kFormats), [](const auto& test) { return test.param; });

}  // namespace
}  // namespace turboquant::conformance
