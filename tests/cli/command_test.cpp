// The command from outside: output, exit codes, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include "gguf.h"
#include "nlohmann/json.hpp"
#include "support.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

json eval(const std::string& args) {
    const Outcome r = run_command("eval" + kModel + " -f " + kText + " -c 256 --chunks 2 --json " + args);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    json rows = json::parse(r.out, nullptr, false);
    if (!rows.empty() && rows.back()["floor"] == true) rows.erase(rows.size() - 1);  // asked for by nobody
    return rows;
}

TEST(Command, VersionAndFormats) {
    const Outcome version = run_command("--version");
    EXPECT_EQ(version.exit_code, 0);
    EXPECT_TRUE(has(version.out, "turboquant ") && has(version.out, "ggml ")) << version.out;
    const Outcome formats = run_command("formats");
    EXPECT_EQ(formats.exit_code, 0);
    for (const char* part : {"turbo4", "4.250", "4.125", "raw", "q8_0", "8.500"}) EXPECT_TRUE(has(formats.out, part)) << part;
}

TEST(Command, RunWritesTextToStdoutAndFiguresToStderr) {
    const std::string args = "run" + kModel + " -p 'The old house' -n 24 --kv q8_0";
    const Outcome a = run_command(args), b = run_command(args);
    EXPECT_EQ(a.exit_code, 0) << a.err;
    EXPECT_GT(a.out.size(), 24u);
    EXPECT_EQ(a.out, b.out) << "greedy text must not change from run to run";
    // 6 layers x 2 heads x 64 x (K and V) = 1536 values: 1632 bytes in q8_0, 3072 in f16.
    for (const char* part : {"tokens/s", "1632.0 bytes/token", "3072.0 bytes/token", "0.531 of f16", "--kv q8_0"})
        EXPECT_TRUE(has(a.err, part)) << a.err;
}

/// Batches of another size round otherwise, and a near-tie may then go the other way: one in sixteen of such short ends does. A prompt put
/// together wrongly changes most of them (one wrong token: tests/llama/session_test.cpp).
TEST(Command, PromptInPiecesGivesTheSameText) {
    constexpr int kPrompts = 8;
    const std::string text = read_all(kTextFile);
    const std::size_t size = text.size() / kPrompts;
    int same = 0;
    for (int i = 0; i < kPrompts; i++) {
        const std::string prompt = write_file("prompt.txt", text.substr(i * size, size));
        const std::string args = "run" + kModel + " -f " + prompt + " -n 4 --kv f16 --ignore-eos -b ";
        const Outcome whole = run_command(args + "2048"), pieces = run_command(args + "64");
        EXPECT_EQ(whole.exit_code, 0) << whole.err;
        same += whole.out == pieces.out;
    }
    EXPECT_GE(same, kPrompts / 2);
}

TEST(Command, SamplingFollowsTheSeed) {
    const std::string args = "run" + kModel + " -p 'The old house' -n 24 --kv f16 --temp 1 --seed ";
    EXPECT_EQ(run_command(args + "3").out, run_command(args + "3").out);
    EXPECT_NE(run_command(args + "3").out, run_command(args + "4").out);
}

TEST(Command, EvalJsonHasExactlyTheseKeys) {
    const json rows = eval("--kv f16 --kv q8_0 q4_0");
    ASSERT_TRUE(rows.is_array());
    ASSERT_EQ(rows.size(), 3u);
    const std::set<std::string> expected{"kv",         "bits_per_value", "kv_bytes",   "ppl",      "ppl_f16", "mean_kld",
                                         "median_kld", "kld_99",         "kld_999",    "same_top", "tokens",  "mean_kld_error",
                                         "overlap",    "floor",          "best_other", "family"};
    for (const json& row : rows) {
        std::set<std::string> keys;
        for (const auto& [key, value] : row.items()) {
            keys.insert(key);
            EXPECT_TRUE(key == "kv" || key == "family" ? value.is_string()
                        : key == "floor"               ? value.is_boolean()
                                                       : key == "best_other" || value.is_number())
                << key;
        }
        EXPECT_EQ(keys, expected);
        EXPECT_EQ(row["tokens"], 2 * 127);
    }
}

