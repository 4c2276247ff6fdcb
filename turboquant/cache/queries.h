// What becomes of queries on the host, for the stores whose memory is the host's (QueryTransform, tile_store.h).
#pragma once

#include "turboquant/cache/tile_store.h"

namespace turboquant {

/// Queries divided by the channels' scales, and the terms of the offsets, in ctx's memory; `a` points there afterwards. On ctx's threads.
void transform_queries(StoreContext& ctx, int head_dim, const QueryTransform& queries, AttentionArgs& a);

}  // namespace turboquant
