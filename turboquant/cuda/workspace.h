// Where things lie in the workspace of an attention plan.
#pragma once

#include <cstddef>

#include "turboquant/cuda/attention.h"

namespace turboquant::cuda {

struct WorkspaceLayout {
    std::size_t count, items, part_ml, part, bytes;
};
WorkspaceLayout workspace_layout(const AttentionPlan& plan);

}  // namespace turboquant::cuda
