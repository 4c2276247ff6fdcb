#include "turboquant/llama/text.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "fmt/format.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

std::string read_text_file(const std::string& path) {
    if (std::filesystem::is_directory(path)) throw Error(fmt::format("text file '{}' is a folder; name a file", path));
    std::ifstream in(path, std::ios::binary);
    if (!in) throw Error(fmt::format("cannot read text file '{}': {}; check the path", path, std::strerror(errno)));
    std::ostringstream buffer;
    buffer << in.rdbuf();
    std::string text = std::move(buffer).str();
    if (text.ends_with('\n')) text.pop_back();
    if (text.empty()) throw Error(fmt::format("text file '{}' is empty; give one with text in it", path));
    return text;
}

std::vector<llama_token> tokenize(const llama_vocab* vocab, const std::string& text, bool parse_special) {
    const auto size = static_cast<std::int32_t>(text.size());
    const std::int32_t n = -llama_tokenize(vocab, text.data(), size, nullptr, 0, /*add_special=*/true, parse_special);
    if (n <= 0) throw Error("the text gives no tokens; give a longer text");
    std::vector<llama_token> tokens(static_cast<std::size_t>(n));
    if (llama_tokenize(vocab, text.data(), size, tokens.data(), n, true, parse_special) != n)
        throw Error("the model's tokenizer failed on this text");
    return tokens;
}

std::string token_text(const llama_vocab* vocab, llama_token token) {
    std::string text(32, '\0');
    std::int32_t n = llama_token_to_piece(vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, /*special=*/false);
    if (n < 0) {
        text.resize(static_cast<std::size_t>(-n));
        n = llama_token_to_piece(vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, false);
    }
    text.resize(static_cast<std::size_t>(std::max(n, 0)));
    return text;
}

}  // namespace turboquant::llama
