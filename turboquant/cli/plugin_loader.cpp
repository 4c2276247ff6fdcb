#include "turboquant/cli/plugin_loader.h"

#include <array>
#include <filesystem>

#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/log.h"

namespace turboquant::cli {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFile = "libggml-turboquant.so";

/// Build tree and install tree have the same shape: bin/turboquant beside lib/libggml-turboquant.so (TQ_LIBDIR where lib is split).
std::string find_library_file() {
    std::error_code error;
    const fs::path bin = fs::read_symlink("/proc/self/exe", error).parent_path();
    std::string tried;
    for (const fs::path& dir : {bin / ".." / "lib", bin / ".." / TQ_LIBDIR, bin}) {
        const fs::path file = (dir / kFile).lexically_normal();
        if (fs::exists(file, error)) return file;
        tried += "\n    " + file.string();
    }
    throw CommandError(fmt::format("{} was not found; build it (make build) or name it with --backend FILE. Looked for:{}", kFile, tried));
}

}  // namespace

Plugin::Plugin(const std::string& path) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("turboquant");
    if (!reg) {
        const std::string file = path.empty() ? find_library_file() : path;
        if (!fs::exists(file)) throw CommandError(fmt::format("backend library '{}' does not exist; check --backend", file));
        reg = ggml_backend_load(file.c_str());
        if (!reg)
            throw CommandError(
                fmt::format("ggml refused the backend library '{}'; is it built for this llama.cpp?{}", file, take_log_problems()));
    }
    const auto get = [reg](auto& proc, const char* name) {
        proc = reinterpret_cast<std::remove_reference_t<decltype(proc)>>(ggml_backend_reg_get_proc_address(reg, name));
        if (!proc)
            throw CommandError(fmt::format("the backend library lacks '{}'; it is no libggml-turboquant, or of another version", name));
    };
    get(device_, "turboquant_device");
    get(stats_, "turboquant_kv_stats");
    get(last_error_, "turboquant_last_error");
    get(config_, "turboquant_config");
}

ggml_backend_dev_t Plugin::device(const KvSpec& spec) const {
    std::array<char, 512> error{};
    const ggml_backend_dev_t dev = device_(to_string(spec).c_str(), error.data(), error.size());
    if (!dev) throw CommandError(error.data());
    return dev;
}

turboquant_kv_stats Plugin::stats(ggml_backend_dev_t dev) const {
    turboquant_kv_stats s{};
    stats_(dev, &s);
    return s;
}

}  // namespace turboquant::cli
