// FNV-1a (Fowler, Noll, Vo): a fingerprint, not a protection. Files and saved states hold its values, so it must stay what it is.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

namespace turboquant {

template <std::unsigned_integral T>
requires(sizeof(T) == 4 || sizeof(T) == 8) class Fnv1a {
  public:
    constexpr void add(std::uint8_t byte) { value_ = (value_ ^ byte) * static_cast<T>(sizeof(T) == 4 ? 0x01000193u : 0x100000001b3u); }
    /// All bytes of text, or of a file.
    template <class Bytes>
    constexpr void add_all(const Bytes& bytes) {
        for (const auto b : bytes) add(static_cast<std::uint8_t>(b));
    }
    constexpr T value() const { return value_; }

  private:
    T value_ = static_cast<T>(sizeof(T) == 4 ? 0x811c9dc5u : 0xcbf29ce484222325u);
};

}  // namespace turboquant
