// `turboquant run`: what stands where in the output.
#include <gtest/gtest.h>

#include "support.h"

namespace turboquant::cli {
namespace {

TEST(Run, EchoPutsThePromptBeforeTheTextAndBehindTheConfiguration) {
    const std::string args = "run" + kModel + " -p 'The old house' -n 8 --kv f16 ";
    const Outcome plain = run_command(args), echo = run_command(args + "--echo");
    ASSERT_EQ(echo.exit_code, 0) << echo.err;
    EXPECT_EQ(echo.out, "The old house" + plain.out);
    // As a terminal shows it: both streams in one file.
    const auto both = temp_dir() / "both";
    ASSERT_EQ(std::system(("'" TQ_COMMAND "' " + args + "--echo >'" + both.string() + "' 2>&1").c_str()), 0);
    const std::string seen = read_all(both);
    const std::size_t configuration = seen.find("--kv f16"), text = seen.find(echo.out);
    ASSERT_NE(configuration, seen.npos) << seen;
    ASSERT_NE(text, seen.npos) << seen;
    EXPECT_LT(configuration, text);
}

}  // namespace
}  // namespace turboquant::cli
