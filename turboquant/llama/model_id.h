// Which model a file holds: to bind a plan to it.
#pragma once

#include <string>

namespace turboquant::llama {

struct ModelId {
    std::string hash;  ///< 16 hexadecimal digits
    std::string name;  ///< general.name of the file, else the file's own
};

/// Fingerprint (FNV-1a) of a GGUF file's metadata, tensor names, shapes and types, and of 512 bytes of each tensor: milliseconds, and any
/// other model or quantization differs. Of a model in several files, the first one counts. Throws Error if it is no GGUF file.
ModelId identify_model(const std::string& path);

}  // namespace turboquant::llama
