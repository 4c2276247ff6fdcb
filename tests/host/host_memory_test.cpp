// Memory figures from made-up /proc and /sys trees.
#include "turboquant/ggml/host_memory.h"

#include <fstream>
#include <map>
#include <string>

#include "gtest/gtest.h"
#include "tests/codec/temp_dir.h"

namespace turboquant::ggml {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kMiB = 1 << 20;

class HostMemoryTest : public testing::Test {
  protected:
    void SetUp() override {
        root_ = test::temp_dir() / "root";
        write("proc/meminfo",
              "MemTotal:       16777216 kB\nMemFree:          204800 kB\nMemAvailable:    8388608 kB\nCached: 8000000 kB\n");
    }
    void TearDown() override { fs::remove_all(root_); }
    void write(const std::string& file, const std::string& text) {
        fs::create_directories((root_ / file).parent_path());
        std::ofstream(root_ / file) << text;
    }
    void group2(const std::string& folder, const std::string& max, std::size_t used, std::size_t cached) {
        write(folder + "/memory.max", max + "\n");
        write(folder + "/memory.current", std::to_string(used) + "\n");
        write(folder + "/memory.stat", "anon 1\nfile 99\ninactive_file " + std::to_string(cached / 4) + "\nactive_file " +
                                           std::to_string(cached - cached / 4) + "\nslab 7\n");
    }
    void expect(std::size_t total_mib, std::size_t available_mib) {
        const HostMemory m = host_memory(root_);
        EXPECT_EQ(m.total / kMiB, total_mib);
        EXPECT_EQ(m.available / kMiB, available_mib);
    }
    fs::path root_;
};

TEST_F(HostMemoryTest, WithoutGroupsTheKernelsFigures) { expect(16384, 8192); }

TEST_F(HostMemoryTest, Version2LimitsLessThePageCache) {
    write("proc/self/cgroup", "0::/system.slice/llama.service\n");
    group2("sys/fs/cgroup/system.slice/llama.service", "max", 5 * kMiB, 0);
    group2("sys/fs/cgroup/system.slice", std::to_string(2048 * kMiB), 1500 * kMiB, 1000 * kMiB);
    expect(2048, 1548);
    group2("sys/fs/cgroup/system.slice/llama.service", std::to_string(1024 * kMiB), 600 * kMiB, 200 * kMiB);
    expect(1024, 624);
}

TEST_F(HostMemoryTest, AFullParentCountsThoughItsLimitIsHigher) {
    write("proc/self/cgroup", "0::/a/b\n");
    group2("sys/fs/cgroup/a/b", std::to_string(1024 * kMiB), 10 * kMiB, 0);
    group2("sys/fs/cgroup/a", std::to_string(4096 * kMiB), 4000 * kMiB, 0);
    expect(1024, 96);
}

TEST_F(HostMemoryTest, Version1) {
    write("proc/self/cgroup", "9:name=systemd:/x\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n");
    const auto group1 = [this](const std::string& folder, const std::string& limit) {
        write(folder + "/memory.limit_in_bytes", limit);
        write(folder + "/memory.usage_in_bytes", std::to_string(900 * kMiB));
        write(folder + "/memory.stat", "cache 1\ninactive_file 5\ntotal_inactive_file " + std::to_string(100 * kMiB) +
                                           "\ntotal_active_file " + std::to_string(200 * kMiB) + "\n");
    };
    group1("sys/fs/cgroup/memory", "9223372036854771712\n");
    expect(16384, 8192);
    group1("sys/fs/cgroup/memory/docker/abc", std::to_string(1024 * kMiB));
    expect(1024, 424);
    // In a container the mount is the group.
    fs::remove_all(root_ / "sys");
    group1("sys/fs/cgroup/memory", std::to_string(1000 * kMiB));
    expect(1000, 400);
}

TEST_F(HostMemoryTest, UsedUpAndUnreadable) {
    write("proc/self/cgroup", "0::/\n");
    group2("sys/fs/cgroup", std::to_string(512 * kMiB), 600 * kMiB, 0);
    expect(512, 0);
    fs::remove_all(root_);
    const HostMemory m = host_memory(root_);
    EXPECT_GT(m.total, kMiB);
    EXPECT_EQ(m.available, m.total);
}

}  // namespace
}  // namespace turboquant::ggml
