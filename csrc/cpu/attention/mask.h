// The lowered mask on one tile of queries: a walk over the blocks of keys that some query of the tile sees.
//
// Where to look comes from the bounds of the forms: the key range, the band, the union of the tile's intervals (read lane by lane: 8 bytes each,
// and tighter than bounds over 64 queries would be for a tile of another size) and the block row. What a block then shows comes from its words.
#pragma once
#include "words.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int kMaxIntervals = 4;
constexpr int64_t kAhead = 4;  // blocks of the next row that a row's last tile fetches: what a level-2 cache holds beside its own

// Keys [begin, begin + count), count <= kKeyBlock; bit r of `seen` says that some query of the tile sees key begin + r. The first and last do.
struct KeyBlock {
    int64_t begin, count;
    uint64_t seen;
    int64_t row;  // of its first key where the tile's blocks are held one after the other
};

class TileMask {
  public:
    TileMask(const fastattn_attention &p, const QueryTile &tile)
        : p_(p), mask_(p.mask), tile_(tile), band_offset_(p.mask.band_offset + (p.cu_seqlens_q ? tile.offset : 0)), words_(tile.lanes()) {
        Span span = {0, tile.len_k};
        if (mask_.key_start) span.begin = larger(span.begin, mask_.key_start[tile.batch]);
        if (mask_.key_end) span.end = smaller(span.end, mask_.key_end[tile.batch]);
        if (mask_.band_has_left) span.begin = larger(span.begin, tile.begin + band_offset_ - mask_.band_left);
        if (mask_.band_has_right) span.end = smaller(span.end, tile.last() + band_offset_ + mask_.band_right + 1);
        if (mask_.n_intervals) read_intervals(span);
        else if (span.begin < span.end) runs_[n_runs_++] = span;
        if (mask_.blocks.row_ptr.data) {
            const fastattn_tensor &t = mask_.blocks.row_ptr;
            const int32_t *entries = (const int32_t *)t.data + tile.batch * t.stride[0] + tile.head * t.stride[1] + tile.begin / kKeyBlock;
            entry_ = entries[0], last_entry_ = entries[1];
            // A thread's next tile lies in front of this one: the last tile of a row of blocks looks ahead to those of the row before.
            if (tile_.begin % kKeyBlock == 0 && tile_.begin > 0) ahead_ = entries[-1], last_ahead_ = smaller(entries[0], entries[-1] + kAhead);
        } else if (n_runs_) {
            position_ = runs_[0].begin;
        }
    }

    // Moves to the next block; false past the last.
    bool next() {
        while (advance())
            if (look()) return true;
        return false;
    }

    const KeyBlock &block() const { return block_; }

    // Keys to fetch beside the block, which no tile of its row of blocks has read: those that the walk looks at next, where they do not follow at
    // once; of a row's last tile, which finds all its own read, those of the next row, one block with each of its own; else none.
    Span jump() {
        int64_t begin = 0;
        if (mask_.blocks.row_ptr.data) {
            const int64_t past = tile_.last() + 1;
            const bool first = past % kKeyBlock == 0 || past == tile_.len_q;  // a row's tiles are taken from its last
            if (first && entry_ < last_entry_) {
                begin = mask_.blocks.col[entry_] * kKeyBlock;
            } else if (ahead_ < last_ahead_) {
                begin = mask_.blocks.col[ahead_++] * kKeyBlock;
                return {begin, smaller(begin + kKeyBlock, tile_.len_k)};
            }
        } else if (run_ + 1 < n_runs_ && position_ == runs_[run_].end) {
            begin = runs_[run_ + 1].begin;
        }
        if (begin <= block_.begin + block_.count) return {0, 0};
        return {begin, smaller(begin + kKeyBlock, tile_.len_k)};
    }

    // scores(key, lane) = -inf where hidden.
    void apply(float *scores) const {
        if (partial_) words_.hide(scores, block_.count);
    }

    // No more keys than these are visited.
    int64_t most_keys() const {
        int64_t total = 0;
        if (mask_.blocks.row_ptr.data) return smaller(tile_.len_k, (last_entry_ - entry_) * kKeyBlock);
        for (int r = 0; r < n_runs_; r++) total += runs_[r].end - runs_[r].begin;
        return total;
    }