TEST(Command, EvalOfF16AgainstItselfIsZeroAndOthersAreOrdered) {
    const json rows = eval("--kv f16 q8_0 q4_0");
    ASSERT_EQ(rows.size(), 3u);
    const json &f16 = rows[0], &q8 = rows[1], &q4 = rows[2];
    EXPECT_LT(f16["mean_kld"], 1e-9);
    EXPECT_EQ(f16["same_top"], 1.0);
    EXPECT_EQ(f16["ppl"], f16["ppl_f16"]);
    EXPECT_GT(f16["ppl"], 5.0);
    EXPECT_LT(f16["ppl"], 200.0);
    EXPECT_EQ(f16["kv_bytes"], 256 * 3072);
    EXPECT_EQ(q4["kv_bytes"], 256 * 3072 * 9 / 32);
    EXPECT_EQ(q4["bits_per_value"], 4.5);
    EXPECT_GT(q4["mean_kld"], 0.002);
    EXPECT_LT(q4["mean_kld"], 0.05);
    EXPECT_LT(q8["mean_kld"], 0.25 * q4["mean_kld"].get<double>());
    EXPECT_GT(q8["mean_kld"], 1e-6);
    EXPECT_LT(q4["median_kld"], q4["mean_kld"]);
    EXPECT_LT(q4["mean_kld"], q4["kld_99"]);
    EXPECT_LE(q4["kld_99"], q4["kld_999"]);
    EXPECT_GT(q4["same_top"], 0.8);
    EXPECT_LT(q4["same_top"], 1.0);
}

TEST(Command, EvalShowsTheFloorOfQuantizedWeightsAndTakesItAway) {
    const std::string args = "eval" + kModel + " -f " + kText + " -c 256 --chunks 2 --json --kv turbo4 turbo3 raw ";
    const json without = eval("--kv turbo4 turbo3");
    EXPECT_EQ(without.size(), 2u);
    const Outcome as_is = run_command("eval" + kModel + " -f " + kText + " -c 256 --chunks 2 --json --kv turbo4 turbo3");
    const json rows = json::parse(as_is.out);
    ASSERT_EQ(rows.size(), 3u) << "demo.gguf has Q8_0 weights";
    EXPECT_EQ(rows[2]["kv"], "raw");
    EXPECT_EQ(rows[2]["floor"], true);
    EXPECT_EQ(rows[2]["family"], "floor");
    EXPECT_EQ(rows[0]["family"], "turboquant");
    EXPECT_GT(rows[2]["mean_kld"], 2e-5);
    EXPECT_TRUE(has(as_is.err, "weights are quantized")) << as_is.err;
    // turbo3 has fewer bits than turbo4: only turbo4 has another row to be compared with.
    EXPECT_EQ(rows[0]["best_other"]["kv"], "turbo3");
    EXPECT_TRUE(rows[1]["best_other"].is_null());
    EXPECT_NEAR(rows[0]["best_other"]["difference"].get<double>(), rows[0]["mean_kld"].get<double>() - rows[1]["mean_kld"].get<double>(),
                1e-9);
    EXPECT_GT(rows[0]["best_other"]["error"], 0.0);
    EXPECT_LT(rows[0]["best_other"]["error"], std::abs(rows[0]["best_other"]["difference"].get<double>()));

    const Outcome f16 = run_command(args + "--weights f16");
    ASSERT_EQ(f16.exit_code, 0) << f16.err;
    const json exact = json::parse(f16.out);
    ASSERT_EQ(exact.size(), 3u) << "no floor of its own: " << f16.out;
    EXPECT_LT(exact[2]["mean_kld"], 0.1 * rows[2]["mean_kld"].get<double>());
    EXPECT_GT(exact[0]["mean_kld"], 20 * exact[2]["mean_kld"].get<double>());
    EXPECT_GT(exact[0]["overlap"], 0.9);
    EXPECT_LT(exact[0]["overlap"], 1.0);

    const auto kept = temp_dir() / "f16.gguf";
    const Outcome first = run_command(args + "--weights f16 --weights-file '" + kept.string() + "'");
    ASSERT_EQ(first.exit_code, 0) << first.err;
    EXPECT_EQ(json::parse(first.out), exact);
    const Outcome again = run_command(args + "--weights f16 --weights-file '" + kept.string() + "'");
    EXPECT_TRUE(has(again.err, "from " + kept.string())) << again.err;
    EXPECT_EQ(json::parse(again.out), exact);
    const Outcome foreign =
        run_command("eval -t 1 -m '" + kept.string() + "' -f " + kText + " -c 256 --chunks 1 --kv turbo4 --weights f16");
    EXPECT_EQ(foreign.exit_code, 0) << foreign.err;
    EXPECT_TRUE(has(foreign.err, "not quantized")) << foreign.err;
}

