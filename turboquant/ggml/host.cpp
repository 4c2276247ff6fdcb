#include "turboquant/ggml/host.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <stdexcept>
#include <string_view>
#include <tuple>

namespace turboquant::ggml {
namespace {

using Version = std::tuple<int, int, int>;

bool parse_version(const char* text, Version& v) {
    auto& [major, minor, patch] = v;
    major = minor = patch = 0;
    return text && std::sscanf(text, "%d.%d.%d", &major, &minor, &patch) >= 2;
}

}  // namespace

Ops resolve_ops() {
    Ops ops{};
    const std::array<std::pair<std::string_view, ggml_op*>, 9> wanted = {{{"NONE", &ops.none},
                                                                          {"VIEW", &ops.view},
                                                                          {"RESHAPE", &ops.reshape},
                                                                          {"PERMUTE", &ops.permute},
                                                                          {"TRANSPOSE", &ops.transpose},
                                                                          {"SET_ROWS", &ops.set_rows},
                                                                          {"FLASH_ATTN_EXT", &ops.flash_attn},
                                                                          {"ROPE", &ops.rope},
                                                                          {"CUSTOM", &ops.custom}}};
    // ggml_op_name has no bounds check: stop at the last name wanted, which every version in the checked range has.
    std::size_t found = 0;
    for (int i = 0; found < wanted.size(); i++) {
        if (i > 127) throw std::runtime_error("this ggml lacks an operation that a KV cache needs");
        const char* name = ggml_op_name(static_cast<ggml_op>(i));
        for (const auto& [want, op] : wanted)
            if (name && want == name) *op = static_cast<ggml_op>(i), found++;
    }
    return ops;
}

std::string check_ggml_version(const char* version) {
    Version v, oldest, newest;
    parse_version(kOldestGgml, oldest);
    parse_version(kNewestGgml, newest);
    const bool known = parse_version(version, v);
    std::get<2>(newest) = std::get<2>(v);
    if (known && v >= oldest && v <= newest) return {};
    return "ggml " + std::string(version ? version : "?") + " is outside the range this turboquant was checked with (" + kOldestGgml +
           " to " + kNewestGgml + ".x). Update turboquant, or load it all the same with TURBOQUANT_KV=\"turbo4,abi=any\" at your own risk";
}

bool is_ggml_0_25() { return std::string_view(ggml_version()).starts_with("0.25."); }

std::string check_registry(const void* caller) {
    Dl_info ours{}, theirs{};
    for (const char* name : {"libllama.so.0", "libllama.so"}) {
        void* llama = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        if (!llama) continue;
        const void* load = dlsym(llama, "ggml_backend_load");
        const bool other = load && dladdr(load, &theirs) && dladdr(caller, &ours) && ours.dli_fbase != theirs.dli_fbase;
        dlclose(llama);
        if (!other) return {};
        return std::string("loaded into ") + ours.dli_fname + ", but libllama in this process uses " + theirs.dli_fname +
               ": no model will see these devices, and caches stay f16. Load the library through libllama's own handle; in Python: "
               "turboquant.load()";
    }
    return {};
}

bool is_view_op(const Ops& ops, const ggml_tensor* t) {
    return t->op == ops.none || t->op == ops.view || t->op == ops.reshape || t->op == ops.permute || t->op == ops.transpose;
}

void log_error(const std::string& text) { ggml_log_internal(GGML_LOG_LEVEL_ERROR, "turboquant: %s\n", text.c_str()); }
void log_warning(const std::string& text) { ggml_log_internal(GGML_LOG_LEVEL_WARN, "turboquant: %s\n", text.c_str()); }
void log_info(const std::string& text) { ggml_log_internal(GGML_LOG_LEVEL_INFO, "turboquant: %s\n", text.c_str()); }

}  // namespace turboquant::ggml
