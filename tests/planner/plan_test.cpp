// Plans as files, and as SPEC text.
#include "turboquant/planner/plan.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tests/codec/temp_dir.h"
#include "turboquant/spec/kv_spec.h"

namespace turboquant {
namespace {

Plan example() {
    Plan p;
    p.model_hash = "0123abcd", p.model_name = "a \"model\"", p.n_layers = 4;
    p.budget = 4.25, p.bits_per_value = 4.1875, p.predicted_kld = 0.0027;
    p.calibration = "written by the model, seed 1", p.calibration_tokens = 4096;
    p.options.offset = false;
    p.layers = {{0, CodecId::turbo8, CodecId::turbo4, 1e-5, 2e-3},
                {1, CodecId::turbo3, CodecId::turbo4, 0.1, 0.25},
                {3, CodecId::turbo3, CodecId::turbo2, 0, 0}};
    return p;
}

std::string text_of(const Plan& p) { return to_string(to_spec(p)); }

std::string error_of(const std::string& json) {
    try {
        parse_plan(json);
    } catch (const std::invalid_argument& e) {
        return e.what();
    }
    return {};
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

TEST(Plan, RoundTrip) {
    Plan p = example();
    EXPECT_EQ(parse_plan(to_json(p)), p);
    p.measured_kld = 0.003, p.predicted_kld.reset(), p.options = {}, p.layers[1].v.reset();
    EXPECT_EQ(parse_plan(to_json(p)), p);
    EXPECT_TRUE(has(to_json(p), "\n    {\"layer\":0,\"k\":\"turbo8\",\"v\":\"turbo4\""))
        << "a layer per line, to be edited: " << to_json(p);
}

TEST(Plan, SpecTextIsWhatTheCacheReads) {
    const std::string text = text_of(example());
    EXPECT_EQ(text, "k=turbo3,v=turbo4,k0=turbo8,v3=turbo2,offset=off");
    const KvSpec spec = parse_kv_spec(text);
    for (const PlannedLayer& l : example().layers) {
        EXPECT_EQ(spec.codecs(Side::key, l.layer), l.k);
        EXPECT_EQ(spec.codecs(Side::value, l.layer), l.v);
    }
    EXPECT_FALSE(spec.offset);
    Plan without_v = example();
    for (PlannedLayer& l : without_v.layers) l.v.reset();
    without_v.options = {};
    EXPECT_EQ(to_spec(without_v).codecs(Side::key, 0), CodecId::turbo8);
}

TEST(Plan, KeyScalesTravelWithIt) {
    Plan p = example();
    p.options = {};
    const std::string without = text_of(p);
    p.layers[1].k_scales = "aaZb";
    EXPECT_EQ(parse_plan(to_json(p)), p);
    EXPECT_EQ(to_spec(p).k_scales, (std::map<int, std::string>{{1, "aaZb"}}));
    EXPECT_EQ(brief_text(to_spec(p)), without + ", key channels scaled") << "to show";
    std::string json = to_json(p);
    json.replace(json.find("aaZb"), 4, "aa-b");
    EXPECT_TRUE(has(error_of(json), "letters"));
}

TEST(Plan, FormatsPerHead) {
    Plan p = example();
    p.layers[1].k = HeadCodecs({CodecId::tcq2, CodecId::tcq5}), p.layers[2].v = HeadCodecs({CodecId::turbo4, CodecId::tcq1});
    EXPECT_EQ(parse_plan(to_json(p)), p);
    EXPECT_TRUE(has(to_json(p), "\"k\":\"tcq2/tcq5\"")) << to_json(p);
    EXPECT_EQ(text_of(p), "k=turbo3,v=turbo4,k0=turbo8,k1=tcq2/tcq5,v3=turbo4/tcq1,offset=off");
    std::string json = to_json(p);
    json.replace(json.find("tcq2/tcq5"), 9, "tcq2/raw");
    EXPECT_TRUE(has(error_of(json), "keys of layer 1")) << error_of(json);
    EXPECT_TRUE(has(error_of(json), "raw")) << error_of(json);
}

TEST(Plan, HandWrittenOneNeedsLittle) {
    const Plan p = parse_plan(R"({"turboquant_plan": 1, "model": {"hash": "x"}, "layers": [{"layer": 0, "k": "turbo4", "v": "turbo2"}]})");
    EXPECT_EQ(p.n_layers, 1);
    EXPECT_EQ(p.layers.at(0).v, CodecId::turbo2);
    EXPECT_FALSE(p.predicted_kld);
}

TEST(Plan, AnotherModelIsRefused) {
    EXPECT_NO_THROW(check_model(example(), "0123abcd", "x"));
    try {
        check_model(example(), "ffff", "other.gguf");
        FAIL();
    } catch (const std::invalid_argument& e) {
        for (const char* part : {"another model", "0123abcd", "ffff", "other.gguf", "turboquant plan"})
            EXPECT_TRUE(has(e.what(), part)) << e.what();
    }
}

TEST(Plan, BadFilesAreRefusedWithTheCause) {
    const std::string good = to_json(example());
    const auto with = [&](const std::string& from, const std::string& to) {
        std::string s = good;
        return s.replace(s.find(from), from.size(), to);
    };
    EXPECT_EQ(error_of(good), "");
    EXPECT_TRUE(has(error_of(good.substr(0, good.size() / 2)), "not the JSON"));
    EXPECT_TRUE(has(error_of("[]"), "turboquant_plan"));
    EXPECT_TRUE(has(error_of(with("\"turboquant_plan\": 1", "\"turboquant_plan\": 2")), "version 2"));
    EXPECT_TRUE(has(error_of(with("turbo8", "turbo9")), "turbo9")) << error_of(with("turbo8", "turbo9"));
    EXPECT_TRUE(has(error_of(with("turbo8", "turbo9")), "turbo4")) << "the known ones are listed";
    EXPECT_TRUE(has(error_of(with("\"layer\":1", "\"layer\":0")), "twice"));
    EXPECT_TRUE(has(error_of(with("\"layer\":3", "\"layer\":4")), "layer 4"));
    EXPECT_TRUE(has(error_of(with("\"k\":\"turbo8\",", "")), "'k'"));
    EXPECT_TRUE(has(error_of(R"({"turboquant_plan": 1, "model": {"hash": "x"}, "layers": []})"), "no layers"));
}

TEST(Plan, Files) {
    const auto path = test::temp_dir() / "plan.json";
    write_plan_file(example(), path);
    EXPECT_EQ(read_plan_file(path), example());
    std::filesystem::remove(path);
    EXPECT_THROW(read_plan_file(path), std::invalid_argument);
    EXPECT_THROW(write_plan_file(example(), "/no/such/folder/plan.json"), std::runtime_error);
}

}  // namespace
}  // namespace turboquant
