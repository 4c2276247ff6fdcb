// Whom long work tells what it does and how far it is. The libraries print nothing themselves.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace turboquant::llama {

/// Either may be empty. Called on the thread that works.
struct Monitor {
    /// done of total, in a unit of the work's own; done == total once at the end, also if it ends by an exception.
    std::function<void(std::string_view work, double done, double total)> progress;
    /// The log: one line, without its line break.
    std::function<void(const std::string& line)> log;

    void note(const std::string& line) const {
        if (log) log(line);
    }
};

/// A piece of work under way, as long as it lives.
class Work {
  public:
    Work(const Monitor& monitor, std::string name, double total) : monitor_(&monitor), name_(std::move(name)), total_(total) { tell(); }
    ~Work() {
        done_ = total_;
        tell();
    }
    Work(const Work&) = delete;
    Work& operator=(const Work&) = delete;

    void add(double amount) {
        done_ += amount;
        if (done_ < total_) tell();  // the end is told by the destructor
    }

  private:
    void tell() const {
        if (monitor_->progress) monitor_->progress(name_, done_, total_);
    }

    const Monitor* monitor_;
    std::string name_;
    double total_, done_ = 0;
};

}  // namespace turboquant::llama
