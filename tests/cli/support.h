// Runs the built command as a user would.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace turboquant::cli {

struct Outcome {
    int exit_code = -1;
    std::string out, err;
};

/// Made on first use, removed when the test program ends.
inline const std::filesystem::path& temp_dir() {
    static const struct Dir {
        std::filesystem::path path = std::filesystem::temp_directory_path() / ("turboquant-cli-test-" + std::to_string(getpid()));
        Dir() { std::filesystem::create_directories(path); }
        ~Dir() { std::filesystem::remove_all(path); }
    } dir;
    return dir.path;
}

inline std::string read_all(const std::filesystem::path& p) {
    std::ifstream in(p, std::ios::binary);
    std::ostringstream s;
    s << in.rdbuf();
    return s.str();
}

inline std::string write_file(const char* name, const std::string& text) {
    const auto path = temp_dir() / name;
    std::ofstream(path, std::ios::binary) << text;
    return path;
}

/// `args` as typed in a shell.
inline Outcome run_command(const std::string& args) {
    const auto out = temp_dir() / "out", err = temp_dir() / "err";
    const std::string line = "'" TQ_COMMAND "' " + args + " >'" + out.string() + "' 2>'" + err.string() + "'";
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read_all(out), read_all(err)};
}

inline const std::string kDemo = "'" TQ_DEMO_MODEL "'";

// One thread: the teams of several test programs at once would spin against each other.
inline const std::string kModel = " -t 1 -m " + kDemo + " ";

/// Text written by the demo model itself, with a fixed seed: 2 chunks of 256 tokens and some more.
inline const std::string& demo_text() {
    static const std::string path = [] {
        const Outcome r = run_command("run" + kModel + " -p 'It was' -n 700 --kv f16 --temp 1 --seed 7 --ignore-eos");
        EXPECT_EQ(r.exit_code, 0) << r.err;
        return write_file("text.txt", r.out);
    }();
    return path;
}

}  // namespace turboquant::cli
