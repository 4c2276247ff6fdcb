// The command `turboquant needle` on a model that finds some of them.
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "support.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

TEST(NeedleCommand, FormatsFindWhatTheyShould) {
    const std::string wording = write_file("short.json", R"({"answer_digits": 3})");
    const Outcome r = run_command("needle" + kModel + "-f " + kText + " --ctx 256,512 --depths 1 --needles 40 --json --template " +
                                  wording + " --kv f16 turbo8 tcq1,sink=0,recent=0");
    ASSERT_EQ(r.exit_code, 0) << r.err;
    std::map<std::string, int> found;
    const json rows = json::parse(r.out);
    ASSERT_EQ(rows.size(), 6u);
    for (const json& row : rows) {
        std::set<std::string> keys;
        for (const auto& [key, value] : row.items()) keys.insert(key);
        EXPECT_EQ(keys, (std::set<std::string>{"kv", "ctx", "depth", "found", "total"}));
        EXPECT_EQ(row["total"], 40);
        EXPECT_EQ(row["depth"], 50);
        EXPECT_LE(row["found"], row["total"]);
        found[row["kv"]] += row["found"].get<int>();
    }
    const int f16 = found["f16"], turbo8 = found["turbo8"], tcq1 = found["tcq1,sink=0,recent=0"];
    RecordProperty("found", std::to_string(f16) + " " + std::to_string(turbo8) + " " + std::to_string(tcq1));
    EXPECT_GE(f16, 15);
    EXPECT_NEAR(turbo8, f16, 5) << "near-ties go either way";
    EXPECT_LE(tcq1, f16 / 3) << "one bit loses them";
}

TEST(NeedleCommand, QuestionsOfOneHaystackDoNotDisturbEachOther) {
    // The same haystack twice, asked in one order: what is found must not depend on how many questions came before. Depths of one haystack
    // are asked in turn, so a cache that was not cut back cleanly would lose the later ones.
    const std::string wording = write_file("wide.json", R"({"answer_digits": 3})");
    const auto rows = [&](const std::string& more) {
        const Outcome r = run_command("needle" + kModel + "-f " + kText + " --ctx 512 --depths 4 --needles 10 --json --template " +
                                      wording + " --kv raw f16 " + more);
        EXPECT_EQ(r.exit_code, 0) << r.err;
        return json::parse(r.out, nullptr, false);
    };
    const json a = rows(""), b = rows("-b 64");
    EXPECT_EQ(a, b) << a << b;
}

TEST(NeedleCommand, TableAndWarnings) {
    const std::string text = write_file("tiny.txt", "One sentence only.");
    const Outcome r =
        run_command("needle" + kModel + "-f " + text + " --ctx 512,1024 --depths 3 --needles 1 --kv q8_0 turbo4 --sink 0 --recent 8");
    ASSERT_EQ(r.exit_code, 0) << r.err;
    for (const char* part : {"ctx 512", "ctx 1024", "/3", "found of 1", "50 %", "100 %", "turbo4"}) EXPECT_TRUE(has(r.out, part)) << r.out;
    EXPECT_TRUE(has(r.err, "repeated") && has(r.err, "--kv turbo4: turboquant backend") && has(r.err, "recent=8")) << r.err;
}

TEST(NeedleCommand, BadInputEndsWithOneAndSaysWhatToDo) {
    const std::string empty = write_file("empty.txt", ""), wording = write_file("bad.json", R"({"question": "?"})");
    const struct {
        std::string args, cause, remedy;
    } cases[] = {
        {"-f missing.txt --kv f16", "missing.txt", "check the path"},
        {"-f " + empty + " --kv f16", "is empty", "give one"},
        {"-f " + kText + " --kv f16 --ctx 100", "context of 100", "--ctx "},
        {"-f " + kText + " --kv f16 --ctx 1", "context of 1 ", "--ctx "},
        {"-f " + kText + " --kv f16 --depths 27 --needles 30", "27 needles", "--template"},
        {"-f " + kText + " --kv f16 --template " + wording, "\"question\" lacks", "{word}"},
        {"-f " + kText + " --kv f16 --template no.json", "no.json", "check the path"},
        {"-f " + kText + " --kv turbo9", "turbo9", "turbo4"},
    };
    for (const auto& c : cases) {
        const Outcome r = run_command("needle" + kModel + c.args);
        EXPECT_EQ(r.exit_code, 1) << c.args << "\n" << r.err;
        EXPECT_TRUE(has(r.err, "error: ") && has(r.err, c.cause) && has(r.err, c.remedy)) << c.args << "\n" << r.err;
    }
    EXPECT_EQ(run_command("needle" + kModel + "-f x").exit_code, 2);
    EXPECT_EQ(run_command("needle" + kModel + "-f x --kv f16 --ctx 0").exit_code, 2);

    // The least that the message names is enough.
    const Outcome small = run_command("needle" + kModel + "-f " + kText + " --kv f16 --ctx 100");
    const std::string least = small.err.substr(small.err.find("--ctx ") + 6, 3);
    const Outcome r = run_command("needle" + kModel + "-f " + kText + " --kv f16 --needles 1 --ctx " + least);
    EXPECT_EQ(r.exit_code, 0) << r.err;
}

}  // namespace
}  // namespace turboquant::cli
