// The conformance grid that every implementation of attention is held against: instruction-set levels of the CPU, and the GPU.
#pragma once

#include "tests/kernels/support.h"

namespace turboquant::test {

inline std::vector<Case> attention_grid() {
    using enum CodecId;
    std::vector<Case> g;
    // Every codec on both sides, every head size, an odd number of cells.
    for (const CodecInfo& codec : kCodecs)
        g.push_back({.k = codec.id, .v = codec.id, .k_dim = 128, .v_dim = 128, .n_head = 4, .n_kv = 150});
    for (const int d : kHeadDims)
        for (const CodecId id : {turbo4, turbo3, turbo6, tcq5, tcq4, tcq3, tcq1})
            g.push_back({.k = id, .v = id, .k_dim = d, .v_dim = d, .n_kv = 90});
    // Mixed codecs and head sizes: all pairs of panel kinds.
    for (const auto& [k, v] : {std::pair{turbo4, turbo2},
                               {turbo8, turbo3},
                               {turbo2, raw},
                               {raw, turbo4},
                               {turbo5, turbo8},
                               {turbo3, turbo5},
                               {outlier3, turbo4},
                               {turbo3, prod3}})
        g.push_back(
            {.k = k, .v = v, .k_dim = 192, .v_dim = 128, .n_head = 6, .n_head_kv = 2, .n_tokens = 3, .n_kv = 200, .mask = Mask::causal});
    // Formats per head, panels of both kinds in one call, one row and many.
    for (const int tokens : {1, 40})
        for (const int freq : {0, 12})
            g.push_back({.n_head = 9,
                         .n_head_kv = 3,
                         .n_tokens = tokens,
                         .n_kv = 333,
                         .mask = Mask::causal,
                         .sinks = freq != 0,
                         .n_freq = freq,
                         .k_heads = {turbo8, tcq2, turbo4},
                         .v_heads = {tcq5, turbo3, turbo6}});
    // GQA groups and row counts around the register and row blocks.
    for (const int group : {1, 3, 5, 7, 8, 16, 71})
        for (const int tokens : {1, 2, 13})
            g.push_back({.k = turbo4, .v = turbo3, .n_head = group, .n_tokens = tokens, .n_kv = 70, .mask = Mask::causal});
    // Numbers of cells around a tile's size.
    for (const int n_kv : {1, 2, 63, 64, 65, 127, 128, 129, 700})
        for (const CodecId id : {turbo4, turbo8})
            g.push_back({.k = id, .v = id, .n_head = 4, .n_head_kv = 2, .n_tokens = n_kv > 2 ? 2 : 1, .n_kv = n_kv, .mask = Mask::causal});
    // Everything that changes a logit, alone and together, on both panel kinds.
    for (const CodecId id : {turbo4, turbo8}) {
        const Case base{.k = id, .v = id, .n_head = 8, .n_head_kv = 2, .n_tokens = 9, .n_kv = 333};
        for (const Mask m : {Mask::causal, Mask::random, Mask::window, Mask::some_rows_empty})
            for (const int heads : {1, 8}) {
                Case c = base;
                c.mask = m, c.mask_heads = heads;
                g.push_back(c);
                c.sinks = true;
                g.push_back(c);
            }
        for (const float bias : {0.f, 8.f})
            for (const float cap : {0.f, 5.f})
                for (const int freq : {0, 12}) {
                    Case c = base;
                    c.mask = Mask::causal, c.max_bias = bias, c.softcap = cap, c.n_freq = freq, c.sinks = freq != 0;
                    g.push_back(c);
                }
        Case c = base;
        c.n_freq = 64;  // no mask at all
        g.push_back(c);
        c.sharpness = 4;
        g.push_back(c);
        c.successive = true;
        for (const int freq : {5, 32, 64}) {
            c.n_freq = freq, c.first_pos = freq == 32 ? 4096 - 100 : freq == 64 ? (1 << 18) + 4000 : 7;
            g.push_back(c);
        }
    }
    // MLA: values are the first dims of the keys.
    for (const CodecId id : {turbo4, turbo3, turbo8, raw}) {
        g.push_back(
            {.k = id, .v = id, .k_dim = 576, .v_dim = 576, .n_head = 16, .n_tokens = 2, .n_kv = 130, .mask = Mask::causal, .mla_out = 512});
        g.push_back({.k = id, .v = id, .k_dim = 64, .v_dim = 64, .n_head = 2, .n_kv = 64, .mla_out = 64});
    }
    return g;
}

}  // namespace turboquant::test
