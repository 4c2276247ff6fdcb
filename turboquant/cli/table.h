// A plain table of text, and a progress bar.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace turboquant::cli {

/// First row = headings. First column left-aligned, the others right-aligned, two spaces between. Ends with a line break.
std::string format_table(const std::vector<std::vector<std::string>>& rows);

/// A bar on stderr, drawn only if stderr is a terminal and at most ten times a second; erased at the end.
class ProgressBar {
  public:
    ProgressBar(std::string label, double total);
    ~ProgressBar();
    ProgressBar(const ProgressBar&) = delete;
    ProgressBar& operator=(const ProgressBar&) = delete;

    void add(double amount);

  private:
    std::string label_;
    double total_, done_ = 0;
    std::int64_t start_us_, drawn_us_ = 0;
    bool terminal_;
};

}  // namespace turboquant::cli