  private:
    // The tile's intervals by lanes, what every lane of interval r sees, and their union as disjoint ascending runs.
    void read_intervals(Span span) {
        const fastattn_tensor &t = mask_.intervals;
        for (int64_t r = 0; r < mask_.n_intervals; r++) {
            const int32_t *bounds = (const int32_t *)t.data + r * t.stride[0] + tile_.batch * t.stride[1] + tile_.head * t.stride[2];
            Span inner = {INT32_MIN, INT32_MAX}, outer = {INT32_MAX, INT32_MIN};
            for (int64_t lane = 0; lane < tile_.lanes(); lane++) {
                const int32_t *bound = bounds + tile_.query(lane) * t.stride[3];
                const int64_t start = bound[0], end = bound[1];
                starts_[r][lane] = bound[0], ends_[r][lane] = bound[1];
                inner = {larger(inner.begin, start), smaller(inner.end, end)};
                const bool empty = start >= end;  // says nothing about the union
                outer = {smaller(outer.begin, empty ? INT32_MAX : start), larger(outer.end, empty ? INT32_MIN : end)};
            }
            inner_[r] = inner;
            add_run({larger(span.begin, outer.begin), smaller(span.end, outer.end)});
        }
    }

    // Keeps the runs disjoint and ascending.
    void add_run(Span run) {
        if (run.begin >= run.end) return;
        int kept = 0;
        Span others[kMaxIntervals];
        for (int r = 0; r < n_runs_; r++) {
            if (runs_[r].end < run.begin || run.end < runs_[r].begin) others[kept++] = runs_[r];
            else run = {smaller(run.begin, runs_[r].begin), larger(run.end, runs_[r].end)};
        }
        n_runs_ = 0;
        int from = 0;
        while (from < kept && others[from].begin < run.begin) runs_[n_runs_++] = others[from++];
        runs_[n_runs_++] = run;
        while (from < kept) runs_[n_runs_++] = others[from++];
    }

    // The next keys to look at, as a whole block.
    bool advance() {
        bitmap_ = nullptr;
        if (mask_.blocks.row_ptr.data) return advance_entry();
        if (run_ < n_runs_ && position_ == runs_[run_].end && ++run_ < n_runs_) position_ = runs_[run_].begin;
        if (run_ >= n_runs_) return false;
        block_.begin = position_;
        // Tiles that keep blocks (pair_tile.h) meet the same ones.
        const int64_t most = kWordBlocks && multiplies_pairs(p_) ? kKeyBlock - position_ % kKeyBlock : kKeyBlock;
        block_.count = smaller(most, runs_[run_].end - position_);
        position_ += block_.count;
        return true;
    }

    bool advance_entry() {
        if (n_runs_ == 0) return false;
        const Span span = {runs_[0].begin, runs_[n_runs_ - 1].end};
        for (; entry_ < last_entry_; entry_++) {
            const int64_t column = mask_.blocks.col[entry_] * kKeyBlock, id = mask_.blocks.id[entry_];
            const int64_t begin = larger(span.begin, column), end = smaller(span.end, column + kKeyBlock);
            if (begin >= end) continue;
            block_.begin = begin, block_.count = end - begin;
            if (id) bitmap_ = (const uint64_t *)mask_.blocks.bitmaps + id * kKeyBlock;
            entry_++;
            return true;
        }
        return false;
    }

    // Forms the words of the block, cuts it to the keys that some query sees; false where there are none.
    bool look() {
        const int64_t begin = block_.begin, count = block_.count;
        const uint64_t common = bits_below(count) & key_word(begin, count);
        if (!common) return false;
        words_.set(common);
        if (bitmap_)
            words_.keep([&](int64_t lane) { return bitmap_[tile_.query(lane) % kKeyBlock] >> (begin % kKeyBlock); });
        if (!band_covers(begin, count))
            words_.keep([&](int64_t lane) {
                const int64_t position = tile_.query(lane) + band_offset_ - begin;
                const int64_t end = mask_.band_has_right ? position + mask_.band_right + 1 : count;
                return bits_between(mask_.band_has_left ? position - mask_.band_left : 0, end);
            });
        if (!intervals_cover(begin, count))
            words_.keep([&](int64_t lane) {
                uint64_t inside = 0;
                for (int64_t r = 0; r < mask_.n_intervals; r++) inside |= bits_between(starts_[r][lane] - begin, ends_[r][lane] - begin);
                return inside;
            });
        if (mask_.dense.data && !is_key_mask(mask_.dense))
            words_.keep([&](int64_t lane) { return word_of_bools(dense_at(tile_.query(lane), begin), mask_.dense.stride[3], count); });
        uint64_t some, every;
        words_.reduce(some, every);
        some &= word_of_bias(begin, count, some);
        if (!some) return false;
        const int64_t first = __builtin_ctzll(some), last = 63 - __builtin_clzll(some);
        if (first) words_.skip(first);
        block_ = {begin + first, last - first + 1, some >> first, 0};
        partial_ = (every >> first & bits_below(block_.count)) != bits_below(block_.count);
        return true;
    }

