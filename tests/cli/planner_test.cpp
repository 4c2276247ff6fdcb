// Plans from outside: what is measured, what they give, and what is refused.
#include <gtest/gtest.h>

#include <algorithm>

#include "nlohmann/json.hpp"
#include "support.h"
#include "turboquant/llama/model_id.h"
#include "turboquant/planner/plan.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

TEST(PlanCommand, PlanBeatsUniformAtFewerBitsAndHoldsItsPrediction) {
    const std::string plan = (temp_dir() / "plan.json").string();
    const Outcome r = run_command("plan" + kModel + "--bits 4.28 -c 512 --calib-tokens 1024 --measure -o " + plan);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const Plan p = read_plan_file(plan);
    EXPECT_EQ(p.model_hash, llama::identify_model(TQ_DEMO_MODEL).hash);
    EXPECT_EQ(p.layers.size(), 6u);
    EXPECT_LE(p.bits_per_value, 4.28);
    EXPECT_GT(p.bits_per_value, 4.28 - 0.17 / 2) << "no more room is left than one bit of one head of a layer";
    EXPECT_TRUE(std::ranges::any_of(p.layers, [](const PlannedLayer& l) { return l.k.mixed() || l.v->mixed(); })) << r.out;
    ASSERT_TRUE(p.predicted_kld && p.measured_kld);
    EXPECT_GT(*p.predicted_kld / *p.measured_kld, 0.5);
    EXPECT_LT(*p.predicted_kld / *p.measured_kld, 2.0);
    EXPECT_NE(p.measurements->scale_gain, 1) << "keys and queries of the calibration text were seen, and scales of channels tried";
    // It was held against uniform pairs, and is the first of them all.
    ASSERT_GE(p.race.size(), 3u) << r.out;
    EXPECT_EQ(p.race[0].formats, brief_text(to_spec(p)));
    EXPECT_EQ(p.race[0].behind, 0);
    for (std::size_t i = 1; i < p.race.size(); i++) {
        EXPECT_NEAR(p.race[i].behind, p.race[i].kld - p.race[0].kld, 1e-9);
        EXPECT_GE(p.race[i].behind, p.race[i - 1].behind);
        EXPECT_GT(p.race[i].error, 0);
    }
    EXPECT_TRUE(std::ranges::any_of(p.race, [](const RaceRow& row) {
        return row.formats.starts_with("k=tcq4,v=tcq3") && row.formats.find("k0=") == std::string::npos;
    })) << r.out;

    // Another budget from what was measured: nothing runs, not even the model is loaded.
    const std::string other = (temp_dir() / "other.json").string();
    const Outcome again = run_command("plan" + kModel + "--from " + plan + " --bits 3.3 -c 512 -o " + other);
    ASSERT_EQ(again.exit_code, 0) << again.err;
    EXPECT_EQ(again.err, "");
    EXPECT_LE(read_plan_file(other).bits_per_value, 3.3);
    EXPECT_EQ(read_plan_file(other).measurements, p.measurements);
    EXPECT_TRUE(read_plan_file(other).race.empty());

    const Outcome e = run_command("eval" + kModel + "-f " + kText + " -c 512 --chunks 4 --weights f16 --json --kv turbo4 " + plan);
    ASSERT_EQ(e.exit_code, 0) << e.err;
    const json rows = json::parse(e.out);
    EXPECT_EQ(rows[1]["kv"], plan);
    EXPECT_NEAR(rows[1]["bits_per_value"].get<double>(), p.bits_per_value, 1e-9) << "everything that the cache stores was counted";
    // .78 to .82 of it, as processors round.
    EXPECT_LT(rows[1]["mean_kld"], 0.9 * rows[0]["mean_kld"].get<double>());
    EXPECT_GT(rows[1]["mean_kld"], 0.6 * rows[0]["mean_kld"].get<double>());
}

