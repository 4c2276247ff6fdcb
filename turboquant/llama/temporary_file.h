// A file without a name in TMPDIR, gone with the process: for what would take memory otherwise.
#pragma once

#include <string>
#include <utility>

namespace turboquant::llama {

/// Where temporary files go: TMPDIR, or the system's choice.
std::string temporary_folder();

class TemporaryFile {
  public:
    TemporaryFile() = default;
    /// Throws Error if the folder cannot be written to.
    static TemporaryFile make();
    ~TemporaryFile();
    TemporaryFile(TemporaryFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    TemporaryFile& operator=(TemporaryFile&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }

    explicit operator bool() const { return fd_ >= 0; }
    int fd() const { return fd_; }
    /// A name that this process can open it by, as long as this object lives.
    std::string path() const;

  private:
    explicit TemporaryFile(int fd) : fd_(fd) {}
    int fd_ = -1;
};

}  // namespace turboquant::llama
