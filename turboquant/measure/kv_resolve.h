// What `--kv` takes beyond the words of cache_spec.h (spec/words.h): plan files, and plans made on the spot, measured on this model.
#pragma once

#include <string>
#include <vector>

#include "turboquant/measure/planner.h"

namespace turboquant::measure {

class KvArguments {
  public:
    /// Parses all texts, without a model: whatever can be wrong about the words is told now. Repetitions are dropped. Throws Error
    /// and std::invalid_argument.
    /// `windows`: of all formats of ours, where given (kAuto: as the text says).
    explicit KvArguments(const std::vector<std::string>& texts, WindowSizes windows = {});

    /// Whether any format is ours: then the model needs our device.
    bool need_device() const;

    /// The formats, in order. Plans for another model are refused; those of `auto` are made (measuring takes a minute or so, once for all
    /// budgets) and told to the log. Their name is the text they were given as. n_ctx: context for which a budget in bytes is counted; 0:
    /// the one the model was trained on. `plans`, if given: beside each format the plan it comes from, if any.
    std::vector<llama::CacheSpec> resolve(llama::ModelFile& file, int n_ctx, PlannerOptions options,
                                          std::vector<std::optional<Plan>>* plans = nullptr) const;

  private:
    struct Argument {
        llama::CacheSpec spec;     ///< of plan files: the plan's
        std::optional<Plan> plan;  ///< from a file
        std::optional<AutoWord> automatic;
    };
    std::vector<Argument> arguments_;
};

}  // namespace turboquant::measure
