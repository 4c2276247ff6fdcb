#include "turboquant/cli/report_page.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <vector>

#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/llama/beside_program.h"

extern char** environ;

namespace turboquant::cli {
namespace {

namespace fs = std::filesystem;
constexpr const char* kRemedy = "install matplotlib (pip install matplotlib), or name a Python that has it with --python";

/// Build tree, install tree and source tree.
std::string find_script() {
    const std::array<fs::path, 2> folders{"../" TQ_DATADIR, TQ_SOURCE_DIR "/share"};
    return llama::find_beside_program("turboquant/report.py", folders, "install it beside this program (make install)");
}

/// Exit code of a program found in PATH, 127 if there is none; its messages are dropped if `quiet`.
int run_program(std::vector<std::string> words, bool quiet) {
    std::vector<char*> argv;
    for (std::string& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    if (quiet)
        for (const int fd : {1, 2}) posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_WRONLY, 0);
    pid_t pid = 0;
    const int error = posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    int status = 0;
    if (error != 0 || waitpid(pid, &status, 0) != pid) return 127;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

std::string find_python(const std::string& wanted) {
    if (!wanted.empty()) return wanted;
    const fs::path venv = fs::path(TQ_SOURCE_DIR) / ".venv" / "bin" / "python";
    std::error_code error;
    return fs::exists(venv, error) ? venv.string() : "python3";
}

std::string python_problem(const std::string& python) {
    if (run_program({python, "-c", ""}, true) != 0) return fmt::format("'{}' does not run: {}", python, kRemedy);
    if (run_program({python, "-c", "import matplotlib"}, true) != 0) return fmt::format("'{}' has no matplotlib: {}", python, kRemedy);
    return "";
}

void draw_page(const std::string& python, const std::string& json_path, const std::string& html_path) {
    const std::string script = find_script();
    if (const std::string problem = python_problem(python); !problem.empty()) throw CommandError(problem);
    if (const int rc = run_program({python, script, json_path, "-o", html_path}, false); rc != 0)
        throw CommandError(fmt::format("{} {} ended with code {}; its own message is above", python, script, rc));
}

}  // namespace turboquant::cli
