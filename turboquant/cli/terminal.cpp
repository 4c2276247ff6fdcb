#include "turboquant/cli/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "llama.h"

namespace turboquant::cli {
namespace {

/// Works within works (a text to calibrate on, for a plan) lie on a stack; the innermost is drawn.
class ProgressBars {
  public:
    void tell(std::string_view name, double done, double total) {
        if (!terminal_) return;
        const std::int64_t now = llama_time_us();
        if (done == 0 && (stack_.empty() || stack_.back().name != name)) stack_.push_back({std::string(name), now});
        if (stack_.empty() || stack_.back().name != name) return;
        if (done >= total) {
            stack_.pop_back();
            erase();
        } else if (now - drawn_us_ >= 100'000) {
            drawn_us_ = now;
            draw(stack_.back(), total > 0 ? std::clamp(done / total, 0.0, 1.0) : 0, now);
        }
    }
    /// Before anything else is written.
    void erase() {
        if (drawn_us_) std::fputs("\r\033[K", stderr);
        drawn_us_ = 0;
    }

  private:
    struct Bar {
        std::string name;
        std::int64_t start_us;
    };

    void draw(const Bar& bar, double share, std::int64_t now) const {
        constexpr int kWidth = 30;
        const int filled = static_cast<int>(share * kWidth);
        const double left = share > 0 ? static_cast<double>(now - bar.start_us) * 1e-6 * (1 - share) / share : 0;
        fmt::print(stderr, "\r{} [{:=<{}}{: <{}}] {:3.0f} %  {:.0f} s left \033[K", bar.name, "", filled, "", kWidth - filled, 100 * share,
                   left);
        std::fflush(stderr);
    }

    bool terminal_ = isatty(STDERR_FILENO) != 0;
    std::int64_t drawn_us_ = 0;
    std::vector<Bar> stack_;
};

}  // namespace

llama::Monitor terminal_monitor() {
    const auto bars = std::make_shared<ProgressBars>();
    return {.progress = [bars](std::string_view name, double done, double total) { bars->tell(name, done, total); },
            .log =
                [bars](const std::string& line) {
                    bars->erase();
                    fmt::print(stderr, "{}\n", line);
                }};
}

}  // namespace turboquant::cli
