// The SPEC word of `--kv`, of device names and of the configuration variable: which format keys and values are stored in.
//
//   SPEC = WORD | ITEM,ITEM,...       WORD = a name of kCodecs (both sides)
//   ITEM = k=WORD | v=WORD            keys, values of all layers (both are needed)
//        | k<N>=WORDS | v<N>=WORDS    of layer N alone: k0=turbo8, or k0=turbo8/turbo4, a WORD per KV head
//        | offset=on|off              key offset removal (key_offset.h); on unless said otherwise
//        | norm=raw|corrected|eden    scale stored with each vector; unless given, corrected for keys and eden for values
//        | outlier=RATIO              formats with outlier channels: those above RATIO times their head's median RMS (outlier_channels.h);
//        3
//        | scale<N>=LETTERS           key channels of layer N scaled (codec/channel_scales.h): a letter per channel of all its KV heads;
//        written by plans
//        | sink=N | recent=N         the first N and the most recent N tokens of every sequence stay in fp16, too (exact_rows.h); 1/256 of
//        the context both together unless said otherwise
// llama.cpp's own cache types (f16, q8_0, ...) are not formats of ours: the command handles them before it comes here.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "turboquant/cache/exact_rows.h"
#include "turboquant/codec/head_codecs.h"

namespace turboquant {

struct KvSpec {
    CodecId k = kCodecs[0].id;
    CodecId v = kCodecs[0].id;
    std::map<int, HeadCodecs> k_layers, v_layers;  ///< exceptions, by layer number
    bool offset = true;
    std::optional<NormMode> norm_mode;  ///< none: default_norm_mode of each side
    float outlier_ratio = kOutlierRatio;
    WindowSizes windows;
    std::map<int, std::string> k_scales;  ///< by layer number: letters

    NormMode norm(Side side) const { return norm_mode.value_or(default_norm_mode(side)); }
    /// Formats of one side of one layer.
    HeadCodecs codecs(Side side, int layer) const;

    /// Exact windows of one layer in a cache of n_cells cells; none if it is uncompressed.
    WindowSizes windows_of(int layer, std::int64_t n_cells) const {
        const bool compressed = codecs(Side::key, layer) != CodecId::raw || codecs(Side::value, layer) != CodecId::raw;
        return compressed ? windows.resolve(n_cells) : WindowSizes{0, 0};
    }

    friend bool operator==(const KvSpec&, const KvSpec&) = default;
};

/// Throws std::invalid_argument; the text names the unknown word and lists the known ones.
KvSpec parse_kv_spec(std::string_view text);
/// Canonical text: the single word if k == v and all else is default, else the long form. parse_kv_spec(to_string(s)) == s.
std::string to_string(const KvSpec& spec);
/// The same without the letters of k_scales: to show.
std::string brief_text(KvSpec spec);

}  // namespace turboquant
