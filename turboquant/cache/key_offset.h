// Key offset removal: what is stored is k - R(p) mu, with mu the mean of a layer's keys per KV head before RoPE and R(p) the model's own
// RoPE at the key's position p. It costs no bits, and attention adds q . R(p) mu back to each score exactly (attention/attention.h,
// ScoreTerm). Source: our measurement, docs/quality.md; subtracting one fixed vector from all keys leaves softmax unchanged, and keys have
// a constant part before RoPE.
//
// Every sequence has its own mu (ids: positions.h), measured on its first tokens: the mean of the first 1, 2, 4, ... kMeasureRows of them,
// the largest such number that was seen. So mu depends on the sequence alone, not on how it was cut into batches. Until it is frozen the
// rows are kept in fp16 beside the cache, and when mu has changed they are encoded again: every cell is always encoded against the mu in
// force.
#pragma once

#include <bit>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "turboquant/cache/kept_row.h"
#include "turboquant/cache/key_transform.h"
#include "turboquant/cache/positions.h"
#include "turboquant/cache/rope.h"

namespace turboquant {

class KeyOffset {
  public:
    /// 64 rows leave the key error 9 % above that of 256, but sequences that share their first 64 tokens then share mu, so that a prefix
    /// reused from another sequence's cache is encoded as the sequence's own.
    static constexpr std::size_t kMeasureRows = 64;

    KeyOffset(int n_head, int head_dim);

    /// RoPE of this layer; freq_factors are copied. Without it the offset is the plain mean (models without RoPE).
    void set_rope(const RopeParams& rope);
    bool has_rope() const { return has_rope_; }

    /// Channel scales (spec/channel_scales.h): what is encoded is s * (k - R(p) mu), channel by channel. Before anything is encoded.
    /// Throws std::invalid_argument if there are not n_head*head_dim of them; check_scales() if a pair that RoPE rotates has two.
    void set_scales(std::string_view letters);
    void check_scales() const;
    bool scaled() const { return !scales_.empty(); }
    std::span<const float> scales(int head) const {
        return std::span(scales_).subspan(static_cast<std::size_t>(head) * head_dim_, head_dim_);
    }
    std::uint32_t scale_hash() const { return scale_hash_; }  ///< 0: keys are not scaled
    std::string_view scale_letters() const { return letters_; }
    const RopeParams& rope() const { return rope_; }

    /// Must precede any use of an id: forgets what an earlier generation of it had.
    void begin(int id, std::uint32_t generation);
    bool frozen(int id) const { return at(id).state != State::measuring; }
    std::span<const float> mu(int id) const { return here(id).mu; }  ///< [n_head][head_dim], fp16 values
    std::uint32_t mu_hash(int id) const { return here(id).hash; }    ///< of a frozen mu (saved_row.h), else 0
    std::vector<std::uint16_t> mu_halves(int id) const;
    void freeze(int id, std::span<const std::uint16_t> mu);
    /// Freezes an offset of which only the hash is known yet: rows of a saved state come in runs, each with a piece of it. freeze()
    /// follows.
    void expect(int id, std::uint32_t hash);
    bool expected(int id) const { return at(id).state == State::expected; }
    /// A frozen offset by its hash, fp16 values, also of an id that has been used for another sequence since (the last kRemembered are
    /// kept): a state that went out of this cache comes back to it even if its rows are too few to tell their offset. Null: not known.
    const std::vector<std::uint16_t>* recall(std::uint32_t hash) const;
    static constexpr std::size_t kRemembered = 64;
    /// What was measured so far stays for all ids (kept rows are about to become wrong).
    void freeze_all();
    /// Forgets everything (the cache was emptied).
    void reset() { entries_.clear(), version_++; }

