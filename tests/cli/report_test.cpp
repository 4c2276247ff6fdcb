// `turboquant report`: the document, the page, and what happens where no page can be drawn.
#include <gtest/gtest.h>

#include <regex>
#include <set>

#include "nlohmann/json.hpp"
#include "support.h"
#include "turboquant/cli/report_page.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

int count(const std::string& text, const std::string& part) {
    int n = 0;
    for (std::size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) n++;
    return n;
}

std::string report(const std::string& rest) {
    return "report" + kModel + "-f " + kText + " -c 256 --chunks 1 --kv turbo4 --kv q4_0 " + rest;
}

TEST(Report, KeepsTheNumbersWhereNoPageCanBeDrawn) {
    const auto page = temp_dir() / "none.html", data = temp_dir() / "none.html.json";
    const Outcome r = run_command(report("--no-plan --depths 100,0 --python /nonexistent/python -o '" + page.string() + "'"));
    EXPECT_EQ(r.exit_code, 1);
    EXPECT_TRUE(has(r.err, "/nonexistent/python") && has(r.err, "matplotlib") && has(r.err, data.string())) << r.err;
    EXPECT_LT(r.err.find("warning"), r.err.find("decode speed")) << "told before the measurements: " << r.err;
    EXPECT_FALSE(exists(page));
    const json j = json::parse(read_all(data));
    EXPECT_EQ(j["turboquant_report"], 1);
    EXPECT_EQ(j["inspect"]["layers"].size(), 6u);
    EXPECT_TRUE(j["plans"].empty());
    ASSERT_EQ(j["eval"]["rows"].size(), 3u);
    EXPECT_EQ(j["eval"]["rows"][2]["family"], "floor") << "the model's weights are quantized";
    EXPECT_EQ(j["eval"]["rows"][0]["family"], "turboquant");
    EXPECT_EQ(j["eval"]["rows"][1]["family"], "llama.cpp");
    EXPECT_EQ(j["eval"]["rows"][1]["bits_per_value"], 4.5);
    const json& speed = j["speed"]["rows"];
    ASSERT_EQ(speed.size(), 4u);
    for (std::size_t i = 0; i < 4; i++) {
        EXPECT_EQ(speed[i]["depth"], i < 2 ? 0 : 100) << "ascending, however they were given";
        EXPECT_EQ(speed[i]["kv"], i % 2 ? "q4_0" : "turbo4");
        EXPECT_NEAR(speed[i]["tokens_per_s"].get<double>() * speed[i]["ms"].get<double>(), 1000, 1e-6);
        EXPECT_GT(speed[i]["tokens_per_s"], 1.0);
        EXPECT_LT(speed[i]["tokens_per_s"], 1e6);
    }
}

TEST(Report, PageStandsAlone) {
    const std::string python = find_python("");
    if (const std::string problem = python_problem(python); !problem.empty()) GTEST_SKIP() << problem;
    const auto page = temp_dir() / "page.html", data = temp_dir() / "page.json";
    const Outcome r = run_command(report("--bits 4.5 --depths 0 -o '" + page.string() + "' --json '" + data.string() + "'"));
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const std::string html = read_all(page);
    EXPECT_EQ(json::parse(read_all(data))["plans"].size(), 1u);
    EXPECT_EQ(count(html, "<svg"), 5) << "divergence, norms, shares, plan, speed";
    EXPECT_EQ(count(html, "<svg"), count(html, "</svg>"));
    EXPECT_EQ(count(html, "<table"), 4) << "quality, layers, plan, speed";
    for (const char* outside : {"http:", "https:", "<script", "<link", "src=", "@import"}) EXPECT_FALSE(has(html, outside)) << outside;
    for (const char* part : {"turbo4", "q4_0", "4.500", "demo", "auto:4.5", "constant offset"}) EXPECT_TRUE(has(html, part)) << part;
    std::set<std::string> ids;
    const std::regex id("\\bid=\"([^\"]*)\"");
    for (std::sregex_iterator it(html.begin(), html.end(), id), end; it != end; ++it)
        EXPECT_TRUE(ids.insert((*it)[1]).second) << "twice on the page: " << (*it)[1];
    const std::regex use("(?:href=\"#|url\\(#)([^\")]*)");
    for (std::sregex_iterator it(html.begin(), html.end(), use), end; it != end; ++it)
        EXPECT_TRUE(ids.contains((*it)[1])) << "refers to nothing: " << (*it)[1];
}

/// The picture of docs/: from the rows of `eval --json`, as a file of its own; a page needs more than those.
TEST(Report, DrawsDivergenceFromRowsOfEval) {
    const std::string python = find_python("");
    if (const std::string problem = python_problem(python); !problem.empty()) GTEST_SKIP() << problem;
    const auto draw = [&](const std::string& rows, const std::string& arguments) {
        const std::string file = write_file("rows.json", rows);
        return std::system(("'" + python + "' '" TQ_REPORT_SCRIPT "' '" + file + "' " + arguments + " 2>/dev/null").c_str());
    };
    const Outcome r = run_command("eval" + kModel + "-f " + kText + " -c 256 --chunks 1 --json --kv turbo4 turbo3 q4_0");
    ASSERT_EQ(r.exit_code, 0) << r.err;
    json rows = json::parse(r.out);
    const auto svg = temp_dir() / "kld.svg";
    const std::string picture = "--picture kld --svg '" + svg.string() + "'";
    ASSERT_EQ(draw(rows.dump(), picture), 0);
    const std::string all = read_all(svg);
    EXPECT_TRUE(has(all, "<svg"));
    rows.erase(1);
    ASSERT_EQ(draw(rows.dump(), picture), 0);
    EXPECT_LT(read_all(svg).size(), all.size()) << "a point and its label fewer";
    EXPECT_NE(draw(rows.dump(), "-o page.html"), 0) << "rows are no page";
    EXPECT_NE(draw(rows.dump(), ""), 0);
    EXPECT_NE(draw("[{\"kv\": \"turbo4\"}]", picture), 0) << "rows of something else";
}

TEST(Report, Errors) {
    EXPECT_EQ(run_command("report" + kModel + "-o x.html").exit_code, 2) << "no text";
    const Outcome word = run_command("report" + kModel + "-f " + kText + " --kv nonsense -o x.html");
    EXPECT_EQ(word.exit_code, 1);
    EXPECT_TRUE(has(word.err, "nonsense")) << word.err;
}

}  // namespace
}  // namespace turboquant::cli
