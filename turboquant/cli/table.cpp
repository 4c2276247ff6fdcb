#include "turboquant/cli/table.h"

#include <algorithm>

#include "fmt/format.h"

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

}  // namespace turboquant::cli
