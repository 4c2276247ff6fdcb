// What `--kv` takes beyond the words of cache_spec.h (spec/words.h): plan files, and plans made on the spot, measured on this model.
#pragma once

#include <string>
#include <vector>

#include "turboquant/cli/planner.h"

namespace CLI {
class App;
}

namespace turboquant::cli {

/// --sink and --recent: exact windows of all formats of ours.
void add_window_options(CLI::App& command, WindowSizes& windows);

class KvArguments {
  public:
    /// Parses all texts, without a model: whatever can be wrong about the words is told now. Repetitions are dropped. Throws CommandError
    /// and std::invalid_argument.
    /// `windows`: of all formats of ours, where given (kAuto: as the text says).
    explicit KvArguments(const std::vector<std::string>& texts, WindowSizes windows = {});

    /// The formats, in order. Plans for another model are refused; those of `auto` are made (measuring takes a minute or so, once for all
    /// budgets) and shown on stderr. Their name is the text they were given as. n_ctx: context for which a budget in bytes is counted; 0:
    /// the one the model was trained on. `plans`, if given: beside each format the plan it comes from, if any.
    std::vector<CacheSpec> resolve(ModelFile& file, const std::string& model_path, int n_ctx, PlannerOptions options,
                                   std::vector<std::optional<Plan>>* plans = nullptr) const;

  private:
    struct Argument {
        CacheSpec spec;                ///< of plan files: the plan's
        std::optional<Plan> plan;      ///< from a file
        std::optional<AutoWord> automatic;
    };
    std::vector<Argument> arguments_;
};

}  // namespace turboquant::cli
