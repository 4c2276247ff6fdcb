// What we need to know of the ggml that loaded us: its version, the numbers of its ops, its log.
#pragma once

#include <string>

#include "turboquant/ggml/abi.h"

namespace turboquant::ggml {

/// Ops we handle, by the loading ggml's own numbering: enum ggml_op shifts between versions, so the header's numbers must not be used
/// (a prototype compiled with them loaded in another version and silently computed garbage).
struct Ops {
    ggml_op none, view, reshape, permute, transpose, set_rows, flash_attn, rope, custom;
};

/// Resolves every op by ggml_op_name. Throws std::runtime_error if one is missing.
Ops resolve_ops();

/// The range of ggml versions whose interface layout is the one in abi.h.
inline constexpr const char* kOldestGgml = "0.10.2";
inline constexpr const char* kNewestGgml = "0.25";  // any 0.25.x

/// Empty if ggml_version() is one we know; else what to do about it.
std::string check_ggml_version(const char* version);
/// For what was checked with 0.25 alone: more than an interface's layout.
bool is_ggml_0_25();

/// Empty if the registry that `caller` (an address in it) belongs to is the one that libllama uses, or no libllama is loaded as a shared
/// library; else what is wrong and what to do. A process may hold two copies of libggml, as with llama-cpp-python's wheel, where libggml.so
/// and libggml.so.0 are two files: a device registered in the other one is never seen by a model.
std::string check_registry(const void* caller);

/// True for ops that compute nothing.
bool is_view_op(const Ops& ops, const ggml_tensor* t);

/// Into ggml's log, which the loading program directs.
void log_error(const std::string& text);
/// llama.cpp's tools show warnings by default, but nothing below.
void log_warning(const std::string& text);
void log_info(const std::string& text);

}  // namespace turboquant::ggml
