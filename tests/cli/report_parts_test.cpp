// `turboquant report --parts`: what is not asked for is neither measured nor shown.
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "support.h"
#include "turboquant/cli/report_page.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

const std::string kShort = "-c 256 --chunks 1 --depths 0 --no-plan ";

/// The document; that no page can be drawn does not matter.
json document(const std::string& parts, const std::string& rest) {
    const auto data = temp_dir() / "parts.json";
    const Outcome r = run_command("report" + kModel + kShort + "--parts " + parts + " --python /nonexistent/python -o " +
                                  (temp_dir() / "parts.html").string() + " --json " + data.string() + " " + rest);
    EXPECT_TRUE(has(r.err, "The numbers are in")) << r.err;
    return json::parse(read_all(data), nullptr, false);
}

TEST(ReportParts, OnlyThoseThatAreAskedFor) {
    const json inspect = document("inspect", "");
    EXPECT_EQ(inspect["model"], inspect["inspect"]["model"]);
    EXPECT_EQ(inspect["inspect"]["text"], "text of several kinds");
    for (const char* part : {"eval", "plans", "speed"}) EXPECT_FALSE(inspect.contains(part)) << part;

    const json two = document("plan,speed", "--kv f16 turbo4 -f " + kText);
    EXPECT_TRUE(two["plans"].is_array() && two["plans"].empty());
    ASSERT_EQ(two["speed"]["rows"].size(), 2u);
    EXPECT_EQ(two["speed"]["rows"][1]["kv"], "turbo4");
    for (const char* part : {"eval", "inspect"}) EXPECT_FALSE(two.contains(part)) << part;
}

TEST(ReportParts, PageOfSome) {
    const std::string python = find_python("");
    if (const std::string problem = python_problem(python); !problem.empty()) GTEST_SKIP() << problem;
    struct Page {
        const char *part, *rest, *heading;
    };
    const std::string text = "--kv q4_0 -f " + kText;
    for (const Page& p : {Page{"inspect", "", "Keys and values"}, Page{"eval", text.c_str(), "Quality against bits"},
                          Page{"speed", text.c_str(), "Decode speed against depth"}}) {
        const auto page = temp_dir() / "some.html";
        const Outcome r = run_command("report" + kModel + kShort + "--parts " + p.part + " -o '" + page.string() + "' " + p.rest);
        ASSERT_EQ(r.exit_code, 0) << p.part << ": " << r.err;
        const std::string html = read_all(page);
        EXPECT_TRUE(has(html, p.heading)) << p.part;
        EXPECT_EQ(html.find("<h2>"), html.rfind("<h2>")) << p.part << ": no other part";
    }
}

TEST(ReportParts, Errors) {
    EXPECT_EQ(run_command("report" + kModel + "-o x.html --parts nonsense").exit_code, 2);
    for (const char* part : {"eval", "speed"})
        EXPECT_EQ(run_command("report" + kModel + "-o x.html --parts " + part).exit_code, 2) << "no text";
}

}  // namespace
}  // namespace turboquant::cli
