#include "turboquant/llama/beside_program.h"

#include "fmt/format.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

std::string find_beside_program(const std::string& name, std::span<const std::filesystem::path> folders, const std::string& remedy) {
    namespace fs = std::filesystem;
    std::error_code error;
    const fs::path program = fs::read_symlink("/proc/self/exe", error).parent_path();
    std::string tried;
    for (const fs::path& folder : folders) {
        const fs::path file = (program / folder / name).lexically_normal();  // an absolute folder replaces the program's
        if (fs::exists(file, error)) return file;
        tried += "\n    " + file.string();
    }
    throw Error(fmt::format("{} was not found; {}. Looked for:{}", name, remedy, tried));
}

}  // namespace turboquant::llama
