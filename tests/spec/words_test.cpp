// What may stand in a SPEC's place.
#include "turboquant/spec/words.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace turboquant {
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

TEST(Budget, BitsAndBytes) {
    EXPECT_EQ(parse_budget("4.25").bits, 4.25);
    EXPECT_EQ(parse_budget("512MiB").bytes, 512.0 * 1024 * 1024);
    EXPECT_EQ(parse_budget("1.5GB").bytes, 1.5e9);
    EXPECT_EQ(parse_budget("512MiB").bits, 0);
    for (const char* bad : {"", "four", "-3", "0", "4.25x", "nan", "inf", "5 MiB", "MiB"})
        EXPECT_TRUE(has(error_of([&] { parse_budget(bad); }), "512MiB")) << bad;
}

TEST(KvWord, ThreeKinds) {
    EXPECT_EQ(std::get<KvSpec>(parse_kv_word("turbo3,sink=0")), parse_kv_spec("turbo3,sink=0"));
    EXPECT_EQ(std::get<PlanFileWord>(parse_kv_word("a/plan.json")).path, "a/plan.json");
    const auto bits = std::get<AutoWord>(parse_kv_word("auto:3.25,offset=off,recent=16"));
    EXPECT_EQ(bits.budget.bits, 3.25);
    EXPECT_FALSE(bits.options.offset);
    EXPECT_EQ(bits.options.windows.recent, 16);
    EXPECT_EQ(bits.options.windows.sink, WindowSizes::kAuto);
    EXPECT_EQ(std::get<AutoWord>(parse_kv_word("auto:512MiB")).budget.bytes, 512.0 * 1024 * 1024);
    EXPECT_EQ(auto_name(4.25), "auto:4.25");
}

TEST(KvWord, MistakesAreNamed) {
    EXPECT_TRUE(has(error_of([] { parse_kv_word("auto:lots"); }), "lots"));
    EXPECT_TRUE(has(error_of([] { parse_kv_word("auto:"); }), "512MiB"));
    EXPECT_TRUE(has(error_of([] { parse_kv_word("auto:4,offset=maybe"); }), "maybe"));
    EXPECT_TRUE(has(error_of([] { parse_kv_word("auto:4,"); }), "ends with a comma"));
    for (const char* format : {"auto:4,k=turbo4", "auto:4,turbo4", "auto:4,k0=turbo4", "auto:4,scale0=aa"})
        EXPECT_TRUE(has(error_of([&] { parse_kv_word(format); }), "no option that holds for all layers")) << format;
    EXPECT_TRUE(has(error_of([] { parse_kv_word("turbo9"); }), "turbo9"));
}

TEST(SpecOptions, RoundTrip) {
    for (const char* text : {"", "offset=off", "outlier=4,norm=eden,sink=0,recent=3", "offset=off,norm=plain"})
        EXPECT_EQ(to_string(parse_spec_options(text)), text);
    EXPECT_EQ(uniform_spec(CodecId::turbo4, CodecId::turbo3, parse_spec_options("offset=off")),
              parse_kv_spec("k=turbo4,v=turbo3,offset=off"));
}

}  // namespace
}  // namespace turboquant
