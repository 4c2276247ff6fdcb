// How many tokens of each sequence are kept better than the compressed cache has them, and in which form.
#pragma once

#include <algorithm>
#include <cstdint>

#include "turboquant/codec/residual.h"

namespace turboquant {

/// What is kept of a token in an exact window, beside its code.
enum class WindowForm : std::uint8_t {
    automatic,  ///< not said: `residual` where a device and formats can, else `halves`
    halves,     ///< a copy in fp16: 16 bits per value
    residual,   ///< what the code leaves, in 4 bits on top of it (codec/residual.h)
};

/// Tokens of each sequence. By default both together take 1/16 bit per value at any length: the first four at most (large models attend to
/// them as a resting place), for the rest the most recent ones (docs/quality.md: what is left of the divergence with them).
struct WindowSizes {
    static constexpr int kAuto = -1;
    int sink = kAuto, recent = kAuto;
    WindowForm form = WindowForm::automatic;

    bool any() const { return sink > 0 || recent > 0; }
    bool residual() const { return form == WindowForm::residual; }
    /// Takes over what is given in `other`. Recent tokens whose form is not said are of fp16.
    void set(const WindowSizes& other) {
        if (other.sink != kAuto) sink = other.sink;
        if (other.recent != kAuto) recent = other.recent, form = WindowForm::halves;
        if (other.form != WindowForm::automatic) form = other.form;
    }
    /// The sizes in a cache of n_cells cells per stream. `residuals`: whether device and formats can have such windows.
    WindowSizes resolve(std::int64_t n_cells, bool residuals = true) const {
        constexpr double kShare = 1.0 / 16;                      // bits per value that the default sizes take
        constexpr double kResidual = kResidualBits + 16.0 / 64;  // with its scale, at the smallest common head size
        const WindowForm as = form != WindowForm::automatic ? form : residuals ? WindowForm::residual : WindowForm::halves;
        const double token = as == WindowForm::residual ? kResidual : 16;
        const int both = static_cast<int>(static_cast<double>(n_cells) * kShare / token), first = std::min(both / 4, 4);
        return {sink == kAuto ? first : sink, recent == kAuto ? both - first : recent, as};
    }
    /// What resolved windows take in a stream of n_cells rows of n_embd values in heads of head_dim.
    double bits(std::int64_t n_cells, std::int64_t n_embd, int head_dim) const {
        const double value = residual() ? kResidualBits + 16.0 / head_dim : 16;
        return value * static_cast<double>(std::min<std::int64_t>(sink + recent, n_cells) * n_embd);
    }
    friend bool operator==(const WindowSizes&, const WindowSizes&) = default;
};

}  // namespace turboquant
