// The command `turboquant`.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "ggml.h"
#include "turboquant/cli/command.h"
#include "turboquant/llama/log.h"

int main(int argc, char** argv) {
    using namespace turboquant::cli;
    CLI::App app{"TurboQuant KV-cache compression for stock llama.cpp"};
    GlobalOptions global;
    app.require_subcommand(1);
    app.fallthrough();
    app.set_version_flag("--version", fmt::format("turboquant {} (ggml {})", TQ_VERSION, ggml_version()));
    app.add_flag("-v,--verbose", global.verbose, "Show llama.cpp's own log");
    app.add_option("--backend", global.backend_path, "libggml-turboquant.so to load (default: ../lib beside this program)");
    app.parse_complete_callback(
        [&global] { turboquant::llama::install_log(global.verbose ? +[](const char* text) { std::fputs(text, stderr); } : nullptr); });
    add_run(app, global);
    add_eval(app, global);
    add_bench(app, global);
    add_needle(app, global);
    add_inspect(app, global);
    add_plan(app, global);
    add_report(app, global);
    add_formats(app);

    std::vector<std::string> args(argv + 1, argv + argc);
    for (std::string& a : args) {  // llama.cpp's spelling; CLI11 takes one letter after a single dash
        if (a == "-ub") a = "--ubatch-size";
        if (a == "-ngl") a = "--gpu-layers";
    }
    std::reverse(args.begin(), args.end());  // CLI11 parses from the back
    try {
        app.parse(args);
    } catch (const CLI::ParseError& e) {
        return app.exit(e) == 0 ? 0 : 2;
    } catch (const std::exception& e) {
        std::fflush(stdout);
        fmt::print(stderr, "turboquant: error: {}\n", e.what());
        return 1;
    }
    return 0;
}
