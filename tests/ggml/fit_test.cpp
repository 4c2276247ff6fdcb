// What llama.cpp's --fit learns from a device: the memory there is, and the size of a cache before it is allocated.
#include <algorithm>
#include <fstream>

#include "ggml-alloc.h"
#include "tests/ggml/support.h"

namespace turboquant::conformance {
namespace {

/// A field of /proc/meminfo in bytes.
double meminfo(const std::string& field) {
    std::ifstream in("/proc/meminfo");
    for (std::string word; in >> word;)
        if (double kib; word == field + ":" && in >> kib) return kib * 1024;
    return 0;
}

struct Figures {
    double free, total;
};
Figures figures(const std::string& name) {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device(name), &free, &total);
    return {static_cast<double>(free), static_cast<double>(total)};
}

/// The size that --fit sees for a KV tensor of n values: it gives the tensor an empty buffer and asks for its size.
size_t estimate(const std::string& name, int64_t n_embd, int64_t n_cells) {
    const ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(device(name));
    const Owned<ggml_context> ctx(ggml_init({2 * ggml_tensor_overhead(), nullptr, true}));
    const Owned<ggml_backend_buffer> empty(ggml_backend_buft_alloc_buffer(buft, 0));
    ggml_tensor* t = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, n_embd, n_cells, 1);
    ggml_set_name(t, "cache_k_l0");
    t->buffer = empty.get();
    return ggml_backend_buft_get_alloc_size(buft, t);
}

TEST(Fit, MemoryIsWhatTheKernelSaysIsAvailable) {
    // Within the limits of control groups, which tests/host reads from made-up files.
    const double before = meminfo("MemAvailable");
    const Figures f = figures("turbo4");
    const double after = meminfo("MemAvailable");  // others take and free memory
    EXPECT_GT(f.total, 0);
    EXPECT_LE(f.total, 1.001 * meminfo("MemTotal"));
    EXPECT_LE(f.free, 1.03 * std::max(before, after));
    if (f.total > 0.999 * meminfo("MemTotal")) {
        EXPECT_GE(f.free, 0.97 * std::min(before, after)) << "the page cache counts as available";
    }
}

TEST(Fit, ADeviceOfferedForAContextHasNoLessThanTheCpuIsTakenToHave) {
    size_t cpu_free = 0, cpu_total = 0;
    ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &cpu_free, &cpu_total);
    estimate("turbo3", 128, 4096);
    const Figures f = figures("turbo3");
    EXPECT_EQ(f.free, f.total);
    if (f.total > 0.999 * meminfo("MemTotal")) {
        EXPECT_GE(f.free, 0.999 * static_cast<double>(cpu_free));
    }
    // The context that is made in the end ends it.
    const ContextPtr ctx = make_context(demo("turbo3"));
    EXPECT_LT(figures("turbo3").free, f.free);
}

TEST(Fit, CachesAreEstimatedAtTheirCompressedSize) {
    const double f16 = 2.0 * 128 * 32768;
    for (const std::string& name : kFormats) {
        const double bits = 16 * static_cast<double>(estimate(name, 128, 32768)) / f16;
        const double codes = name == "raw" ? 16 : name.back() - '0';
        EXPECT_GE(bits, codes) << name;
        EXPECT_LE(bits, codes + 0.35) << name << ": codes, scales for heads of 64, exact windows";
    }
}

}  // namespace
}  // namespace turboquant::conformance
