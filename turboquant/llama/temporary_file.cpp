#include "turboquant/llama/temporary_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "fmt/format.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

std::string temporary_folder() {
    std::error_code error;
    const std::filesystem::path folder = std::filesystem::temp_directory_path(error);
    return error ? "/tmp" : folder.string();
}

TemporaryFile TemporaryFile::make() {
    std::string name = temporary_folder() + "/turboquant-XXXXXX";
    const int fd = mkostemp(name.data(), O_CLOEXEC);
    if (fd < 0)
        throw Error(fmt::format("cannot make a temporary file in '{}': {}; name a folder that can be written to with TMPDIR",
                                temporary_folder(), std::strerror(errno)));
    unlink(name.c_str());
    return TemporaryFile(fd);
}

TemporaryFile::~TemporaryFile() {
    if (fd_ >= 0) close(fd_);
}

std::string TemporaryFile::path() const { return fmt::format("/proc/self/fd/{}", fd_); }

}  // namespace turboquant::llama
