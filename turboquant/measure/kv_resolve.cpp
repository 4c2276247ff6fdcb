#include "turboquant/measure/kv_resolve.h"

#include <algorithm>
#include <map>
#include <memory>

#include "fmt/format.h"

namespace turboquant::measure {
KvArguments::KvArguments(const std::vector<std::string>& texts, WindowSizes windows) {
    for (const std::string& text : texts) {
        Argument a;
        if (const auto word = is_auto_word(text) ? std::get<AutoWord>(parse_kv_word(text)) : AutoWord{{}, {}, false}; word.measured) {
            a.automatic = word;
            a.automatic->options.windows.set(windows);
            a.spec.name = text;
        } else if (is_plan_file_word(text)) {
            a.plan = read_plan_file(text);
            a.spec = {text, to_spec(*a.plan)};
        } else {
            a.spec = llama::parse_cache_spec(text);
        }
        if (a.spec.ours) a.spec.ours->windows.set(windows);
        if (std::ranges::none_of(arguments_, [&](const Argument& b) { return b.spec.name == a.spec.name; }))
            arguments_.push_back(std::move(a));
    }
}

bool KvArguments::need_device() const {
    return std::ranges::any_of(arguments_, [](const Argument& a) { return a.spec.ours || a.automatic; });
}

std::vector<llama::CacheSpec> KvArguments::resolve(llama::ModelFile& file, int n_ctx, PlannerOptions options,
                                                   std::vector<std::optional<Plan>>* plans) const {
    if (need_device()) file.use_device();
    std::vector<llama::CacheSpec> specs;
    std::map<std::string, std::unique_ptr<Planner>> planners;  // one for all budgets with the same options
    for (const Argument& a : arguments_) {
        specs.push_back(a.spec);
        if (a.plan) {
            const llama::ModelId id = llama::identify_model(file.path());
            check_model(*a.plan, id.hash, id.name);
        }
        if (plans) plans->push_back(a.plan);
        if (!a.automatic) continue;
        options.spec = a.automatic->options;
        auto& planner = planners[to_string(options.spec)];
        if (!planner) planner = std::make_unique<Planner>(file, options);
        const Plan plan = planner->plan(a.automatic->budget, n_ctx);
        const bool uniform = to_spec(plan).k_layers.empty() && to_spec(plan).v_layers.empty();
        file.monitor().note(fmt::format("{}: {:.3f} bits per value, predicted mean KLD {:.5f}{}: {}", a.spec.name, plan.bits_per_value,
                                        *plan.predicted_kld,
                                        plan.race.empty() ? ""
                                        : uniform         ? ", a uniform pair, which won the race"
                                                          : fmt::format(", won the race against {} others", plan.race.size() - 1),
                                        brief_text(to_spec(plan))));
        specs.back().ours = to_spec(plan);
        if (plans) plans->back() = plan;
    }
    return specs;
}

}  // namespace turboquant::measure
