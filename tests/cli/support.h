// Runs the built command as a user would.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/codec/temp_dir.h"

namespace turboquant::cli {

struct Outcome {
    int exit_code = -1;
    std::string out, err;
};

using test::temp_dir;

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

/// 2,200 tokens of the demo model's own, sampled from all of its distribution with another seed than the planner's: nothing is calibrated on
/// what is evaluated. A file, not written anew: one digit that a processor rounds otherwise would make it another text, and the bounds others' bounds.
///     turboquant run -t 1 -m models/demo.gguf -p 'It was' -n 2200 --kv f16 --temp 1 --top-k 0 --top-p 1 --min-p 0 --seed 7 --ignore-eos
inline const std::string kTextFile = TQ_TEST_DATA "/written_by_demo.txt", kText = "'" + kTextFile + "'";

}  // namespace turboquant::cli
