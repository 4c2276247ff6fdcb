#include "turboquant/llama/f16_weights.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <vector>

#include "fmt/format.h"
#include "llama.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/gguf_file.h"
#include "turboquant/llama/log.h"

namespace turboquant::llama {
namespace {

constexpr std::int64_t kCompared = 256;  // values of a tensor: whole blocks of every type

/// The first values of tensor i, as floats.
std::vector<float> first_values(GgufFile& file, std::int64_t i) {
    std::vector<float> values(static_cast<std::size_t>(std::min(kCompared, file.tensor(i)->ne[0])));
    file.read(i, 0, values);
    return values;
}

/// Whether `f16` holds the tensors of `original` dequantized, by names, shapes and the first values of each.
bool is_of(const std::string& f16, const std::string& original) {
    GgufFile a(original), b(f16);
    if (a.n_tensors() != b.n_tensors()) return false;
    for (std::int64_t i = 0; i < a.n_tensors(); i++) {
        const std::int64_t j = b.find(a.name(i));
        if (j < 0 || ggml_is_quantized(b.tensor(j)->type) || !ggml_are_same_shape(a.tensor(i), b.tensor(j))) return false;
        std::vector<float> x = first_values(a, i);
        if (b.tensor(j)->type == GGML_TYPE_F16)
            for (float& v : x) v = ggml_fp16_to_fp32(ggml_fp32_to_fp16(v));
        if (x != first_values(b, j)) return false;
    }
    return true;
}

double f16_bytes(const std::string& path) {
    const GgufFile file(path);
    auto bytes = static_cast<double>(file.data_offset());
    for (std::int64_t i = 0; i < file.n_tensors(); i++)
        bytes += static_cast<double>(ggml_nelements(file.tensor(i))) * (file.tensor(i)->type == GGML_TYPE_F32 ? 4 : 2);
    return bytes;
}

void need_room(const std::string& folder, double bytes) {
    std::error_code error;
    const std::filesystem::space_info space = std::filesystem::space(folder, error);
    if (!error && static_cast<double>(space.available) < bytes)
        throw Error(
            fmt::format("weights in F16 take {:.0f} MiB, and '{}' has {:.0f} MiB left; name another folder with TMPDIR, or a file with "
                        "--weights-file, or measure with --weights as-is",
                        bytes / 0x1p20, folder, static_cast<double>(space.available) / 0x1p20));
}

void dequantize(const std::string& from, const std::string& to, int n_threads) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread = n_threads;
    params.ftype = LLAMA_FTYPE_MOSTLY_F16;
    params.allow_requantize = true;
    params.pure = true;  // no tensor is made an exception
    take_log_problems();
    if (llama_model_quantize(from.c_str(), to.c_str(), &params) != 0)
        throw Error(fmt::format("llama.cpp could not dequantize '{}'; measure with --weights as-is{}", from, take_log_problems()));
}

}  // namespace

bool has_quantized_weights(const std::string& path) {
    const GgufFile file(path);
    for (std::int64_t i = 0; i < file.n_tensors(); i++)
        if (ggml_is_quantized(file.tensor(i)->type)) return true;
    return false;
}

WeightsFile f16_weights(const std::string& path, const std::string& keep, int n_threads, const Monitor& monitor) {
    const double bytes = f16_bytes(path);
    if (keep.empty()) {
        need_room(temporary_folder(), bytes);
        monitor.note(fmt::format("weights: dequantizing to F16, {:.0f} MiB in {}", bytes / 0x1p20, temporary_folder()));
        TemporaryFile file = TemporaryFile::make();
        dequantize(path, file.path(), n_threads);
        return WeightsFile(std::move(file));
    }
    if (std::filesystem::exists(keep)) {
        if (!is_of(keep, path))
            throw Error(
                fmt::format("'{}' does not hold the weights of '{}' in F16; name another --weights-file, or remove it", keep, path));
        monitor.note(fmt::format("weights: F16, from {}", keep));
        return WeightsFile(keep);
    }
    const std::filesystem::path folder = std::filesystem::absolute(keep).parent_path();
    need_room(folder.string(), bytes);
    monitor.note(fmt::format("weights: dequantizing to F16, {:.0f} MiB into {}", bytes / 0x1p20, keep));
    const std::string part = keep + ".part";  // a name of its own until it is whole
    dequantize(path, part, n_threads);
    std::error_code error;
    std::filesystem::rename(part, keep, error);
    if (error) throw Error(fmt::format("cannot write '{}': {}", keep, error.message()));
    return WeightsFile(keep);
}

}  // namespace turboquant::llama
