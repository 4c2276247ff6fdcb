#include "turboquant/llama/gpu_backend.h"

#include <dlfcn.h>

#include <filesystem>

#include "fmt/format.h"
#include "ggml-backend.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/log.h"

namespace turboquant::llama {
namespace {

namespace fs = std::filesystem;

/// "" if it is not there.
std::string beside_ggml() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<const void*>(&ggml_backend_load), &info) || !info.dli_fname) return {};
    std::error_code error;
    const fs::path file = fs::weakly_canonical(info.dli_fname, error).parent_path() / "libggml-cuda.so";
    return fs::is_regular_file(file, error) ? file.string() : std::string();
}

}  // namespace

bool load_gpu_backend(const std::string& path) {
    if (ggml_backend_reg_by_name("CUDA")) return true;
    if (!path.empty()) {
        if (!fs::exists(path)) throw Error(fmt::format("GPU backend '{}' does not exist; check --gpu-backend", path));
        if (!ggml_backend_load(path.c_str()))
            throw Error(fmt::format("ggml refused the GPU backend '{}'; is it of this llama.cpp, and is there a driver?{}", path,
                                    take_log_problems()));
        return true;
    }
    const std::string file = beside_ggml();
    return !file.empty() && ggml_backend_load(file.c_str());
}

}  // namespace turboquant::llama
