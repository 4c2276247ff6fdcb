// Text in: files and tokens.
#pragma once

#include <string>
#include <vector>

#include "llama.h"

namespace turboquant::llama {

/// Whole file, without one trailing line break (as llama.cpp's own tools read -f). Throws Error if it cannot be read or is empty.
std::string read_text_file(const std::string& path);

/// Tokens of a text with the special tokens that the model adds (BOS). parse_special: words such as <|im_start|> in the text become special
/// tokens (llama.cpp's tools do so for prompts, not for perplexity). Throws Error if there are none.
std::vector<llama_token> tokenize(const llama_vocab* vocab, const std::string& text, bool parse_special);

/// Text of one token, special ones as nothing.
std::string token_text(const llama_vocab* vocab, llama_token token);

}  // namespace turboquant::llama
