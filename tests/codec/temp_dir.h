// Where a test program writes its files.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>

namespace turboquant::test {

/// Of this process alone: made on first use, removed when it ends.
inline const std::filesystem::path& temp_dir() {
    static const struct Dir {
        std::filesystem::path path = std::filesystem::temp_directory_path() / ("turboquant-test-" + std::to_string(getpid()));
        Dir() { std::filesystem::create_directories(path); }
        ~Dir() { std::filesystem::remove_all(path); }
    } dir;
    return dir.path;
}

}  // namespace turboquant::test
