// What may stand where a cache is specified, at the command line and in the configuration variable: the formats themselves, a budget to
// find them for, or a file that holds them.
//
// clang-format off
//   TEXT = SPEC                      kv_spec.h
//        | auto:BUDGET[,OPTION...]   the best formats within BUDGET: bits per value ("auto:4.25") or memory ("auto:512MiB"); OPTION as in a SPEC
//        | auto4|auto3|auto2[,...]   the best formats within 4.25, 3.25, 2.25 bits per value that can be had without measuring (planner/prior.h)
//        | FILE.json                 a plan written by `turboquant plan` (planner/plan.h)
// clang-format on
#pragma once

#include <string>
#include <string_view>
#include <variant>

#include "turboquant/spec/kv_spec.h"

namespace turboquant {

/// A budget as a user writes it: bits per value, or bytes of the whole cache.
struct Budget {
    double bits = 0;
    double bytes = 0;  ///< if bits is 0
};

/// "4.25" or "512MiB" (KiB, MiB, GiB; KB, MB, GB). Throws std::invalid_argument.
Budget parse_budget(std::string_view text);

struct AutoWord {
    Budget budget;
    SpecOptions options;
    bool measured = true;  ///< false: of a word of kUnmeasured, which never measures
};

/// Words, which are also names of devices, for formats that are chosen by rules.
struct UnmeasuredWord {
    std::string_view word;
    double bits;
};
inline constexpr UnmeasuredWord kUnmeasured[] = {{"auto4", 4.25}, {"auto3", 3.25}, {"auto2", 2.25}};

struct PlanFileWord {
    std::string path;
};

using KvWord = std::variant<KvSpec, AutoWord, PlanFileWord>;

/// True for texts of the second and third kind; any other is a SPEC, or an error.
bool is_auto_word(std::string_view text);
bool is_plan_file_word(std::string_view text);

/// Throws std::invalid_argument as the parsers of the parts.
KvWord parse_kv_word(std::string_view text);

/// "auto:4.25".
std::string auto_name(double bits);

}  // namespace turboquant
