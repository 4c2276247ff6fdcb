// A model file looked at: its identity, and its cache through KvProbe.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/codec/temp_dir.h"
#include "tests/ggml/tiny_models.h"
#include "turboquant/llama/kv_probe.h"
#include "turboquant/llama/log.h"
#include "turboquant/llama/model_id.h"
#include "turboquant/llama/session.h"

namespace turboquant::llama {
namespace {

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

std::string error_of(auto&& f) {
    try {
        f();
    } catch (const std::exception& e) {
        return e.what();
    }
    return {};
}

std::string read_all(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    std::ostringstream s;
    s << in.rdbuf();
    return s.str();
}

std::string write_file(const char* name, const std::string& bytes) {
    const auto path = test::temp_dir() / name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
}

TEST(ModelId, OneByteIsAnotherModel) {
    const ModelId demo = identify_model(TQ_DEMO_MODEL);
    EXPECT_EQ(demo.hash.size(), 16u);
    EXPECT_EQ(demo.hash, identify_model(TQ_DEMO_MODEL).hash);
    std::string bytes = read_all(TQ_DEMO_MODEL);
    EXPECT_EQ(identify_model(write_file("copy.gguf", bytes)).hash, demo.hash) << "the file's name does not count";
    const std::size_t name = bytes.find("general.name") + 24;
    bytes[name]++;
    EXPECT_NE(identify_model(write_file("copy.gguf", bytes)).hash, demo.hash);
    EXPECT_TRUE(has(error_of([] { identify_model(write_file("no.gguf", "no model")); }), "GGUF"));
}

TEST(KvProbe, SlidingWindowsHaveCellsForABatch) {
    install_log();
    const std::vector<conformance::TinyModel>& tiny = conformance::tiny_models();
    const auto gemma = std::ranges::find(tiny, "gemma3", &conformance::TinyModel::name);
    ASSERT_NE(gemma, tiny.end());
    ModelFile file(conformance::write_tiny_model(*gemma, test::temp_dir()), {});
    // A window of 100 and a batch, in blocks of 256 cells.
    for (const auto& [n_batch, n_cells] : {std::pair(KvProbe::kBatch, 512), {KvProbe::kUsualBatch, 768}}) {
        const std::vector<KvLayerShape> layers = KvProbe(file, 2048, 1, n_batch).layers();
        EXPECT_EQ(std::ranges::count(layers, n_cells, &KvLayerShape::n_cells), 2) << n_batch;
        EXPECT_EQ(std::ranges::count(layers, 2048, &KvLayerShape::n_cells), 2) << n_batch;
    }
    EXPECT_EQ(KvProbe::kUsualBatch, static_cast<int>(llama_context_default_params().n_ubatch));
}

TEST(KvProbe, SeesShapesAndKeysOnTheirWay) {
    install_log();
    ModelFile file(TQ_DEMO_MODEL, {});
    KvProbe probe(file, 512, 1);
    const auto layers = probe.layers();
    ASSERT_EQ(layers.size(), 6u);
    for (int i = 0; i < 6; i++) {
        const KvLayerShape& l = layers[static_cast<std::size_t>(i)];
        EXPECT_EQ(l.layer, i);
        EXPECT_EQ(l.k_head_dim, 64);
        EXPECT_EQ(l.v_head_dim, 64);
        EXPECT_EQ(l.k_heads, 2);
        EXPECT_EQ(l.v_heads, 2);
        EXPECT_EQ(l.n_cells, 512);
        EXPECT_TRUE(l.rope);
    }
    // RoPE turns, so it keeps norms; and it does nothing at position 0.
    const std::vector<llama_token> tokens(300, 100);
    std::map<std::pair<int, KvSource>, std::vector<float>> seen;
    const auto keep = [&](const KvRows& r) {
        for (int t = 0; t < r.n_tokens; t++)
            for (int h = 0; h < r.n_heads; h++) {
                const auto row = r.row(t, h);
                auto& all = seen[{r.layer, r.source}];
                all.insert(all.end(), row.begin(), row.end());
            }
    };
    probe.run(tokens, keep, true);
    // Keys, keys before RoPE, values, queries, and the residual stream behind attention of 6 layers; the stream before those that follow another.
    EXPECT_EQ(seen.size(), 5u * 6 + 5);
    const std::size_t group = seen[{3, KvSource::query}].size() / (300 * 2 * 64);
    EXPECT_GE(group, 1u);
    for (const auto& [what, values] : seen) {
        const bool cached = what.second == KvSource::key || what.second == KvSource::key_before_rope || what.second == KvSource::value;
        EXPECT_EQ(values.size(), 300u * 2 * 64 * (cached ? 1 : group)) << "as wide as all query heads: the stream, too";
    }
    EXPECT_FALSE(seen.contains({0, KvSource::stream_before}));
    // Unasked, the last layer's attention is added for the tokens alone that logits are made of: the last of each batch.
    seen.clear();
    probe.run(tokens, keep);
    EXPECT_EQ((seen[{5, KvSource::stream}].size()), 2 * 2 * 64 * group);
    EXPECT_EQ((seen[{4, KvSource::stream}].size()), 300 * 2 * 64 * group);
    const auto &before = seen[{3, KvSource::key_before_rope}], &after = seen[{3, KvSource::key}];
    for (std::size_t v = 0; v < before.size(); v += 64) {
        double norm_before = 0, norm_after = 0, difference = 0;
        for (std::size_t i = v; i < v + 64; i++) {
            norm_before += before[i] * before[i], norm_after += after[i] * after[i];
            difference += std::abs(before[i] - after[i]);
        }
        ASSERT_GT(norm_before, 0);
        EXPECT_NEAR(norm_after / norm_before, 1, 1e-4);
        EXPECT_EQ(difference == 0, v < 128) << "token " << v / 128;
    }
}

}  // namespace
}  // namespace turboquant::llama
