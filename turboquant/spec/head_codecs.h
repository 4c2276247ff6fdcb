// The formats of all KV heads of one side of a layer: one for all, or one per head.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "turboquant/codec/codec.h"

namespace turboquant {

/// Formats that may stand beside others in one layer: rotated ones with kernels of their own. What is common to the heads (the rotated
/// space, key offsets, scales, packed rows) is then common to all of them.
constexpr bool mixes(CodecId id) { return codec_info(id).rotated; }

class HeadCodecs {
  public:
    HeadCodecs(CodecId all) : all_(all) {}  // NOLINT: a format is the format of all heads
    /// One per KV head, in order; equal ones are one for all. Throws std::invalid_argument if it is empty, or has formats that do not mix.
    explicit HeadCodecs(std::vector<CodecId> per_head);

    bool mixed() const { return !per_head_.empty(); }
    /// Heads that are named; 1 if the format is the same for all, however many there are.
    int count() const { return mixed() ? static_cast<int>(per_head_.size()) : 1; }
    CodecId of(int head) const { return mixed() ? per_head_[static_cast<std::size_t>(head)] : all_; }

    friend bool operator==(const HeadCodecs&, const HeadCodecs&) = default;

  private:
    CodecId all_;  ///< of the first head, if they differ
    /// Empty: all are the same. So the common case has no memory of its own: every saved row names formats.
    std::vector<CodecId> per_head_;
};

/// "tcq3", or "tcq3/tcq5" for two heads. parse_head_codecs(to_string(c)) == c.
std::string to_string(const HeadCodecs& codecs);
/// Throws std::invalid_argument that names the unknown word and lists the known ones, or as HeadCodecs.
HeadCodecs parse_head_codecs(std::string_view text);
/// "turbo4, turbo3, ..." for messages.
std::string known_codec_words();

}  // namespace turboquant
