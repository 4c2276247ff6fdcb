// `turboquant formats`: the words that --kv takes.
#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/table.h"
#include "turboquant/codec/tile.h"
#include "turboquant/llama/cache_spec.h"

namespace turboquant::cli {
namespace {

std::string bits_table(bool composite) {
    std::vector<std::vector<std::string>> rows{{"--kv"}};
    for (const int d : kHeadDims) rows[0].push_back(fmt::format("d={}", d));
    for (const CodecInfo& c : kCodecs) {
        if (is_composite(c.id) != composite) continue;
        std::vector<std::string> row{std::string(c.name)};
        for (const int d : kHeadDims) row.push_back(fmt::format("{:.3f}", bits_per_value(c.id, d)));
        rows.push_back(std::move(row));
    }
    return format_table(rows);
}

void print_formats() {
    fmt::print("Formats of turboquant: bits per value by head size, scales included. Keys and values apart: k=turbo4,v=turbo3\n\n{}\n",
               bits_table(false));
    fmt::print(
        "Formats to compare with, masks included (docs/outliers.md). Of outlier<b>, this is what a head without outliers takes\n\n{}\n",
        bits_table(true));
    std::vector<std::vector<std::string>> rows{{"--kv", "bits"}};
    for (const ggml_type t : llama::llama_cache_types())
        rows.push_back({ggml_type_name(t), fmt::format("{:.3f}", llama::bits_per_value(t))});
    fmt::print("llama.cpp's own caches, without turboquant's backend. Keys and values apart: k=q8_0,v=q4_0\n\n{}", format_table(rows));
}

}  // namespace

void add_formats(CLI::App& app) {
    app.add_subcommand("formats", "List the KV cache formats and their bits per value")->callback(print_formats);
}

}  // namespace turboquant::cli
