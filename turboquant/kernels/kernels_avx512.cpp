#include "turboquant/kernels/impl/simd_avx512.h"
//
#include "turboquant/kernels/impl/kernels.inc"

namespace turboquant {

const Kernels kKernelsAvx512 = kTable;

}  // namespace turboquant
