#include "turboquant/cuda/encode.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "turboquant/cuda/encode_launch.h"
#include "turboquant/cuda/format_tables.h"

namespace turboquant::cuda {
namespace {

constexpr int kMaxTrellisWarps = 4;
static_assert(std::size(EncodeCalls{}.of) == kMostEncodeJobs);

CodecId codec_of(const TileView& view, int head) { return view.heads ? view.heads[head].codec : view.shape.codec; }

/// The formats of a view, each once.
std::vector<CodecId> formats_of(const TileView& view, int n_head) {
    std::vector<CodecId> formats;
    for (int h = 0; h < n_head; ++h)
        if (std::ranges::find(formats, codec_of(view, h)) == formats.end()) formats.push_back(codec_of(view, h));
    return formats;
}

std::size_t tables_at(int n_head) { return (n_head * sizeof(HeadFormat) + 15) / 16 * 16; }

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

const char* check(const TileView& view, int n_head, const void* memory) {
    if (!head_dim_supported(view.shape.head_dim)) {
        static const std::string text = "encode: head size is not supported; supported: " + supported_head_dims();
        return text.c_str();
    }
    if (n_head < 1) return "encode: n_head must be at least 1";
    for (int h = 0; h < n_head; ++h)
        if (!has_fragment_order(codec_of(view, h)))
            return "encode: composite formats (outlier, split, prod, uniform) are not encoded on a GPU; use a turbo or tcq format, or raw";
    bool good = view.tiles && memory && aligned(view.tiles) && aligned(memory) && view.tile_stride % 16 == 0;
    for (int h = 0; h < n_head; ++h) good = good && (view.heads ? view.heads[h].at : view.head_stride) % 16 == 0;
    return good ? nullptr : "encode: tiles, their strides and the plan's memory must be 16-byte aligned device memory";
}

}  // namespace

std::size_t encode_plan_bytes(const TileView& view, int n_head) {
    return tables_at(n_head) + formats_of(view, n_head).size() * sizeof(FormatTables);
}

Status plan_encode(const TileView& view, int n_head, NormMode norm_mode, const Device& device, void* memory, Stream stream,
                   EncodePlan& plan) {
    if (const char* what = check(view, n_head, memory)) return bad_argument(what);
    const int d = view.shape.head_dim;
    plan = {};
    plan.side = view.shape.side, plan.head_dim = d, plan.n_head = n_head, plan.norm_mode = norm_mode, plan.n_sm = device.n_sm;
    plan.tiles = const_cast<std::uint8_t*>(view.tiles), plan.tile_stride = view.tile_stride;
    plan.heads = static_cast<const HeadFormat*>(memory);

    const std::vector<CodecId> formats = formats_of(view, n_head);
    std::vector<std::uint8_t> image(encode_plan_bytes(view, n_head));
    const auto tables_of = [&](std::size_t i) { return tables_at(n_head) + i * sizeof(FormatTables); };
    for (std::size_t i = 0; i < formats.size(); ++i) {
        const FormatTables f = make_format_tables(formats[i], d);
        std::memcpy(image.data() + tables_of(i), &f, sizeof f);
        if (f.family == Family::scalar) plan.any_scalar = true, plan.scalar_shared = std::max(plan.scalar_shared, scalar_shared(f));
        plan.any_trellis |= f.family == Family::trellis;
        plan.any_raw |= f.family == Family::raw;
    }
    for (int h = 0; h < n_head; ++h) {
        const std::size_t i = std::ranges::find(formats, codec_of(view, h)) - formats.begin();
        const HeadFormat head{reinterpret_cast<const FormatTables*>(static_cast<const std::uint8_t*>(memory) + tables_of(i)),
                              view.heads ? view.heads[h].at : h * view.head_stride, plan.row_bytes};
        plan.row_bytes += row_bytes(formats[i], d);
        std::memcpy(image.data() + h * sizeof head, &head, sizeof head);
    }
    if (plan.any_scalar) {
        if (plan.scalar_shared > device.shared_per_block)
            return bad_argument("encode: this head size in this format needs more shared memory than the card has");
        if (const Status status = allow_scalar_shared(d, plan.scalar_shared); !status.ok()) return status;
    }
    if (plan.any_trellis) {
        for (plan.trellis_warps = kMaxTrellisWarps; plan.trellis_warps > 0; plan.trellis_warps /= 2)
            if (trellis_shared(d, plan.trellis_warps) <= device.shared_per_block) break;
        if (plan.trellis_warps == 0)
            return bad_argument(
                "encode: a trellis format of this head size needs more shared memory than the card has; use a turbo format");
        if (const Status status = allow_trellis_shared(d, trellis_shared(d, plan.trellis_warps)); !status.ok()) return status;
    }
    const auto s = static_cast<cudaStream_t>(stream);
    if (const int error = cudaMemcpyAsync(memory, image.data(), image.size(), cudaMemcpyHostToDevice, s))
        return status_of(error, "cudaMemcpyAsync");
    return status_of(cudaStreamSynchronize(s), "cudaStreamSynchronize");
}

namespace {

const char* problem_of(const EncodeArgs& args) {
    if (args.n < 0 || !args.x || !args.cells || !args.not_finite) return "encode: n, x, cells or not_finite is not given";
    if (args.turns && (!args.offsets || !args.offset_ids)) return "encode: turns without offsets";
    if (reinterpret_cast<std::uintptr_t>(args.x) % (args.x_is_half ? 8 : 16) || args.token_stride % 4 || args.head_stride % 4)
        return "encode: x must be aligned to 4 values, and its strides multiples of 4";
    return nullptr;
}

EncodeCall call_of(const EncodePlan& plan, const EncodeArgs& args) {
    EncodeCall call{};
    call.heads = plan.heads, call.side = plan.side, call.norm_mode = plan.norm_mode;
    call.tiles = plan.tiles, call.tile_stride = plan.tile_stride;
    call.x = args.x, call.half_input = args.x_is_half, call.token_stride = args.token_stride, call.head_stride = args.head_stride;
    call.cells = args.cells, call.n = args.n;
    call.scales = args.scales, call.turns = args.turns, call.offsets = args.offsets, call.offset_ids = args.offset_ids;
    call.offset_stride = args.offset_stride, call.not_finite = args.not_finite;
    return call;
}

/// How `n` tokens of a plan are cut, of `jobs` plans alike.
struct Cut {
    int tokens, blocks, warps;
};
Cut cut_scalar(const EncodePlan& plan, int n, int jobs) {
    int tokens = kTileKeys;
    const auto blocks = [&] { return (n + tokens - 1) / tokens; };
    while (tokens > 1 && static_cast<std::int64_t>(blocks()) * plan.n_head * jobs < 2 * plan.n_sm) tokens /= 4;
    // Blocks of 64 tokens begin at whole tiles: one more, where the first cell is not the first of its tile.
    return {tokens, blocks() + (tokens == kTileKeys), 0};
}
Cut cut_trellis(const EncodePlan& plan, int n, int jobs) {
    const auto blocks = [&](int tokens) { return (n + tokens - 1) / tokens; };
    const auto fills = [&](int tokens) { return static_cast<std::int64_t>(blocks(tokens)) * plan.n_head * jobs >= 2 * plan.n_sm; };
    int warps = plan.trellis_warps;
    while (warps > 1 && !fills(warps * trellis_vectors())) warps /= 2;
    int tokens = warps * trellis_vectors();
    while (tokens > 1 && !fills(tokens)) tokens /= 2;
    return {tokens, blocks(tokens), warps};
}

}  // namespace

Status encode(const EncodePlan& plan, const EncodeArgs& args, Stream stream) {
    if (args.n == 0) return {};
    if (const char* problem = problem_of(args)) return bad_argument(problem);
    EncodeCall call = call_of(plan, args);
    if (plan.any_scalar) {
        const Cut cut = cut_scalar(plan, args.n, 1);
        call.tokens_per_block = cut.tokens;
        if (const int error = launch_scalar(call, plan.head_dim, plan.n_head, cut.blocks, plan.scalar_shared, stream))
            return status_of(error, "encode (scalar formats)");
    }
    if (plan.any_trellis) {
        const Cut cut = cut_trellis(plan, args.n, 1);
        call.tokens_per_block = cut.tokens;
        if (const int error = launch_trellis(call, plan.head_dim, plan.n_head, cut.blocks, cut.warps, stream))
            return status_of(error, "encode (trellis formats)");
    }
    if (plan.any_raw)
        if (const int error = launch_raw(call, plan.n_head, stream)) return status_of(error, "encode (raw)");
    return {};
}

Status encode_together(std::span<const EncodeJob> jobs, Stream stream) {
    if (jobs.empty()) return {};
    const EncodePlan& plan = jobs[0].plan;
    const int n = jobs[0].args.n;
    const bool alike = jobs.size() <= kMostEncodeJobs && n > 0 && std::ranges::all_of(jobs, [&](const EncodeJob& j) {
                           return j.args.n == n && j.plan.head_dim == plan.head_dim && j.plan.n_head == plan.n_head && !j.plan.any_raw;
                       });
    if (!alike || jobs.size() == 1) {
        for (const EncodeJob& j : jobs)
            if (const Status status = encode(j.plan, j.args, stream); !status.ok()) return status;
        return {};
    }
    EncodeCalls scalar{}, trellis{};
    int n_scalar = 0, n_trellis = 0;
    std::size_t shared = 0;
    for (const EncodeJob& j : jobs) {
        if (const char* problem = problem_of(j.args)) return bad_argument(problem);
        if (j.plan.any_scalar) scalar.of[n_scalar++] = call_of(j.plan, j.args), shared = std::max(shared, j.plan.scalar_shared);
        if (j.plan.any_trellis) trellis.of[n_trellis++] = call_of(j.plan, j.args);
    }
    if (n_scalar) {
        const Cut cut = cut_scalar(plan, n, n_scalar);
        for (EncodeCall& call : scalar.of) call.tokens_per_block = cut.tokens;
        if (const int error = launch_scalar(scalar, n_scalar, plan.head_dim, plan.n_head, cut.blocks, shared, stream))
            return status_of(error, "encode (scalar formats)");
    }
    if (n_trellis) {
        EncodePlan of_trellis = plan;
        for (const EncodeJob& j : jobs)
            if (j.plan.any_trellis) of_trellis.trellis_warps = j.plan.trellis_warps;
        const Cut cut = cut_trellis(of_trellis, n, n_trellis);
        for (EncodeCall& call : trellis.of) call.tokens_per_block = cut.tokens;
        if (const int error = launch_trellis(trellis, n_trellis, plan.head_dim, plan.n_head, cut.blocks, cut.warps, stream))
            return status_of(error, "encode (trellis formats)");
    }
    return {};
}

}  // namespace turboquant::cuda