TEST(Command, EvalTokenByToken) {
    const json batch = eval("--kv q4_0"), decode = eval("--kv q4_0 f16 --mode decode");
    EXPECT_NEAR(decode[0]["mean_kld"].get<double>() / batch[0]["mean_kld"].get<double>(), 1, 0.03);
    // llama.cpp's f16 attention takes another path for one token, so even f16 differs from the batched reference: proof that the mode is
    // on.
    EXPECT_GT(decode[1]["mean_kld"], 1e-7);
    EXPECT_LT(decode[1]["mean_kld"], 2e-3);
}

TEST(Command, OurFormatsCostWhatTheyShould) {
    const json rows = eval("--sink 0 --recent 0 --kv raw turbo8 turbo4 turbo3 turbo2 k=turbo4,v=turbo2 q4_0");
    ASSERT_EQ(rows.size(), 7u);
    const auto kld = [&](int i) { return rows[i]["mean_kld"].get<double>(); };
    // raw differs from llama.cpp's f16 by rounding in llama.cpp's own attention only.
    EXPECT_GT(kld(0), 0.0);
    EXPECT_LT(kld(0), 1e-3);
    EXPECT_LT(kld(1), 2e-3);
    EXPECT_GT(kld(2), 2e-3);
    EXPECT_LT(kld(2), 0.03);
    EXPECT_LT(kld(2), kld(3));
    EXPECT_LT(kld(3), kld(4));
    EXPECT_LT(kld(4), 0.6);
    EXPECT_GT(kld(5), kld(2));
    EXPECT_LT(kld(5), kld(4));
    // Heads of 64: b + 16/64 bits, the cells' positions (4 bytes for 1536 values), the keys' offset (1536 bytes in all, 1/32 bit here).
    const double bits[] = {16, 8.25, 4.25, 3.25, 2.25, 3.25};
    for (int i = 0; i < 6; i++) {
        EXPECT_GE(rows[i]["bits_per_value"], bits[i]) << rows[i];
        EXPECT_LE(rows[i]["bits_per_value"], bits[i] + 0.054) << rows[i];
        EXPECT_NEAR(rows[i]["kv_bytes"].get<double>(), rows[i]["bits_per_value"].get<double>() / 8 * 256 * 1536, 1);
    }
}

TEST(Command, ExactWindowsCostWhatTheyTake) {
    const json rows = eval("--kv turbo3 turbo3,sink=0,recent=0 turbo3,sink=2,recent=16 turbo3,recent=256");
    ASSERT_EQ(rows.size(), 4u);
    const auto bits = [&](int i) { return rows[i]["bits_per_value"].get<double>() - rows[1]["bits_per_value"].get<double>(); };
    const auto kld = [&](int i) { return rows[i]["mean_kld"].get<double>(); };
    EXPECT_NEAR(bits(0), 3 * 4.25 / 256, 1e-6) << "by default what fits into 1/16 bit, 4 bits and a scale on top of the codes";
    EXPECT_NEAR(bits(2), 16.0 * 18 / 256, 1e-6);
    EXPECT_NEAR(bits(3), 16.0, 1e-6);
    EXPECT_LT(kld(0), kld(1));
    EXPECT_LT(kld(2), 0.6 * kld(1));
    EXPECT_GT(kld(2), 0.02 * kld(1));
    const json exact = eval("--weights f16 --kv turbo3,recent=256 raw");
    EXPECT_NEAR(exact[0]["mean_kld"], exact[1]["mean_kld"].get<double>(), 1e-5) << "all tokens are exact";
    const json by_option = eval("--sink 2 --recent 16 --kv turbo3 q4_0");
    EXPECT_EQ(by_option[0]["mean_kld"], rows[2]["mean_kld"]);
    EXPECT_EQ(by_option[0]["kv"], "turbo3");
}

