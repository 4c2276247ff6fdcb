// Context shift: decoded, turned, encoded again, by calls of the others.
#include "turboquant/cuda/rows.h"

namespace turboquant::cuda {

Status rotate_rows(const EncodePlan& plan, const std::int64_t* cells, int n, const float* shift_turns, const RopeLayout& rope,
                   float* workspace, std::uint32_t* not_finite, Stream stream) {
    if (!shift_turns || !workspace) return bad_argument("rotate_rows: shift_turns or workspace is not given");
    DecodeArgs decoded;
    decoded.cells = cells, decoded.n = n, decoded.out = workspace, decoded.out_is_half = false;
    decoded.token_stride = static_cast<std::size_t>(plan.n_head) * plan.head_dim, decoded.head_stride = plan.head_dim;
    decoded.shift_turns = shift_turns, decoded.rope = rope;
    if (Status s = decode_rows(plan, decoded, stream); !s.ok()) return s;
    EncodeArgs args;
    args.x = workspace, args.token_stride = decoded.token_stride, args.head_stride = decoded.head_stride;
    args.cells = cells, args.n = n, args.not_finite = not_finite;
    return encode(plan, args, stream);
}

}  // namespace turboquant::cuda
