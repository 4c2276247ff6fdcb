// What keep_rows takes of a rotation, as a cache makes it.
#pragma once

#include <vector>

#include "turboquant/codec/rotation.h"

namespace turboquant::cuda::test {

/// KeepRows::signs of a head size: the first column of the rotation's matrix, then its first row relative to that row's first value.
inline std::vector<float> rotation_signs(int d) {
    std::vector<float> signs(2 * d), row(d);
    for (int k = 0; k < d; ++k) {
        std::vector<float> unit(d);
        unit[k] = 1;
        rotation_for(d).forward(unit);
        signs[k] = unit[0];
        if (k == 0) row = unit;
    }
    for (int j = 0; j < d; ++j) signs[d + j] = row[j] / row[0];
    return signs;
}

}  // namespace turboquant::cuda::test
