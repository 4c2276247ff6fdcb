// A row of a KV tensor on its way out of a cache or into one: what the cache and the *packers* agree on. A packer turns rows into bytes of
// some form and back; one writes llama.cpp's state (saved_rows.h). The cache decides what a row is saved as and what becomes of it, and
// knows no form; a packer knows nothing of tiles, windows and offsets but what stands here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/codec/tile.h"
#include "turboquant/spec/head_codecs.h"

namespace turboquant {

enum class RowKind : std::uint8_t {
    codes,      ///< what is stored, bit for bit
    plain,      ///< fp16 values in the model's space: formats without row form, values of exact windows, rows of other caches
    measuring,  ///< fp16 keys of a sequence whose offset is not frozen yet
    exact,      ///< keys of an exact window of fp16, of a sequence whose offset is; their codes come back by encoding them again
};

/// What codes are codes of. They come back bit for bit where this is the same, and decoded elsewhere.
struct RowForm {
    HeadCodecs codecs = CodecId::turbo4;
    int head_dim = 0;
    std::uint32_t scale_hash = 0;  ///< of the scales of the key channels (KeyOffset); 0: not scaled

    std::size_t head_bytes(int head) const { return row_bytes(codecs.of(head), head_dim); }
    friend bool operator==(const RowForm&, const RowForm&) = default;
};

struct RowSnapshot {
    RowKind kind = RowKind::plain;
    std::int32_t pos = -1;                   ///< of the token; -1: unknown, or nothing depends on it
    int sequence = 0;                        ///< measuring: tells the sequences of one state apart
    std::uint32_t mu_hash = 0;               ///< codes, exact: of the offset that was removed (hash_mu); 0: none
    std::span<const std::uint16_t> mu;       ///< all of it, fp16, [n_head][head_dim]; on the way in it is asked for (RowReader::mu)
    const RowForm* form = nullptr;           ///< codes
    std::span<const std::uint8_t> codes;     ///< codes: of all heads, in row form (codec/tile.h). Not on the way out: RowWriter::begin
    std::span<const std::uint8_t> residual;  ///< codes of a row in a window of residuals: what they leave, of all heads (codec/residual.h)
    std::span<const std::uint16_t> values;   ///< all other kinds: n_embd fp16 values
};

/// Takes rows of one KV tensor out of a cache, in ascending order; `i` counts from the first one of the call.
class RowWriter {
  public:
    virtual ~RowWriter() = default;
    /// Whether a row of keys can say that it is exact. If not, it goes as codes.
    virtual bool takes_exact() const = 0;
    /// A row of any kind but codes.
    virtual void write(std::int64_t i, const RowSnapshot& row) = 0;
    /// All of a row but its codes, or its values if it is plain; returns where those go. They are written before the call of the cache ends.
    /// Of successive rows of one kind these places lie stride() bytes apart.
    virtual std::uint8_t* begin(std::int64_t i, const RowSnapshot& row) = 0;
    virtual std::size_t stride() const = 0;
};

/// Hands rows in.
class RowReader {
  public:
    virtual ~RowReader() = default;
    /// Row i, each once, in ascending order. What it refers to stays for the call of the cache. Any bytes may have come from outside: sizes
    /// are right, formats are known, nothing else is taken for granted.
    virtual RowSnapshot read(std::int64_t i) = 0;
    /// Bytes between the codes of successive rows of one form.
    virtual std::size_t stride() const = 0;
    /// The offset of this hash, if the rows read until now tell all of it; else empty.
    virtual std::span<const std::uint16_t> mu(std::uint32_t hash) = 0;
};

}  // namespace turboquant
