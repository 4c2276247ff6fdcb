#include "turboquant/ggml/host_memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>

namespace turboquant::ggml {
namespace {

namespace fs = std::filesystem;
constexpr std::uint64_t kNone = std::numeric_limits<std::uint64_t>::max();

/// The number in a file of one number; kNone for "max" and for a file that is not there.
std::uint64_t number_in(const fs::path& file) {
    std::uint64_t n = kNone;
    std::ifstream(file) >> n;
    return n ? n : kNone;
}

/// Sum of the named fields of a file of lines "name[:] number".
std::uint64_t sum_of(const fs::path& file, std::initializer_list<std::string_view> names) {
    std::uint64_t sum = 0, n = 0;
    std::ifstream in(file);
    for (std::string line, name; std::getline(in, line);) {
        std::istringstream words(line);
        if (!(words >> name >> n)) continue;
        if (name.ends_with(':')) name.pop_back();
        if (std::ranges::find(names, name) != names.end()) sum += n;
    }
    return sum;
}

/// Names of one version's files. The page cache of a group is given back under pressure, so it does not count as used.
struct GroupFiles {
    const char *limit, *usage, *active_cache, *inactive_cache;
};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "active_file", "inactive_file"};

void apply_group(const fs::path& folder, const GroupFiles& files, HostMemory& m) {
    const std::uint64_t limit = number_in(folder / files.limit), usage = number_in(folder / files.usage);
    if (limit == kNone) return;
    m.total = std::min<std::uint64_t>(m.total, limit);
    if (usage == kNone) return void(m.available = std::min<std::uint64_t>(m.available, limit));
    const std::uint64_t cache = sum_of(folder / "memory.stat", {files.active_cache, files.inactive_cache});
    const std::uint64_t used = usage - std::min(usage, cache);
    m.available = std::min<std::uint64_t>(m.available, limit - std::min(limit, used));
}

/// A group and its ancestors up to the mount. In a container the mount may hold the process's own group under another name: then it is the
/// mount that limits.
void apply_groups(const fs::path& mount, std::string path, const GroupFiles& files, HostMemory& m) {
    while (path.size() > 1) {
        apply_group(fs::path(mount).concat(path), files, m);
        path.erase(path.rfind('/'));
    }
    apply_group(mount, files, m);
}

}  // namespace

HostMemory host_memory(const fs::path& root) {
    HostMemory m;
    const fs::path meminfo = root / "proc/meminfo";
    m.total = sum_of(meminfo, {"MemTotal"}) * 1024;
    if (m.total == 0) m.total = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) * static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES));
    m.available = sum_of(meminfo, {"MemAvailable"}) * 1024;
    if (m.available == 0 || m.available > m.total) m.available = m.total;

    std::ifstream groups(root / "proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // ID:CONTROLLERS:PATH
        const std::size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == line.npos) continue;
        std::string controllers = line.substr(first, second - first + 1);
        controllers.front() = controllers.back() = ',';
        const std::string path = line.substr(second + 1);
        if (controllers == ",,")
            apply_groups(root / "sys/fs/cgroup", path, kVersion2, m);
        else if (controllers.find(",memory,") != controllers.npos)
            apply_groups(root / "sys/fs/cgroup/memory", path, kVersion1, m);
    }
    return m;
}

}  // namespace turboquant::ggml
