#include "turboquant/kernels/impl/simd_avx2.h"
//
#include "turboquant/kernels/impl/kernels.inc"

namespace turboquant {

const Kernels kKernelsAvx2 = kTable;

}  // namespace turboquant
