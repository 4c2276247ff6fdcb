// The tile that attention will read next, on its way from memory while this one is worked on.
//
// Tiles of one head are far apart (the heads lie between them), which a hardware prefetcher does not see. They are fetched a few lines at a time
// between the steps of a tile: the queue of outstanding lines is short, and where it is full, what computes waits, too.
#pragma once

namespace turboquant {
namespace {

class NextTile {
  public:
    NextTile(const AttentionCall& c, const AttentionUnit& u, int tile) {
        if (tile >= u.tile_end) return;
        k_ = {u.k_tiles + static_cast<size_t>(tile) * c.args->k.tile_stride, *c.k};
        if (!c.args->v_is_k) v_ = {u.v_tiles + static_cast<size_t>(tile) * c.args->v.tile_stride, *c.v};
    }
    // A fourth, or all of it where panels are floats: those fill the first-level cache, and bursts in between cost a fifth there.
    void fetch_keys() { k_.fetch(); }
    void fetch_values() { v_.fetch(); }

  private:
    struct Codes {
        const uint8_t *at = nullptr, *end = nullptr;
        size_t step = 0;

        Codes() = default;
        Codes(const uint8_t* tile, const CodecTables& t) : at(tile), end(tile + static_cast<size_t>(kTileKeys / 8) * t.bits * t.head_dim) {
            const auto n = static_cast<size_t>(end - at);
            step = t.i8 ? (n + 255) / 256 * 64 : n;
        }
        void fetch() {
            const uint8_t* stop = static_cast<size_t>(end - at) < step ? end : at + step;
            for (; at < stop; at += 64) __builtin_prefetch(at, 0, 3);
        }
    };

    Codes k_, v_;
};

}  // namespace
}  // namespace turboquant
