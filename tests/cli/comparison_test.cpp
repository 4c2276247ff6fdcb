// What the composite formats are there to show (docs/outliers.md), on models small enough for a test.
#include <cmath>
#include <filesystem>

#include "nlohmann/json.hpp"
#include "support.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

json eval(const std::string& args) {
    const Outcome r = run_command("eval --json --sink 0 --recent 0 " + args);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    json rows = json::parse(r.out, nullptr, false);
    if (!rows.empty() && rows.back()["floor"] == true) rows.erase(rows.size() - 1);
    return rows;
}

double loss(const json& row) { return row["ppl"].get<double>() / row["ppl_f16"].get<double>(); }
double kld(const json& row) { return row["mean_kld"]; }

// Both spend 3 bits a key; Prod (QJL) gives one of them to an unbiased estimate, whose variance softmax amplifies. Composites keep the key
// offset, so it stays in on both sides.
TEST(Comparison, ProdLosesToMseByAWideMargin) {
    const json rows = eval(kModel + "-f " + kText + " -c 256 --chunks 2 --kv k=turbo3,v=raw,offset=off k=prod3,v=raw,offset=off");
    ASSERT_EQ(rows.size(), 2u);
    EXPECT_GT(kld(rows[1]), 3 * kld(rows[0])) << rows;
    EXPECT_LT(kld(rows[1]), 9 * kld(rows[0])) << rows;
    EXPECT_GE(rows[1]["bits_per_value"], rows[0]["bits_per_value"]);
    EXPECT_GT(loss(rows[1]) - 1, 2 * (loss(rows[0]) - 1)) << rows;
    EXPECT_LT(loss(rows[0]), 1.3);
    EXPECT_GT(loss(rows[0]), 1.01);
}

TEST(Comparison, OutlierChannelsSaveAModelWithAKeyBias) {
    const auto shared = std::filesystem::path(TQ_DEMO_MODEL).parent_path() / ".." / ".." / "shared";
    if (!std::filesystem::exists(shared / "models" / "biased.gguf")) GTEST_SKIP() << "../shared/models/biased.gguf is not there";
    const json rows = eval("-t 1 -m '" + (shared / "models" / "biased.gguf").string() + "' -f '" + (shared / "data" / "eval.txt").string() +
                           "' -c 256 --chunks 2 --kv turbo3,offset=off k=outlier3,v=turbo3,offset=off k=outlier3,v=raw,offset=off "
                           "uniform4,offset=off k=turbo3,v=raw,offset=off k=prod3,v=raw,offset=off");
    ASSERT_EQ(rows.size(), 6u);
    EXPECT_GT(loss(rows[0]), 8) << "uniform bits destroy the model";
    EXPECT_GT(loss(rows[3]), 8);
    EXPECT_LT(loss(rows[1]), 1.025);
    EXPECT_GT(loss(rows[1]), 0.97);
    EXPECT_GT(kld(rows[1]), 0.015);
    EXPECT_LT(kld(rows[1]), 0.06);
    EXPECT_LT(rows[1]["bits_per_value"], 3.45);
    EXPECT_GT(rows[1]["bits_per_value"], 3.2);
    EXPECT_LT(2 * rows[2]["bits_per_value"].get<double>() - 16, 3.65) << "the keys alone, with the cells' positions";
    EXPECT_GT(2 * rows[2]["bits_per_value"].get<double>() - 16, 3.4);
    EXPECT_GT(loss(rows[5]), 2 * loss(rows[4])) << "Prod against MSE, both broken by the bias";
    EXPECT_LT(loss(rows[5]), 40 * loss(rows[4]));
}

}  // namespace
}  // namespace turboquant::cli
