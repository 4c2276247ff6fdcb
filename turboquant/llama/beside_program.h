// Files that are installed beside the running program.
#pragma once

#include <filesystem>
#include <span>
#include <string>

namespace turboquant::llama {

/// The first file `name` in these folders, which are absolute or relative to the folder of the program's own file. Throws Error: `remedy`,
/// and where it was looked for.
std::string find_beside_program(const std::string& name, std::span<const std::filesystem::path> folders, const std::string& remedy);

}  // namespace turboquant::llama
