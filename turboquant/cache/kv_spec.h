// The SPEC word of `--kv`, of device names and of the configuration variable: which format keys and values are stored in.
//
//   SPEC  = WORD | "k=" WORD ",v=" WORD [",norm=" MODE]      WORD = a name of kCodecs     MODE = raw | corrected | eden
// llama.cpp's own cache types (f16, q8_0, ...) are not formats of ours: the command handles them before it comes here.
#pragma once

#include <string>
#include <string_view>

#include "turboquant/codec/codec.h"

namespace turboquant {

struct KvSpec {
    CodecId k = kCodecs[0].id;
    CodecId v = kCodecs[0].id;
    NormMode norm_mode = NormMode::corrected;

    friend bool operator==(const KvSpec&, const KvSpec&) = default;
};

/// Throws std::invalid_argument; the text names the unknown word and lists the known ones.
KvSpec parse_kv_spec(std::string_view text);
/// Canonical text: the single word if k == v and all else is default, else the long form. parse_kv_spec(to_string(s)) == s.
std::string to_string(const KvSpec& spec);
/// "turbo4, turbo3, ..." for messages.
std::string known_codec_words();

}  // namespace turboquant
