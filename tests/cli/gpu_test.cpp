// Where weights and caches are: --gpu-layers, with the library that has llama.cpp's CPU backend in a GPU's place.
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "support.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

const std::string kAsGpu = " --backend '" TQ_AS_GPU "' ";

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

struct Evaluated {
    json rows;
    std::string err;
};

Evaluated eval(const std::string& args) {
    const Outcome r =
        run_command("eval" + kModel + " -f " + kText + " -c 256 --chunks 2 --weights f16 --json --kv q8_0 turbo4,sink=1,recent=2 " + args);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    json rows = json::parse(r.out, nullptr, false);
    EXPECT_EQ(rows.size(), 2u) << r.out;
    return {rows, r.err};
}

TEST(Gpu, TheSameWhereverWeightsAndCachesAre) {
    const Evaluated cpu = eval("");
    EXPECT_TRUE(has(cpu.err, "weights and cache on CPU (")) << "and why: " << cpu.err;
    struct Place {
        const char *args, *said;
    };
    for (const Place& p :
         {Place{"-ngl 0", "weights and cache on CPU;"}, Place{"-ngl 3", "weights and cache on CPU and, the last 3 layers, CPU0 ("},
          Place{"-ngl 99", "weights and cache on CPU0 ("}, Place{"", "), all layers"}}) {
        const Evaluated there = eval(kAsGpu + p.args);
        EXPECT_TRUE(has(there.err, p.said)) << there.err;
        for (std::size_t i = 0; i < 2; i++) {
            const double kld = cpu.rows[i]["mean_kld"];
            EXPECT_NEAR(there.rows[i]["mean_kld"].get<double>(), kld, i ? 0.2 * kld : 0.02 * kld) << p.args;
            EXPECT_NEAR(there.rows[i]["ppl_f16"].get<double>(), cpu.rows[i]["ppl_f16"].get<double>(), 0.01) << p.args;
            // All layers are compressed. A place of its own takes some bytes of its own for positions.
            EXPECT_NEAR(there.rows[i]["bits_per_value"].get<double>(), cpu.rows[i]["bits_per_value"].get<double>(), 0.06) << p.args;
        }
    }
}

TEST(Gpu, LlamasOwnCacheIsLlamasOwn) {
    const std::string args = "run" + kModel + " -p 'The old house' -n 24 --kv ";
    const Outcome cpu = run_command(args + "q8_0"), gpu = run_command(args + "q8_0 -ngl 99" + kAsGpu);
    EXPECT_EQ(gpu.exit_code, 0) << gpu.err;
    EXPECT_EQ(cpu.out, gpu.out);
    EXPECT_TRUE(has(gpu.err, "1632.0 bytes/token")) << gpu.err;
}

TEST(Gpu, InspectReadsWhatIsOnIt) {
    const std::string args = "inspect" + kModel + " -f " + kText + " -n 256 --json";
    const Outcome cpu = run_command(args);
    for (const char* place : {"-ngl 99", "-ngl 3"}) {
        const Outcome gpu = run_command(args + kAsGpu + place);
        ASSERT_EQ(gpu.exit_code, 0) << gpu.err;
        const json a = json::parse(cpu.out), b = json::parse(gpu.out);
        ASSERT_EQ(a["layers"].size(), b["layers"].size());
        for (std::size_t l = 0; l < a["layers"].size(); l++)
            for (const char* key : {"k_norm", "v_norm", "k_offset_share"})
                EXPECT_NEAR(a["layers"][l][key].get<double>(), b["layers"][l][key].get<double>(), 1e-3 * a["layers"][l][key].get<double>());
    }
}

TEST(Gpu, LayersOnAGpuThatIsNotThereAreAnError) {
    const Outcome r = run_command("run" + kModel + " -p 'The old house' -n 4 --kv turbo4 -ngl 3");
    EXPECT_EQ(r.exit_code, 1);
    EXPECT_TRUE(has(r.err, "-ngl 3") && has(r.err, "--gpu-backend")) << r.err;
    const Outcome file = run_command("run" + kModel + " -p 'The old house' -n 4 --kv turbo4 --gpu-backend /nonexistent.so");
    EXPECT_EQ(file.exit_code, 1);
    EXPECT_TRUE(has(file.err, "/nonexistent.so")) << file.err;
}

TEST(Gpu, DecodeSpeedOfAModel) {
    const Outcome r = run_command("bench decode" + kModel + "--kv f16 turbo4 --depths 64,0 --json");
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const json rows = json::parse(r.out);
    ASSERT_EQ(rows.size(), 4u);
    for (const json& row : rows) EXPECT_GT(row["ms"].get<double>(), 0);
    EXPECT_TRUE(has(r.err, "weights and cache on CPU")) << r.err;
}

}  // namespace
}  // namespace turboquant::cli
