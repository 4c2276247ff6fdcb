#include "turboquant/cli/table.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "fmt/format.h"
#include "llama.h"

namespace turboquant::cli {

std::string format_table(const std::vector<std::vector<std::string>>& rows) {
    std::vector<std::size_t> width;
    for (const auto& row : rows)
        for (std::size_t c = 0; c < row.size(); c++) {
            if (c == width.size()) width.push_back(0);
            width[c] = std::max(width[c], row[c].size());
        }
    std::string out;
    for (const auto& row : rows) {
        for (std::size_t c = 0; c < row.size(); c++)
            out += c ? fmt::format("  {:>{}}", row[c], width[c]) : fmt::format("{:<{}}", row[c], width[c]);
        out += '\n';
    }
    return out;
}

ProgressBar::ProgressBar(std::string label, double total)
    : label_(std::move(label)), total_(total), start_us_(llama_time_us()), terminal_(isatty(STDERR_FILENO) != 0) {}

ProgressBar::~ProgressBar() {
    if (drawn_us_) std::fputs("\r\033[K", stderr);
}

void ProgressBar::add(double amount) {
    done_ += amount;
    const std::int64_t now = llama_time_us();
    if (!terminal_ || now - drawn_us_ < 100'000) return;
    drawn_us_ = now;
    constexpr int kWidth = 30;
    const double share = std::clamp(done_ / total_, 0.0, 1.0);
    const int filled = static_cast<int>(share * kWidth);
    const double left = share > 0 ? static_cast<double>(now - start_us_) * 1e-6 * (1 - share) / share : 0;
    fmt::print(stderr, "\r{} [{:=<{}}{: <{}}] {:3.0f} %  {:.0f} s left \033[K", label_, "", filled, "", kWidth - filled, 100 * share, left);
    std::fflush(stderr);
}

}  // namespace turboquant::cli
