#include "turboquant/measure/logit_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "fmt/format.h"
#include "turboquant/llama/error.h"

namespace turboquant::measure {

LogitFile::LogitFile(std::size_t n_rows, std::size_t n_vocab) : n_rows_(n_rows), n_vocab_(n_vocab), file_(llama::TemporaryFile::make()) {}

void LogitFile::write(std::size_t row, std::span<const float> logits) {
    if (logits.size() % n_vocab_ != 0 || row + logits.size() / n_vocab_ > n_rows_)
        throw std::out_of_range("LogitFile: rows beyond its end");
    const std::span<const std::byte> bytes = std::as_bytes(logits);
    const std::size_t at = row * n_vocab_ * sizeof(float);
    for (std::size_t done = 0; done < bytes.size();) {
        const ssize_t n = pwrite(file_.fd(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            throw llama::Error(fmt::format("cannot write the reference logits ({:.0f} MiB) into '{}': {}; name a larger folder with TMPDIR",
                                           static_cast<double>(n_rows_ * n_vocab_ * sizeof(float)) / 0x1p20, llama::temporary_folder(),
                                           std::strerror(errno)));
        done += static_cast<std::size_t>(n);
    }
}

bool LogitFile::read(std::size_t row, std::span<float> logits) const {
    const std::span<std::byte> bytes = std::as_writable_bytes(logits);
    const std::size_t at = row * n_vocab_ * sizeof(float);
    for (std::size_t done = 0; done < bytes.size();) {
        const ssize_t n = pread(file_.fd(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        done += static_cast<std::size_t>(n);
    }
    return true;
}

}  // namespace turboquant::measure
