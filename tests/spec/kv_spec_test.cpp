#include "turboquant/spec/kv_spec.h"

#include <gtest/gtest.h>

using namespace turboquant;

TEST(KvSpec, WordsSetBothSides) {
    for (const CodecInfo& c : kCodecs) {
        const KvSpec s = parse_kv_spec(c.name);
        EXPECT_EQ(s.k, c.id);
        EXPECT_EQ(s.v, c.id);
        EXPECT_EQ(to_string(s), c.name);
    }
}

TEST(KvSpec, LongFormRoundTrips) {
    for (const char* text : {"k=turbo4,v=turbo2", "k=raw,v=turbo8", "turbo3,norm=eden", "turbo3,sink=0,recent=0", "turbo3,recent=64",
                             "k=turbo4,v=turbo3,offset=off,norm=plain", "k=turbo4,v=turbo3,k0=turbo8,k12=raw,v3=turbo2",
                             "turbo4,offset=off", "turbo3,recent=32:4", "turbo8,sink=2,recent=32:4"})
        EXPECT_EQ(to_string(parse_kv_spec(text)), text);
    EXPECT_EQ(to_string(parse_kv_spec("v=turbo4,k=turbo4")), "turbo4");
    EXPECT_EQ(to_string(parse_kv_spec("turbo4,norm=raw")), "turbo4,norm=plain") << "as 0.1.0 wrote it";
}

TEST(KvSpec, BadTextSaysWhatIsKnown) {
    for (const char* text :
         {"", "turbo7", "k=turbo4", "k=turbo4,v=", "q=turbo4,v=turbo4", "turbo4,k=", "turbo4,kx=turbo4", "turbo4,offset=maybe", "k0=turbo4",
          "turbo4,norm=best", "turbo4,sink=-1", "turbo4,recent=x", "turbo4,recent=70000", "turbo4,recent=8:3", "turbo4,recent=:4",
          "turbo4,recent=8:44", "turbo4,sink=8:4", ",", "turbo4,"}) {
        try {
            parse_kv_spec(text);
            ADD_FAILURE() << "accepted '" << text << "'";
        } catch (const std::invalid_argument& e) {
            EXPECT_TRUE(std::string(e.what()).find("known") != std::string::npos || std::string(e.what()).find("both") != std::string::npos)
                << e.what();
        }
    }
}

TEST(KvSpec, WindowsOfResiduals) {
    const WindowSizes w = parse_kv_spec("turbo3,sink=2,recent=32:4").windows;
    EXPECT_EQ(w, (WindowSizes{2, 32, WindowForm::residual}));
    EXPECT_EQ(parse_kv_spec("turbo3,recent=32").windows.form, WindowForm::halves);
    EXPECT_EQ(parse_kv_spec("turbo3,sink=3").windows.form, WindowForm::automatic);
    EXPECT_EQ(w.bits(2048, 128, 64), 34 * 128 * 4.25);
    EXPECT_EQ(w.bits(20, 128, 128), 20 * 128 * 4.125) << "not more than there are cells";
    // 1/16 bit per value, whatever is kept.
    for (const WindowSizes& sizes : {WindowSizes{}.resolve(2048), WindowSizes{}.resolve(2048, false)}) {
        EXPECT_LE(sizes.bits(2048, 64, 64), 2048 * 64 / 16.0);
        EXPECT_GT(sizes.bits(2048, 64, 64), 2048 * 64 / 16.0 - 64 * 4.25);
    }
    // What is given later counts; tokens without a form are of fp16.
    WindowSizes set = w;
    set.set({1, WindowSizes::kAuto});
    EXPECT_EQ(set, (WindowSizes{1, 32, WindowForm::residual}));
    set.set({WindowSizes::kAuto, 6});
    EXPECT_EQ(set, (WindowSizes{1, 6, WindowForm::halves}));
    // Codes that have no place for them.
    for (const char* text : {"outlier3,recent=8:4", "k=turbo3,v=raw,recent=8:4", "k=turbo3,v=turbo3,k7=raw,recent=8:4"})
        EXPECT_THROW(parse_kv_spec(text), std::invalid_argument) << text;
    EXPECT_NO_THROW(parse_kv_spec("k=turbo3,v=turbo3,k7=raw,v7=raw,recent=8:4")) << "a layer that is not compressed has no windows";
    EXPECT_EQ(parse_kv_spec("outlier3").windows_of(0, 2048), (WindowSizes{2, 6, WindowForm::halves}));
    EXPECT_EQ(parse_kv_spec("turbo3").windows_of(0, 2048, false), (WindowSizes{2, 6, WindowForm::halves}));
    EXPECT_EQ(parse_kv_spec("turbo3").windows_of(0, 2048), (WindowSizes{4, 26, WindowForm::residual}));
}

TEST(KvSpec, KeyScalesByLayer) {
    const char* text = "k=turbo4,v=turbo3,scale0=aabZ,scale12=zzAA";
    const KvSpec s = parse_kv_spec(text);
    EXPECT_EQ(s.k_scales, (std::map<int, std::string>{{0, "aabZ"}, {12, "zzAA"}}));
    EXPECT_EQ(to_string(s), text);
    EXPECT_EQ(brief_text(s), "k=turbo4,v=turbo3, key channels scaled");
    EXPECT_NE(s, parse_kv_spec("k=turbo4,v=turbo3")) << "another device";
    for (const char* bad : {"turbo4,scale=aa", "turbo4,scale0=a1", "turbo4,scalex=aa", "turbo4,scale0=aa,offset=off"})
        EXPECT_THROW(parse_kv_spec(bad), std::invalid_argument) << bad;
}

TEST(KvSpec, FormatsPerHead) {
    const char* text = "k=turbo4,v=turbo3,k2=turbo8/tcq3,v0=tcq2/turbo2/tcq2";
    const KvSpec s = parse_kv_spec(text);
    EXPECT_EQ(s.codecs(Side::key, 2), HeadCodecs({CodecId::turbo8, CodecId::tcq3}));
    EXPECT_EQ(s.codecs(Side::key, 2).of(1), CodecId::tcq3);
    EXPECT_EQ(to_string(s), text);
    EXPECT_EQ(parse_kv_spec("turbo4,k2=turbo8/turbo8").codecs(Side::key, 2), CodecId::turbo8) << "alike: however many heads there are";
    for (const char* bad : {"turbo4,k2=turbo8/raw", "turbo4,k2=outlier3/turbo4", "turbo4,k2=turbo8/", "turbo4,k2=/turbo8",
                            "turbo4,k2=turbo8/x9", "turbo4/turbo3", "k=turbo4/turbo3,v=turbo3"})
        EXPECT_THROW(parse_kv_spec(bad), std::invalid_argument) << bad;
}

TEST(KvSpec, LayersOverride) {
    const KvSpec s = parse_kv_spec("k=turbo4,v=turbo3,k2=turbo8,v0=turbo2");
    EXPECT_EQ(s.codecs(Side::key, 2), CodecId::turbo8);
    EXPECT_EQ(s.codecs(Side::key, 0), CodecId::turbo4);
    EXPECT_EQ(s.codecs(Side::value, 0), CodecId::turbo2);
    EXPECT_EQ(s.codecs(Side::value, 2), CodecId::turbo3);
}
