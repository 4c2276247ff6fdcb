// Unmodified processes, a C++ program and Python's llama_cpp, load the library and get the cache and the logits of our own command.
#include <sys/wait.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "gtest/gtest.h"
#include "tests/codec/temp_dir.h"
#include "turboquant/llama/log.h"
#include "turboquant/llama/session.h"
#include "turboquant/llama/text.h"

namespace turboquant::llama {
namespace {

namespace fs = std::filesystem;
constexpr int kContext = 4096;

/// About 500 tokens, written for this test.
std::string test_text() {
    const char* const sentences[] = {
        "The ferry left at dawn with nine passengers and a crate of pears. ",
        "Nobody had told the captain that the bridge was closed, so he waited, and the fog came in over the water. ",
        "A girl in a green coat counted the gulls on the rail: seven, then twelve, then none at all. ",
        "In the engine room the old man wrote numbers in a book, as he had done every morning for thirty years. ",
    };
    std::string text;
    for (int i = 0; i < 6; i++)
        for (const char* s : sentences) text += s + std::to_string(i) + " ";
    return text;
}

struct StockRun {
    int exit_code = -1;
    double kv_mib = 0;
    std::vector<float> logits;
};

class Stock : public testing::TestWithParam<const char*> {
  protected:
    void SetUp() override {
        install_log();
        dir_ = test::temp_dir() / "stock";
        fs::create_directories(dir_);
        std::ofstream(dir_ / "text.txt") << test_text();
    }

    void TearDown() override { fs::remove_all(dir_); }

    /// `program` as typed in a shell; the rest of its arguments is added here.
    StockRun run_stock(const std::string& program) {
        const fs::path out = dir_ / "out", logits = dir_ / "logits";
        std::ostringstream line;
        line << program << " '" TQ_DEMO_MODEL "' " << GetParam() << " '" << (dir_ / "text.txt").string() << "' " << kContext << " '"
             << logits.string() << "' >'" << out.string() << "'";
        const int status = std::system(line.str().c_str());
        StockRun run;
        run.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        std::ifstream(out) >> run.kv_mib;
        std::error_code error;
        if (const auto size = fs::file_size(logits, error); !error) {
            run.logits.resize(size / sizeof(float));
            std::ifstream(logits, std::ios::binary).read(reinterpret_cast<char*>(run.logits.data()), static_cast<std::streamsize>(size));
        }
        return run;
    }

    void expect_as_our_command(const StockRun& run) {
        ASSERT_EQ(run.exit_code, 0);
        const CacheSpec spec = parse_cache_spec(GetParam());
        ModelFile file(TQ_DEMO_MODEL, ModelOptions{});
        Session session(file, spec, ContextOptions{.n_ctx = kContext, .n_threads = 2});
        const std::vector<llama_token> tokens = tokenize(session.vocab(), test_text(), true);
        const int n = static_cast<int>(tokens.size());
        ASSERT_GT(n, 400);
        const float* ours = session.decode(tokens, 0, 0, n);
        ASSERT_EQ(run.logits.size(), tokens.size() * static_cast<std::size_t>(session.n_vocab()));
        float largest = 0, spread = 0;
        for (std::size_t i = 0; i < run.logits.size(); i++) {
            largest = std::max(largest, std::abs(run.logits[i] - ours[i]));
            spread = std::max(spread, std::abs(ours[i]));
        }
        EXPECT_EQ(largest, 0);
        EXPECT_GT(spread, 1);  // logits of a model at work, not zeros
        const KvMemory memory = session.memory();
        EXPECT_NEAR(run.kv_mib * (1 << 20), memory.bytes, 0.03 * memory.bytes);
    }

    fs::path dir_;
};

TEST_P(Stock, CppProgram) { expect_as_our_command(run_stock("GGML_BACKEND_PATH='" TQ_BACKEND "' '" TQ_STOCK_LOGITS "'")); }

TEST_P(Stock, Python) {
    if (std::system("'" TQ_LLAMA_PYTHON "' -c 'import llama_cpp' >/dev/null 2>&1") != 0)
        GTEST_SKIP() << "no Python with llama_cpp (with LLAMA_PREFIX, scripts/setup makes none)";
    if (std::string(TQ_SANITIZERS) != "") GTEST_SKIP() << "a sanitized library does not load into plain Python";
    expect_as_our_command(run_stock("'" TQ_LLAMA_PYTHON "' '" TQ_STOCK_PYTHON_SCRIPT "' '" TQ_BACKEND "'"));
}

INSTANTIATE_TEST_SUITE_P(Formats, Stock, testing::Values("turbo4", "turbo2", "raw"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace turboquant::llama
