// Constants of the formats in the form that the kernels of this layer read (impl/encode_call.h), made on the host.
#pragma once

#include "turboquant/cuda/impl/encode_call.h"

namespace turboquant::cuda {

/// Throws std::invalid_argument for composites and head sizes that are not supported.
FormatTables make_format_tables(CodecId codec, int head_dim);

}  // namespace turboquant::cuda