    static bool is_key_mask(const fastattn_tensor &t) { return t.stride[2] == 0; }

    const uint8_t *dense_at(int64_t i, int64_t j) const {
        const fastattn_tensor &t = mask_.dense;
        return (const uint8_t *)t.data + tile_.batch * t.stride[0] + tile_.head * t.stride[1] + i * t.stride[2] + j * t.stride[3];
    }

    const void *bias_at(int64_t i, int64_t j) const {
        const fastattn_tensor &t = p_.bias;
        return offset((const void *)t.data, p_.bias_dtype, tile_.batch * t.stride[0] + tile_.head * t.stride[1] + i * t.stride[2] + j * t.stride[3]);
    }

    // What all queries see alike: key_bits, and bool or float masks that have no query dimension.
    uint64_t key_word(int64_t begin, int64_t count) const {
        uint64_t word = ~(uint64_t)0;
        if (mask_.key_bits) {
            const int64_t words = (p_.len_k + 63) / 64, at = begin / 64, shift = begin % 64;
            const uint64_t *bits = (const uint64_t *)mask_.key_bits + tile_.batch * words;
            word = bits[at] >> shift;
            if (shift && at + 1 < words) word |= bits[at + 1] << (64 - shift);
        }
        if (mask_.dense.data && is_key_mask(mask_.dense)) word &= word_of_bools(dense_at(0, begin), mask_.dense.stride[3], count);
        if (p_.bias.data && is_key_mask(p_.bias)) word &= word_of_finite(bias_at(0, begin), p_.bias_dtype, p_.bias.stride[3], count);
        return word;
    }

    bool band_covers(int64_t begin, int64_t count) const {
        if (mask_.band_has_left && begin < tile_.last() + band_offset_ - mask_.band_left) return false;
        return !mask_.band_has_right || begin + count - 1 <= tile_.begin + band_offset_ + mask_.band_right;
    }

    bool intervals_cover(int64_t begin, int64_t count) const {
        for (int64_t r = 0; r < mask_.n_intervals; r++)
            if (inner_[r].begin <= begin && begin + count <= inner_[r].end) return true;
        return mask_.n_intervals == 0;
    }

    // Keys for which the bias is not -inf for every query: mostly decided, for those of `asked`, by its first row.
    uint64_t word_of_bias(int64_t begin, int64_t count, uint64_t asked) const {
        if (!p_.bias.data || is_key_mask(p_.bias)) return ~(uint64_t)0;
        uint64_t word = 0;
        for (int64_t i = tile_.begin; i <= tile_.last() && (word & asked) != asked; i++)
            word |= word_of_finite(bias_at(i, begin), p_.bias_dtype, p_.bias.stride[3], count);
        return word;
    }

    const fastattn_attention &p_;
    const fastattn_mask &mask_;
    QueryTile tile_;
    int64_t band_offset_;
    Span runs_[kMaxIntervals] = {};
    int n_runs_ = 0, run_ = 0;
    int64_t position_ = 0;                 // in the runs
    int64_t entry_ = 0, last_entry_ = 0;   // in the block row
    int64_t ahead_ = 0, last_ahead_ = 0;   // in the one that is walked next
    const uint64_t *bitmap_ = nullptr;     // of the block, null: all visible
    Span inner_[kMaxIntervals];
    int32_t starts_[kMaxIntervals][kMaxLanes], ends_[kMaxIntervals][kMaxLanes];
    KeyBlock block_ = {};
    bool partial_ = false;
    LaneWords words_;
};

FASTATTN_NAMESPACE_END
