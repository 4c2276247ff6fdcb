// A plain table of text.
#pragma once

#include <string>
#include <vector>

namespace turboquant::cli {

/// First row = headings. First column left-aligned, the others right-aligned, two spaces between. Ends with a line break.
std::string format_table(const std::vector<std::vector<std::string>>& rows);

}  // namespace turboquant::cli
