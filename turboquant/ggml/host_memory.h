// Memory of the machine, as far as this process may have it.
#pragma once

#include <cstddef>
#include <filesystem>

namespace turboquant::ggml {

/// Bytes.
struct HostMemory {
    std::size_t total = 0;  ///< physical memory, or the lowest limit of the control groups that this process is in
    std::size_t available =
        0;  ///< what can still be had: free pages and what the kernel would give back (MemAvailable), within these limits
};

/// From /proc/meminfo and the control groups, version 1 or 2, and the ancestors of the process's own. `root` is "/" but for tests. A file
/// that cannot be read limits nothing; without /proc/meminfo all of the physical memory counts as available.
HostMemory host_memory(const std::filesystem::path& root = "/");

}  // namespace turboquant::ggml
