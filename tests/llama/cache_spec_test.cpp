// The words of --kv: whose cache they mean, and what the user is told when they mean nothing.
#include "turboquant/llama/cache_spec.h"

#include <gtest/gtest.h>

#include <string>

#include "turboquant/llama/error.h"

namespace turboquant::llama {
namespace {

std::string error_of(std::string_view text) {
    try {
        parse_cache_spec(text);
    } catch (const std::exception& e) {
        return e.what();
    }
    return {};
}

TEST(CacheSpec, EveryWordGoesToItsOwner) {
    for (const ggml_type type : llama_cache_types()) {
        const CacheSpec s = parse_cache_spec(ggml_type_name(type));
        EXPECT_FALSE(s.ours);
        EXPECT_EQ(s.type_k, type);
        EXPECT_EQ(s.type_v, type);
        EXPECT_EQ(s.name, ggml_type_name(type));
    }
    for (const CodecInfo& c : kCodecs) {
        const CacheSpec s = parse_cache_spec(c.name);
        ASSERT_TRUE(s.ours);
        EXPECT_EQ(s.ours->k, c.id);
        EXPECT_EQ(s.type_k, GGML_TYPE_F16);  // a quantized nominal type would make llama.cpp rotate K and V itself
        EXPECT_EQ(s.name, c.name);
        EXPECT_FALSE(find_llama_type(c.name)) << "a word must not mean both";
    }
}

TEST(CacheSpec, SidesApart) {
    const CacheSpec s = parse_cache_spec("v=q4_0,k=q8_0");
    EXPECT_EQ(s.type_k, GGML_TYPE_Q8_0);
    EXPECT_EQ(s.type_v, GGML_TYPE_Q4_0);
    EXPECT_EQ(s.name, "k=q8_0,v=q4_0");
    EXPECT_EQ(parse_cache_spec("k=q8_0,v=q8_0").name, "q8_0");
    EXPECT_EQ(parse_cache_spec("k=turbo4,v=turbo3").ours->v, CodecId::turbo3);
}

TEST(CacheSpec, ErrorsNameTheWordAndListBothKinds) {
    const std::string unknown = error_of("turbo9");
    for (const char* part : {"turbo9", "turbo4", "turbo8", "raw", "f16", "q8_0", "iq4_nl"})
        EXPECT_NE(unknown.find(part), unknown.npos) << unknown;
    EXPECT_NE(error_of("k=turbo4,v=nope").find("iq4_nl"), std::string::npos);
    EXPECT_NE(error_of("").find("known"), std::string::npos);
    EXPECT_NE(error_of("k=f16,v=turbo4").find("mixes"), std::string::npos);
    EXPECT_NE(error_of("k=turbo4,v=q8_0").find("raw"), std::string::npos);
    EXPECT_NE(error_of("k=turbo4").find("v="), std::string::npos);
    EXPECT_NE(error_of("k=q8_0,v=q4_0,norm=eden").find("no options"), std::string::npos);
}

TEST(CacheSpec, ListDropsRepetitions) {
    const auto specs = parse_cache_specs({"q8_0", "k=q8_0,v=q8_0", "q4_0"});
    ASSERT_EQ(specs.size(), 2u);
    EXPECT_EQ(specs[1].name, "q4_0");
}

TEST(CacheSpec, BitsPerValue) {
    EXPECT_EQ(bits_per_value(GGML_TYPE_F16), 16);
    EXPECT_EQ(bits_per_value(GGML_TYPE_Q8_0), 8.5);
    EXPECT_EQ(bits_per_value(GGML_TYPE_Q4_0), 4.5);
}

}  // namespace
}  // namespace turboquant::llama