TEST(PlanCommand, AutoOnTheSpotAndByMemory) {
    // The second half of the text is calibrated on, of the first four chunks are evaluated.
    const std::string text = read_all(kTextFile), half = write_file("half.txt", text.substr(text.size() / 2));
    // 256 cells of 1536 values: 150 KiB are 3.125 bits.
    const Outcome e = run_command("eval" + kModel + "-f " + kText +
                                  " -c 256 --chunks 4 --weights f16 --json --kv auto:150KiB auto:2.4 turbo3 turbo2 --calib " + half);
    ASSERT_EQ(e.exit_code, 0) << e.err;
    const json rows = json::parse(e.out);
    EXPECT_EQ(rows[0]["kv"], "auto:150KiB");
    EXPECT_LE(rows[0]["kv_bytes"], 150 * 1024);
    EXPECT_GT(rows[0]["kv_bytes"], 140 * 1024);
    EXPECT_LE(rows[1]["bits_per_value"], 2.4);
    const auto times = [&](int i, int of) { return rows[i]["mean_kld"].get<double>() / rows[of]["mean_kld"].get<double>(); };
    EXPECT_LT(times(0, 2), 1) << "fewer bits than turbo3, and better";
    EXPECT_LT(times(1, 3), 0.8) << "turbo2";
    const Outcome r = run_command("run" + kModel + "-p 'It was' -n 8 --kv auto:3.25,offset=off --calib " + half);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    EXPECT_TRUE(has(r.err, "offset=off")) << r.err;
}

TEST(PlanCommand, SameSeedSamePlan) {
    const std::string args = "plan" + kModel + "--bits 3.3 --calib-tokens 256 ";
    const Outcome a = run_command(args), b = run_command(args), c = run_command(args + "--seed 2");
    ASSERT_EQ(a.exit_code, 0) << a.err;
    EXPECT_EQ(a.out, b.out);
    EXPECT_NE(a.out, c.out) << "another text, another measurement";
}

TEST(PlanCommand, BadInputEndsWithOneAndSaysWhatToDo) {
    const std::string foreign = write_file(
        "foreign.json",
        R"({"turboquant_plan": 1, "model": {"hash": "x", "name": "other"}, "layers": [{"layer": 0, "k": "turbo4", "v": "turbo4"}]})");
    const std::string broken = write_file("broken.json", "{\"turboquant_plan\": 1,");
    const struct {
        std::string args, cause, remedy;
    } cases[] = {
        {"run" + kModel + "-p x --kv " + foreign, "another model", "turboquant plan"},
        {"run" + kModel + "-p x --kv " + broken, "broken.json", "JSON"},
        {"run" + kModel + "-p x --kv missing.json", "missing.json", "check the path"},
        {"run" + kModel + "-p x --kv auto:1.1", "below the least", "1.33"},
        {"run" + kModel + "-p x --kv auto:lots", "lots", "512MiB"},
        {"run" + kModel + "-p x --kv auto:4,offset=maybe", "maybe", "on"},
        {"plan" + kModel + "--memory 12", "12", "unit"},
        {"plan" + kModel + "--memory 1KiB --ctx 2048", "below the least", "MiB"},
        {"plan" + kModel + "--bits 4 --calib missing.txt", "missing.txt", "check the path"},
        {"plan -m missing.gguf --bits 4", "missing.gguf", "check -m"},
        {"plan" + kModel + "--bits 4 --calib-tokens 128 -o /no/such/folder/p.json", "/no/such", "folder"},
    };
    for (const auto& c : cases) {
        const Outcome r = run_command(c.args);
        EXPECT_EQ(r.exit_code, 1) << c.args << "\n" << r.err;
        EXPECT_TRUE(has(r.err, "error: ") && has(r.err, c.cause) && has(r.err, c.remedy)) << c.args << "\n" << r.err;
    }
    for (const std::string& args : {"plan" + kModel, "plan" + kModel + "--bits 4 --memory 1MiB", "plan" + kModel + "--bits 0.5"})
        EXPECT_EQ(run_command(args).exit_code, 2) << args;
}

}  // namespace
}  // namespace turboquant::cli
