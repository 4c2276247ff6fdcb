#include "turboquant/llama/plugin_loader.h"

#include <array>
#include <filesystem>

#include "fmt/format.h"
#include "turboquant/llama/beside_program.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/log.h"

namespace turboquant::llama {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFile = "libggml-turboquant.so";

/// Build tree and install tree have the same shape: bin/turboquant beside lib/libggml-turboquant.so (TQ_LIBDIR where lib is split).
std::string find_library_file() {
    const std::array<fs::path, 3> folders{"../lib", "../" TQ_LIBDIR, "."};
    return find_beside_program(kFile, folders, "build it (make build) or name it with --backend FILE");
}

}  // namespace

Plugin::Plugin(const std::string& path) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("turboquant");
    if (!reg) {
        const std::string file = path.empty() ? find_library_file() : path;
        if (!fs::exists(file)) throw Error(fmt::format("backend library '{}' does not exist; check --backend", file));
        reg = ggml_backend_load(file.c_str());
        if (!reg)
            throw Error(fmt::format("ggml refused the backend library '{}'; is it built for this llama.cpp?{}", file, take_log_problems()));
    }
    const auto get = [reg](auto& proc, const char* name) {
        proc = reinterpret_cast<std::remove_reference_t<decltype(proc)>>(ggml_backend_reg_get_proc_address(reg, name));
        if (!proc) throw Error(fmt::format("the backend library lacks '{}'; it is no libggml-turboquant, or of another version", name));
    };
    get(new_device_, "turboquant_new_device_at");
    get(place_, "turboquant_place");
    get(set_spec_, "turboquant_set_spec");
    get(stats_, "turboquant_kv_stats");
    get(last_error_, "turboquant_last_error");
    get(config_, "turboquant_config");
}

ggml_backend_dev_t Plugin::new_device(const std::string& place) const {
    std::array<char, 512> error{};
    ggml_backend_dev_t dev = new_device_(place.c_str(), error.data(), error.size());
    if (!dev) throw Error(error.data());
    return dev;
}

void Plugin::set_spec(ggml_backend_dev_t dev, const CacheSpec& spec) const {
    std::array<char, 512> error{};
    const std::string text = spec.ours ? device_text(spec) : "";
    if (!set_spec_(dev, spec.ours ? text.c_str() : nullptr, error.data(), error.size())) throw Error(error.data());
}

turboquant_kv_stats Plugin::stats(ggml_backend_dev_t dev) const {
    turboquant_kv_stats s{};
    stats_(dev, &s);
    return s;
}

}  // namespace turboquant::llama