TEST(Command, RunWithOurCache) {
    const std::string args = "run" + kModel + "-p 'The old house' -n 24 --kv ";
    const Outcome a = run_command(args + "turbo4"), b = run_command(args + "turbo4");
    EXPECT_EQ(a.exit_code, 0) << a.err;
    EXPECT_GT(a.out.size(), 24u);
    EXPECT_EQ(a.out, b.out);
    for (const char* part : {"turbo4 8", "3072.0 bytes/token", "of f16, 4.3", "turbo4"}) EXPECT_TRUE(has(a.err, part)) << a.err;
}

TEST(Command, RunFailsOnLogitsThatAreNotNumbers) {
    std::string model;
    {
        std::ifstream file(TQ_DEMO_MODEL, std::ios::binary);
        model.assign(std::istreambuf_iterator<char>(file), {});
    }
    gguf_context* gguf = gguf_init_from_file(TQ_DEMO_MODEL, {true, nullptr});
    std::int64_t output = gguf_find_tensor(gguf, "output.weight");
    if (output < 0) output = gguf_find_tensor(gguf, "token_embd.weight");
    ASSERT_GE(output, 0);
    // All ones are NaN in every type of float: the logits of the first tokens.
    std::memset(model.data() + gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, output), 0xff, 256);
    gguf_free(gguf);
    const Outcome r = run_command("run -m " + write_file("nan.gguf", model) + " -p 'It was' -n 4 --kv f16");
    EXPECT_EQ(r.exit_code, 1);
    EXPECT_TRUE(has(r.err, "not numbers")) << r.err;
    EXPECT_EQ(r.out, "");
}

TEST(Command, BenchJsonHasExactlyTheseKeys) {
    const std::set<std::string> expected{
        "op",          "kv",           "tokens",      "threads", "ms", "ns_per_vector", "gb_per_s", "bandwidth_share",
        "vs_ggml_f16", "vs_ggml_q8_0", "vs_ggml_q4_0"};
    for (const std::string& what :
         {std::string("attention --heads 4"), std::string("attention --heads 4 --mode prefill -q 32"), std::string("encode")}) {
        const Outcome r = run_command("bench " + what + " --kv turbo4 raw --kv-heads 2 --head-dim 64 --tokens 128,200 --seconds 0 --json");
        ASSERT_EQ(r.exit_code, 0) << r.err;
        const json rows = json::parse(r.out, nullptr, false);
        ASSERT_TRUE(rows.is_array());
        EXPECT_EQ(rows.size(), 2u * 5) << "f16, q8_0, q4_0, turbo4 and raw, at two sizes";
        for (const json& row : rows) {
            std::set<std::string> keys;
            for (const auto& [key, value] : row.items()) keys.insert(key);
            EXPECT_EQ(keys, expected);
            EXPECT_GT(row["ms"], 0.0);
            if (row["kv"] == "q8_0") {
                EXPECT_EQ(row["vs_ggml_q8_0"], 1.0);
            }
        }
        EXPECT_EQ(rows[3]["kv"], "turbo4");
        EXPECT_EQ(rows[9]["tokens"], 200);
    }
}

TEST(Command, EvalTable) {
    const Outcome r = run_command("eval" + kModel + " -f " + kText + " -c 256 --chunks 9 -ub 128 --kv q4_0");
    EXPECT_EQ(r.exit_code, 0) << r.err;
    EXPECT_TRUE(has(r.out, "mean KLD") && has(r.out, "q4_0") && has(r.out, "4.500")) << r.out;
    EXPECT_TRUE(has(r.err, "9 asked for")) << r.err;
    EXPECT_TRUE(has(r.err, "batch 128/128")) << "the effective configuration is shown: " << r.err;
    EXPECT_FALSE(has(r.err, "llama_model_loader")) << "llama.cpp's log belongs behind --verbose";
}

