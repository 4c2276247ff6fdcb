// Rows of keys and values that one launch keeps.
#pragma once

#include "turboquant/cuda/step.h"

namespace turboquant::cuda {

/// Of the same batch.
struct KeptPair {
    KeepRows of[2];
};

}  // namespace turboquant::cuda
