#include "turboquant/llama/log.h"

#include <deque>
#include <mutex>

#include "llama.h"

namespace turboquant::llama {
namespace {

constexpr std::size_t kKept = 12;

struct Log {
    std::mutex mutex;
    std::deque<std::string> problems;
    void (*show)(const char*) = nullptr;
    bool continues = false;  // the last message was a problem, and a continuation belongs to it
};

Log& log() {
    static auto* l = new Log;  // never destroyed: llama.cpp may still log while the process ends
    return *l;
}

void on_message(ggml_log_level level, const char* text, void*) {
    Log& l = log();
    const std::scoped_lock lock(l.mutex);
    if (l.show) l.show(text);
    if (level == GGML_LOG_LEVEL_CONT) {
        if (l.continues && !l.problems.empty()) l.problems.back() += text;
        return;
    }
    l.continues = level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR;
    if (!l.continues) return;
    l.problems.emplace_back(text);
    if (l.problems.size() > kKept) l.problems.pop_front();
}

}  // namespace

void install_log(void (*show)(const char* text)) {
    log().show = show;
    llama_log_set(on_message, nullptr);
}

std::string take_log_problems() {
    Log& l = log();
    const std::scoped_lock lock(l.mutex);
    std::string out;
    for (std::string& p : l.problems) {
        while (!p.empty() && p.back() == '\n') p.pop_back();
        if (!p.empty()) out += "\n    " + p;
    }
    l.problems.clear();
    return out;
}

}  // namespace turboquant::llama
