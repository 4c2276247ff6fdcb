#include "turboquant/kernels/impl/simd_neon.h"
//
#include "turboquant/kernels/impl/kernels.inc"

namespace turboquant {

const Kernels kKernelsNeon = kTable;

}  // namespace turboquant