    /// Takes in a batch of rows of one id (keys[i*stride..]; positions >= 0): note() and remeasure(). A row at position p ends what was kept
    /// from p on: the sequence was cut back; `beside`, if not empty, marks rows that stand beside others (CellPositions) and end only what
    /// was kept behind p. Returns true if mu changed: then kept(id) must be encoded again, and release_kept(id) called. Nothing to do once
    /// frozen.
    bool observe(int id, const float* keys, std::size_t stride, std::span<const std::int64_t> rows, std::span<const std::int32_t> pos,
                 std::span<const std::uint8_t> beside = {});
    /// The same where values are not known yet: places[i] is where the store is to set row i aside (-1: not kept), before remeasure(), which
    /// fetches rows when mu changes. `fetch`: TileStore::fetch.
    using Fetch = std::function<void(std::span<const std::int32_t> places, std::uint16_t* rows)>;
    void set_fetch(Fetch fetch) { fetch_ = std::move(fetch); }
    void note(int id, std::span<const std::int64_t> rows, std::span<const std::int32_t> pos, std::span<const std::uint8_t> beside,
              std::vector<std::int32_t>& places);
    bool remeasure(int id);
    /// Whether that would change mu.
    bool due(int id) const;
    /// The same where the store measures, too, and tells mu when it is asked for. True: the store is to measure mu on the first n of
    /// kept_aside(id); false: nothing is to be measured, or not all rows are aside any more.
    bool remeasure_aside(int id, std::size_t& n);
    using FetchMu = std::function<void(int id, std::uint16_t* mu)>;
    void set_fetch_mu(FetchMu fetch) { fetch_mu_ = std::move(fetch); }
    /// What is kept, if all of it is aside (KeptRow::place), else nothing.
    std::span<const KeptRow> kept_aside(int id) const;
    bool keeps_any(int id) const { return !at(id).kept.empty(); }
    /// Kept while measuring, without what a tag would change (saved_row.h); they are encoded from these values.
    std::span<const KeptRow> kept(int id) const { return complete(id); }
    const KeptRow* find_kept(int id, std::int64_t row, std::int32_t pos) const;
    /// What was kept of an id is not needed any more, if its offset is frozen.
    void release_kept(int id);

    /// Frequencies of the score term q . R(p) mu = sum_i a_i cos(p w_i) + b_i sin(p w_i): RoPE's, and one of zero for the dims that RoPE
    /// leaves alone.
    int n_freq() const { return (has_rope_ ? rope_.n_dims / 2 : 0) + (!has_rope_ || rope_.n_dims < head_dim_); }
    /// Table of these frequencies' rotations (attention/turns.h), shared by all layers that have the same.
    const float* turns() const { return turns_->table.data(); }

    /// What is done to keys of these cells. Valid until the next call that is not const.
    KeyTransform transform(const CellPositions& cells) const;

    /// The key of a row as it was encoded, all heads, becomes the key in the model's space: R(pos) mu added, unless pos < 0, scales undone.
    void add_offset(int id, std::span<float> x, std::int32_t pos) const;

  private:
    enum class State { measuring, expected, frozen };
    struct Entry {
        std::uint32_t generation = 0;
        State state = State::measuring;
        bool away = false;           ///< mu is the store's, and not known here
        std::uint32_t hash = 0;      ///< of mu, unless it is measured
        std::size_t measured = 0;    ///< rows in mu
        std::size_t summed = 0;      ///< the first of `kept`
        std::vector<double> sum;     ///< of these, before RoPE
        std::vector<float> mu;       ///< [n_head][head_dim]
        std::vector<float> mu_perp;  ///< KeyTransform::mu
        std::vector<KeptRow> kept;   ///< by ascending position
    };
    const Entry& at(int id) const { return entries_[id]; }
    /// Rows whose mean mu is to be.
    static std::size_t measurable(const Entry& e) { return std::bit_floor(e.kept.size()); }
    const Entry& here(int id) const;
    RopeTable rope_table() const;
    void measure(Entry& e);
    template <class Values>
    void take_in(Entry& e, std::span<const std::int64_t> rows, std::span<const std::int32_t> pos, std::span<const std::uint8_t> beside,
                 Values&& values);
    const std::vector<KeptRow>& complete(int id) const;
    void set_mu_perp(Entry& e) const;
    void set_frozen(Entry& e, std::vector<std::uint16_t> mu) const;
    const std::vector<std::uint16_t>* known(std::uint32_t hash) const;

    struct Turns {
        std::vector<double> frequencies;
        std::vector<float> table;
    };
    static std::shared_ptr<const Turns> shared_turns(const std::vector<double>& frequencies);

    int n_head_, head_dim_;
    std::string letters_;
    std::vector<float> scales_;  ///< [n_head][head_dim], or empty
    std::uint32_t scale_hash_ = 0;
    bool has_rope_ = false;
    RopeParams rope_;
    std::vector<float> freq_factors_;
    std::shared_ptr<const Turns> turns_;
    mutable std::vector<Entry> entries_;  ///< mutable: what the store has set aside is fetched when it is looked at
    Fetch fetch_;
    FetchMu fetch_mu_;
    std::uint64_t version_ = 1;  ///< changes with anything that transform() tells
    mutable std::deque<std::pair<std::uint32_t, std::vector<std::uint16_t>>> remembered_;
};

}  // namespace turboquant
