#include "turboquant/spec/head_codecs.h"

#include <gtest/gtest.h>

#include <stdexcept>

using namespace turboquant;

TEST(HeadCodecs, OneForAllOrOnePerHead) {
    const HeadCodecs all = CodecId::raw, same({CodecId::tcq3, CodecId::tcq3}), mixed({CodecId::tcq3, CodecId::turbo8});
    EXPECT_FALSE(all.mixed());
    EXPECT_EQ(all.of(17), CodecId::raw);
    EXPECT_EQ(same, CodecId::tcq3);
    EXPECT_EQ(same.count(), 1);
    EXPECT_TRUE(mixed.mixed());
    EXPECT_EQ(mixed.of(0), CodecId::tcq3);
    EXPECT_EQ(mixed.of(1), CodecId::turbo8);
    EXPECT_EQ(to_string(mixed), "tcq3/turbo8");
    for (const HeadCodecs& c : {all, same, mixed}) EXPECT_EQ(parse_head_codecs(to_string(c)), c);
}

TEST(HeadCodecs, WhatDoesNotMixIsRefused) {
    EXPECT_THROW(HeadCodecs(std::vector<CodecId>{}), std::invalid_argument);
    for (const CodecInfo& c : kCodecs) {
        if (c.id == CodecId::turbo4) continue;
        const std::vector<CodecId> pair{CodecId::turbo4, c.id};
        if (c.family == Family::scalar || c.family == Family::trellis)
            EXPECT_NO_THROW(HeadCodecs{pair}) << c.name;
        else
            EXPECT_THROW(HeadCodecs{pair}, std::invalid_argument) << c.name;
    }
    EXPECT_THROW(parse_head_codecs("turbo9"), std::invalid_argument);
    EXPECT_THROW(parse_head_codecs(""), std::invalid_argument);
}
