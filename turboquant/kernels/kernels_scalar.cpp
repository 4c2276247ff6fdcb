#include "turboquant/kernels/impl/simd_scalar.h"
//
#include "turboquant/kernels/impl/kernels.inc"

namespace turboquant {

const Kernels kKernelsScalar = kTable;

}  // namespace turboquant
