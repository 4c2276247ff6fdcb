// What the subcommands share: registration with CLI11, and the error that ends a command.
#pragma once

#include <stdexcept>
#include <string>

namespace CLI {
class App;
}

namespace turboquant::cli {

/// Ends the command with exit code 1. The text says the cause and what to do about it.
struct CommandError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Options before the subcommand's name.
struct GlobalOptions {
    bool verbose = false;      ///< show llama.cpp's own log
    std::string backend_path;  ///< libggml-turboquant.so; empty: beside the executable
};

/// Each adds one subcommand whose callback does the work and throws on failure. `global` must outlive `app`.
void add_run(CLI::App& app, const GlobalOptions& global);
void add_eval(CLI::App& app, const GlobalOptions& global);
void add_bench(CLI::App& app, const GlobalOptions& global);
void add_bench_decode(CLI::App& bench_command, const GlobalOptions& global);
void add_needle(CLI::App& app, const GlobalOptions& global);
void add_plan(CLI::App& app, const GlobalOptions& global);
void add_report(CLI::App& app, const GlobalOptions& global);
void add_inspect(CLI::App& app, const GlobalOptions& global);
void add_formats(CLI::App& app);

}  // namespace turboquant::cli
