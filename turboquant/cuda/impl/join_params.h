// What a launch hands to the kernels that finish a call (join.cuh), beside AttentionParams.
#pragma once

#include "turboquant/cuda/impl/kept_pair.h"

namespace turboquant::cuda {

struct JoinParams {
    KeptPair kept;              // keys, values
    int n;                      // rows of each
    int rows_of_block;          // query rows of a block that left a part
    const std::uint16_t* mask;  // [seq][token][n]
};

}  // namespace turboquant::cuda