TEST(Command, BadInputEndsWithOneAndSaysWhatToDo) {
    const std::string& model = kModel;
    const std::string empty = write_file("empty.txt", ""), shorty = write_file("short.txt", "It was late.");
    const std::string cut = write_file("cut.gguf", read_all(TQ_DEMO_MODEL).substr(0, 100000));
    const std::string cut_late = write_file("cut_late.gguf", read_all(TQ_DEMO_MODEL).substr(0, 4000000));
    const std::string not_model = write_file("text.gguf", "It was late.");
    const struct {
        std::string args, cause, remedy;
    } cases[] = {
        {"run -m missing.gguf -p x --kv f16", "missing.gguf", "check -m"},
        {"run -m " + cut + " -p x --kv f16", "cannot load", "again"},
        {"run -m " + cut_late + " -p x --kv f16", "cannot load", "again"},
        {"run -m " + not_model + " -p x --kv f16", "cannot load", "GGUF"},
        {"run" + model + "-p x --kv turbo9", "turbo9", "q8_0"},
        {"run" + model + "-p x --kv k=f16,v=turbo4", "mixes", "raw"},
        {"run" + model + "-p '' --kv f16", "empty", "-p TEXT"},
        {"run" + model + "-f " + empty + " --kv f16", "empty", "give one"},
        {"run" + model + "-f missing.txt --kv f16", "missing.txt", "check the path"},
        {"run" + model + "-p 'It was' -c 16 -n 100 --kv f16", "do not fit", "-c 1"},
        {"eval" + model + "-f " + shorty + " --kv f16", "less than one chunk", "smaller -c"},
        {"eval" + model + "-f " + empty + " --kv f16", "empty", "give one"},
        {"eval" + model + "-f " + shorty + " --kv q5_9", "q5_9", "turbo4"},
        {"bench attention --kv turbo9", "turbo9", "iq4_nl"},
        {"bench attention --head-dim 100", "100", "128"},
        {"bench attention --heads 6 --kv-heads 4", "no multiple", "divide"},
        {"bench attention --tokens 16 -q 32 --mode prefill", "do not fit", "--tokens"},
        {"bench attention --backend cuda --kv q8_0", "--backend cuda", "--backend cpu"},
        {"bench encode --backend cuda", "--backend cuda", "--backend cpu"},
        {"bench attention --batch 2 --kv turbo4", "--batch", "--backend cuda"},
        {"run" + model + "-p x --backend missing.so --kv turbo4", "missing.so", "--backend"},
    };
    for (const auto& c : cases) {
        const Outcome r = run_command(c.args);
        EXPECT_EQ(r.exit_code, 1) << c.args << "\n" << r.err;
        EXPECT_TRUE(has(r.err, "error: ") && has(r.err, c.cause) && has(r.err, c.remedy)) << c.args << "\n" << r.err;
        EXPECT_EQ(r.out, "") << c.args;
    }
}

TEST(Command, WrongUsageEndsWithTwo) {
    const std::string& model = kModel;
    for (const std::string& args :
         {std::string(""), std::string("nonsense"), std::string("run"), "run" + model + "-p x -n -5", "run" + model + "-p x -n many",
          "run" + model + "-p x -c 0", "run" + model + "-p x -t 0", "eval" + model + "-f x --kv f16 --chunks 0",
          "eval" + model + "-f x --kv f16 --mode sideways", "eval" + model + "-f x", std::string("bench"),
          std::string("bench attention --tokens 0"), std::string("bench attention --mode sideways")}) {
        const Outcome r = run_command(args);
        EXPECT_EQ(r.exit_code, 2) << args << "\n" << r.err;
        EXPECT_FALSE(r.err.empty()) << args;
    }
    EXPECT_EQ(run_command("--help").exit_code, 0);
}

}  // namespace
}  // namespace turboquant::cli
