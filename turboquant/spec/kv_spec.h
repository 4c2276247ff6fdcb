// The specification of a cache, and its text: which format keys and values are stored in.
//
// clang-format off
//   SPEC = WORD | ITEM,ITEM,...       WORD = a name of kCodecs (both sides)
//   ITEM = k=WORD | v=WORD            keys, values of all layers (both are needed)
//        | k<N>=WORDS | v<N>=WORDS    of layer N alone: k0=turbo8, or k0=turbo8/turbo4, a WORD per KV head
//        | scale<N>=LETTERS           key channels of layer N scaled (channel_scales.h): a letter per channel of all its KV heads; written by plans
//        | OPTION
//   OPTION = offset=on|off            key offset removal (cache/key_offset.h); on unless said otherwise
//        | norm=plain|corrected|eden  scale stored with each vector; unless given, corrected for keys and eden for values
//        | outlier=RATIO              formats with outlier channels: those above RATIO times their head's median RMS (cache/outlier_channels.h); 3
//        | sink=N | recent=N[:4]      exact windows (windows.h): of the first N and the most recent N tokens of every sequence 4 bits are kept on top
//                                     of their codes, or, where recent has no :4, fp16 values; 4 bits, for 1/16 bit per value in all, unless said otherwise
// clang-format on
// llama.cpp's own cache types (f16, q8_0, ...) are not formats of ours: the command handles them before it comes here. What else may stand
// in a SPEC's place (auto:BITS, FILE.json): words.h.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "turboquant/codec/codec.h"
#include "turboquant/spec/head_codecs.h"
#include "turboquant/spec/windows.h"

namespace turboquant {

/// What holds for all layers, beside the formats.
struct SpecOptions {
    bool offset = true;
    std::optional<NormMode> norm_mode;  ///< none: default_norm_mode of each side
    float outlier_ratio = kOutlierRatio;
    WindowSizes windows;

    NormMode norm(Side side) const { return norm_mode.value_or(default_norm_mode(side)); }

    friend bool operator==(const SpecOptions&, const SpecOptions&) = default;
};

struct KvSpec : SpecOptions {
    CodecId k = kCodecs[0].id;
    CodecId v = kCodecs[0].id;
    std::map<int, HeadCodecs> k_layers, v_layers;  ///< exceptions, by layer number
    std::map<int, std::string> k_scales;           ///< by layer number: letters

    SpecOptions& options() { return *this; }
    const SpecOptions& options() const { return *this; }

    /// Formats of one side of one layer.
    HeadCodecs codecs(Side side, int layer) const;
    void set(Side side, int layer, const HeadCodecs& codecs) { (side == Side::key ? k_layers : v_layers).insert_or_assign(layer, codecs); }

    /// Exact windows of one layer in a cache of n_cells cells; none if it is uncompressed. `residuals`: whether the device can have such.
    WindowSizes windows_of(int layer, std::int64_t n_cells, bool residuals = true) const {
        return compressed(layer) ? windows.resolve(n_cells, residuals && takes_residuals(layer)) : WindowSizes{0, 0, WindowForm::halves};
    }
    bool compressed(int layer) const { return codecs(Side::key, layer) != CodecId::raw || codecs(Side::value, layer) != CodecId::raw; }
    /// Whether residuals can stand on the codes of a layer: on both sides, in all heads.
    bool takes_residuals(int layer) const;
    /// The first compressed layer where they cannot; -1: those that nothing is said of.
    std::optional<int> layer_without_residuals() const;

    friend bool operator==(const KvSpec&, const KvSpec&) = default;
};

/// Both sides of all layers in one format each.
KvSpec uniform_spec(CodecId k, CodecId v, const SpecOptions& options = {});

/// Throws std::invalid_argument; the text names the unknown word and lists the known ones.
KvSpec parse_kv_spec(std::string_view text);
/// Canonical text: the single word if k == v and all else is default, else the long form. parse_kv_spec(to_string(s)) == s.
std::string to_string(const KvSpec& spec);
/// The same without the letters of k_scales: to show.
std::string brief_text(KvSpec spec);

/// "sink=4,recent=26:4": what of them is given.
std::string to_string(const WindowSizes& windows);

/// OPTIONs alone, separated by commas; "" is none. Throws std::invalid_argument, also for items that are none.
SpecOptions parse_spec_options(std::string_view text);
/// Those that are not the default, "" if all are. parse_spec_options(to_string(o)) == o.
std::string to_string(const SpecOptions& options);

}  // namespace turboquant
