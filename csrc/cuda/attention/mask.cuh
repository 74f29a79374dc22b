// The lowered mask seen from a tile of queries: which tiles of 64 keys it has to visit, which of them are full, and who sees what in the rest.
//
// All threads of a block walk alike, or those of a part of it. What one query sees of a tile of 64 keys is a word of 64 bits, whatever the form of
// the mask: keys, band, intervals and blocks each give such a word and they are combined by and. A dense mask is read element by element on top.
#pragma once
#include <climits>

#include <primitives/threads.cuh>

#include "params.cuh"

constexpr int KEYS = MASK_BLOCK;  // of a tile

// Threads that walk together: a block, or its first THREADS threads, which meet at a barrier of their own.
struct WholeBlock {
    static __device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
    static __device__ __forceinline__ void sync() { sync_block(); }
    static __device__ __forceinline__ bool any(bool value) { return sync_block_or(value); }
};
template <int THREADS, int BARRIER>
struct FirstThreads {
    static __device__ __forceinline__ int threads() { return THREADS; }
    static __device__ __forceinline__ void sync() { sync_named(BARRIER, THREADS); }
    static __device__ __forceinline__ bool any(bool value) { return sync_named_or(BARRIER, THREADS, value); }
};

// Bits [low, high) of a word; the bounds may lie outside of it.
__device__ __forceinline__ uint64_t bit_range(int low, int high) {
    low = larger(low, 0);
    high = smaller(high, KEYS);
    return high > low ? ~uint64_t(0) >> (KEYS - (high - low)) << low : 0;
}

struct Span {
    int low, high;

    __device__ __forceinline__ bool covers(int begin, int end) const { return low <= begin && end <= high; }
    __device__ __forceinline__ bool meets(int begin, int end) const { return low < end && begin < high; }
};

// A tile of keys to visit. Block rows other than the first matter only to tiles of more than 64 queries.
struct KeyTile {
    int begin;          // its first key; negative: there is no further tile
    bool full;          // every query sees every key
    uint64_t keys;      // those that some query of the batch entry may see; the others count as zeros
    int block[2];       // form D: -1 not there, 0 full, else the bitmap, per block row of the queries
};

// What the rows of a mask hold, for those who walk over its tiles. Where a query's row lies, h and row say; the batch entry is the same for all.
class MaskRows {
protected:
    __device__ __forceinline__ MaskRows(const MaskParams &mask, const Sequence &sequence)
        : mask_(mask), len_q_(sequence.len_q), len_k_(sequence.len_k) {}

    struct Bounds {
        Span band;  // about a query's number
        Span keys;  // of the batch entry
    };
    __device__ __forceinline__ Bounds bounds_of(int b, const Sequence &sequence) const {
        const int64_t at = mask_.band_offset + sequence.band_shift;
        return {{clamp(at - mask_.band_left, -FAR, FAR), clamp(at + mask_.band_right + 1, -FAR, FAR)},
                {mask_.key_start ? clamp(mask_.key_start.get(b), 0, len_k_) : 0, mask_.key_end ? clamp(mask_.key_end.get(b), 0, len_k_) : len_k_}};
    }

    // Keys [band_low, band_high) of a query.
    __device__ __forceinline__ int band_low(const Bounds &bounds, int row) const {
        return mask_.has_left ? smaller(larger(row + bounds.band.low, 0), len_k_) : 0;
    }
    __device__ __forceinline__ int band_high(const Bounds &bounds, int row) const {
        return mask_.has_right ? smaller(larger(row + bounds.band.high, 0), len_k_) : len_k_;
    }

    __device__ __forceinline__ Span interval_of(int r, int b, int h, int row) const {
        const int64_t pair = mask_.intervals.at(b, h, row) + r * mask_.interval_stride;
        return {clamp(mask_.intervals.data.get(pair), 0, len_k_), clamp(mask_.intervals.data.get(pair + 1), 0, len_k_)};
    }

    // The keys of a tile that some query of batch entry b may see. All lanes of a warp ask together. DENSE: there may be a dense mask.
    template <bool DENSE>
    __device__ __forceinline__ uint64_t keys_of(const Bounds &bounds, int b, int begin) const {
        uint64_t keys = bit_range(bounds.keys.low - begin, bounds.keys.high - begin);
        if (mask_.key_bits) keys &= static_cast<uint64_t>(mask_.key_bits.get(static_cast<int64_t>(b) * mask_.key_words + begin / KEYS));
        if (DENSE && mask_.dense.data && is_key_mask()) keys &= dense_word(b, 0, 0, begin);
        return keys;
    }
    // What query `row` sees of them, dense mask apart; block: form D's, as KeyTile has it. 0 behind the last query.
    __device__ __forceinline__ uint64_t word_of(uint64_t keys, const Bounds &bounds, int block, int b, int h, int row, int begin) const {
        if (row >= len_q_) return 0;
        uint64_t word = keys;
        if (mask_.has_left || mask_.has_right) word &= bit_range(band_low(bounds, row) - begin, band_high(bounds, row) - begin);
        if (mask_.n_intervals > 0) {
            uint64_t either = 0;
            for (int r = 0; r < mask_.n_intervals; r++) {
                const Span interval = interval_of(r, b, h, row);
                either |= bit_range(interval.low - begin, interval.high - begin);
            }
            word &= either;
        }
        if (mask_.row_ptr.data) {
            if (block < 0) return 0;
            if (block > 0) word &= static_cast<uint64_t>(mask_.bitmaps.get(static_cast<int64_t>(block) * MASK_BLOCK + row % MASK_BLOCK));
        }
        return word;
    }

    // A mask that no head and no query distinguishes hides keys from everybody: they then count as zeros.
    __device__ __forceinline__ bool is_key_mask() const { return mask_.dense.head == 0 && mask_.dense.row == 0; }
    __device__ __forceinline__ bool has_dense_rows() const { return mask_.dense.data && !is_key_mask(); }
    // Whether the dense mask lets a query see `key`; both exist.
    __device__ __forceinline__ bool dense_sees(int b, int h, int row, int key) const {
        return mask_.dense.data.get(mask_.dense.at(b, h, row) + key * mask_.dense.inner) != 0;
    }
    // What it lets the query see of a tile: each lane reads two keys.
    __device__ __forceinline__ uint64_t dense_word(int b, int h, int row, int begin) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP, low = begin + lane, high = low + WARP;
        const uint32_t first = warp_ballot(low < len_k_ && dense_sees(b, h, row, low));
        const uint32_t second = warp_ballot(high < len_k_ && dense_sees(b, h, row, high));
        return static_cast<uint64_t>(second) << WARP | first;
    }

    // Whether it lets one of the queries [row, rows_end) see one of a tile's keys. All threads of the team ask together.
    template <typename Team>
    __device__ __forceinline__ bool dense_tile_any(int b, int h, int row, int rows_end, int begin) const {
        bool any = false;
        const int keys = smaller(KEYS, len_k_ - begin);
        for (int i = static_cast<int>(threadIdx.x); i < (rows_end - row) * KEYS; i += Team::threads()) {
            const int key = i % KEYS;
            any = any || (key < keys && dense_sees(b, h, row + i / KEYS, begin + key));
        }
        return Team::any(any);
    }

    const MaskParams &mask_;
    int len_q_, len_k_;
};

// What those know of a tile who only look at it: whether it is full, and who sees what by the dense mask.
template <bool DENSE>
class MaskView : MaskRows {
public:
    __device__ __forceinline__ MaskView(const MaskParams &mask, const Sequence &sequence, int b, int h, bool full)
        : MaskRows(mask, sequence), b_(b), h_(h), full_(full) {}

    __device__ __forceinline__ bool is_full() const { return full_; }
    // Whether the dense mask lets query `row` see `key`; both exist.
    __device__ __forceinline__ bool dense_sees(int row, int key) const { return MaskRows::dense_sees(b_, h_, row, key); }
    __device__ __forceinline__ bool has_dense_rows() const { return DENSE && MaskRows::has_dense_rows(); }

private:
    int b_, h_;
    bool full_;
};

// ROWS queries from `row` on, of batch entry b and head h; the threads of Team walk.
template <int ROWS, bool DENSE, typename Team = WholeBlock>
class MaskWalk : MaskRows {
public:
    static constexpr int BLOCK_ROWS = ROWS / MASK_BLOCK;
    static constexpr int SCRATCH = 4 * MAX_INTERVALS + 20;

    // scratch: shared memory of SCRATCH integers. What the walk needs seldom lies there: registers belong to the accumulators.
    __device__ __forceinline__ MaskWalk(const MaskParams &mask, int b, int h, int row, const Sequence &sequence, const Shared<int> &scratch)
        : MaskRows(mask, sequence), row_(row), scratch_(scratch) {
        const Bounds bounds = bounds_of(b, sequence);
        // Keys that some query sees lie in `reach`; those in `sure` all of them see.
        Span reach = bounds.keys, sure = bounds.keys;
        if (mask.has_left) {
            reach.low = larger(reach.low, band_low(bounds, row));
            sure.low = larger(sure.low, band_low(bounds, last_row()));
        }
        if (mask.has_right) {
            reach.high = smaller(reach.high, band_high(bounds, last_row()));
            sure.high = smaller(sure.high, band_high(bounds, row));
        }
        if (threadIdx.x == 0) scratch_.store<2>(PLACE, {{b, h}});
        if (mask.n_intervals > 0) {
            Team::sync();
            reduce_intervals();
            Span all = {len_k_, 0}, widest = {0, 0};
            for (int r = 0; r < mask.n_intervals; r++) {
                all = {smaller(all.low, hull(r).low), larger(all.high, hull(r).high)};
                if (core(r).high - core(r).low > widest.high - widest.low) widest = core(r);
            }
            reach = {larger(reach.low, all.low), smaller(reach.high, all.high)};
            sure = {larger(sure.low, widest.low), smaller(sure.high, widest.high)};
        }
        if (mask.key_bits || mask.row_ptr.data || mask.dense.data) sure = {0, 0};
        next_ = reach.low / KEYS;
        int last[2] = {0, 0};
        if (mask.row_ptr.data) {
#pragma unroll
            for (int i = 0; i < BLOCK_ROWS; i++) {
                const int block_row = row / MASK_BLOCK + i;
                if (block_row * MASK_BLOCK >= len_q_) continue;
                const int64_t entry = mask.row_ptr.at(b, h, 0) + block_row;
                entry_[i] = mask.row_ptr.data.get(entry);
                last[i] = mask.row_ptr.data.get(entry + 1);
            }
        }
        if (threadIdx.x == 0) {
            scratch_.store<4>(BOUNDS, {{bounds.band.low, bounds.band.high, bounds.keys.low, bounds.keys.high}});
            const int end = reach.high > reach.low ? (reach.high + KEYS - 1) / KEYS : 0;
            scratch_.store<4>(ENDS, {{end, (sure.low + KEYS - 1) / KEYS, sure.high / KEYS, 0}});
            scratch_.store<4>(PLACE, {{b, h, last[0], last[1]}});
        }
        settle(false);
        Team::sync();
    }

    // The next tile that some query sees. All threads of the team call this, and settle() when all have.
    __device__ __forceinline__ KeyTile next() {
        const Pack<int, 4> state = scratch_.load<4>(STATE);
        next_ = state.at[0], begun_ = state.at[1], entry_[0] = state.at[2], entry_[1] = state.at[3];
        const Pack<int, 4> ends = scratch_.load<4>(ENDS);
        const int end = ends.at[0];
        for (; next_ < end; next_++) {
            KeyTile tile = {next_ * KEYS, true, ~uint64_t(0), {0, 0}};
            if (next_ >= ends.at[1] && next_ < ends.at[2]) {
                next_++;
                return tile;
            }
            if (mask_.row_ptr.data && !find_blocks(tile, end)) break;
            if (!look(tile)) continue;
            next_ = tile.begin / KEYS + 1;
            return tile;
        }
        next_ = INT_MAX;
        return {-1, false, 0, {0, 0}};
    }

    // Whether there was a tile before.
    __device__ __forceinline__ bool begun() const { return begun_ != 0; }
    // Keeps the place in shared memory until the next call of next(): between barriers of the team.
    __device__ __forceinline__ void settle(bool begun = true) const {
        if (threadIdx.x == 0) scratch_.store<4>(STATE, {{next_, begun, entry_[0], entry_[1]}});
    }

    // Whether the tile is full, told by one thread before a barrier and asked by all behind it.
    __device__ __forceinline__ void tell(const KeyTile &tile) const {
        if (threadIdx.x == 0) scratch_.set(FULL, tile.full);
    }
    __device__ __forceinline__ bool is_full() const { return scratch_.get(FULL) != 0; }

    // What query `row` sees of a tile, dense mask apart. 0 behind the last query.
    __device__ __forceinline__ uint64_t visible(const KeyTile &tile, int row) const {
        const Pack<int, 2> place = scratch_.load<2>(PLACE);
        const int block = BLOCK_ROWS == 1 || row - row_ < MASK_BLOCK ? tile.block[0] : tile.block[1];
        return word_of(tile.keys, load_bounds(), block, place.at[0], place.at[1], row, tile.begin);
    }

    // Whether the dense mask lets query `row` see `key`; both exist.
    __device__ __forceinline__ bool dense_sees(int row, int key) const {
        const Pack<int, 2> place = scratch_.load<2>(PLACE);
        return MaskRows::dense_sees(place.at[0], place.at[1], row, key);
    }
    __device__ __forceinline__ bool has_dense_rows() const { return DENSE && MaskRows::has_dense_rows(); }

private:
    // Where things lie in scratch_, behind hull and core of each interval. ENDS: the last tile's, and those of the tiles that are surely full.
    // STATE: what settle() keeps. PLACE: batch entry and head, then where the block rows end.
    static constexpr int BOUNDS = 4 * MAX_INTERVALS, ENDS = BOUNDS + 4, STATE = ENDS + 4, PLACE = STATE + 4, FULL = PLACE + 4;

    __device__ __forceinline__ Bounds load_bounds() const {
        const Pack<int, 4> found = scratch_.load<4>(BOUNDS);
        return {{found.at[0], found.at[1]}, {found.at[2], found.at[3]}};
    }
    __device__ __forceinline__ int last_row() const { return smaller(row_ + ROWS, len_q_) - 1; }

    // Per interval: the hull of what the queries see by it, and the core that all of them see. Threads of the first warp take rows each.
    __device__ __forceinline__ void reduce_intervals() {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread < WARP) {
            const Pack<int, 2> place = scratch_.load<2>(PLACE);
            for (int r = 0; r < mask_.n_intervals; r++) {
                int hull_low = len_k_, hull_high = 0, core_low = 0, core_high = len_k_;
                for (int i = row_ + thread; i <= last_row(); i += WARP) {
                    const Span interval = interval_of(r, place.at[0], place.at[1], i);
                    core_low = larger(core_low, interval.low);
                    core_high = smaller(core_high, interval.high);
                    if (interval.low >= interval.high) continue;
                    hull_low = smaller(hull_low, interval.low);
                    hull_high = larger(hull_high, interval.high);
                }
#pragma unroll
                for (int step = WARP / 2; step > 0; step /= 2) {
                    hull_low = smaller(hull_low, shuffle_xor(hull_low, step));
                    hull_high = larger(hull_high, shuffle_xor(hull_high, step));
                    core_low = larger(core_low, shuffle_xor(core_low, step));
                    core_high = smaller(core_high, shuffle_xor(core_high, step));
                }
                if (thread == 0) scratch_.store<4>(4 * r, {{hull_low, hull_high, core_low, core_high}});
            }
        }
        Team::sync();
    }
    __device__ __forceinline__ Span hull(int r) const { return {scratch_.get(4 * r), scratch_.get(4 * r + 1)}; }
    __device__ __forceinline__ Span core(int r) const { return {scratch_.get(4 * r + 2), scratch_.get(4 * r + 3)}; }

    // Moves on to the next tile in which some block row has a block, and notes which; false where there is none before tile `end`.
    __device__ __forceinline__ bool find_blocks(KeyTile &tile, int end) {
        int column = INT_MAX;
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; i++) {
            const int last = scratch_.get(PLACE + 2 + i);
            while (entry_[i] < last && mask_.col.get(entry_[i]) < next_) entry_[i]++;
            if (entry_[i] < last) column = smaller(column, mask_.col.get(entry_[i]));
        }
        if (column >= end) return false;
        next_ = column;
        tile.begin = column * KEYS;
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; i++) {
            const bool exists = entry_[i] < scratch_.get(PLACE + 2 + i) && mask_.col.get(entry_[i]) == column;
            tile.block[i] = exists ? mask_.id.get(entry_[i]) : -1;
            if (tile.block[i] != 0 && row_ + i * MASK_BLOCK < len_q_) tile.full = false;
        }
        return true;
    }

    // Whether some query sees some key of the tile; notes which keys there are and whether the tile is full.
    __device__ __forceinline__ bool look(KeyTile &tile) const {
        const int begin = tile.begin, end = begin + KEYS;
        const Bounds bounds = load_bounds();
        tile.keys = keys_of<DENSE>(bounds, scratch_.get(PLACE), begin);
        if (tile.keys == 0) return false;
        tile.full = tile.full && tile.keys == ~uint64_t(0);
        if (mask_.has_left || mask_.has_right) {
            const int last = last_row();
            if (!Span{band_low(bounds, row_), band_high(bounds, last)}.meets(begin, end)) return false;
            tile.full = tile.full && Span{band_low(bounds, last), band_high(bounds, row_)}.covers(begin, end);
        }
        if (mask_.n_intervals > 0) {
            bool met = false, covered = false;
            for (int r = 0; r < mask_.n_intervals; r++) {
                met = met || hull(r).meets(begin, end);
                covered = covered || core(r).covers(begin, end);
            }
            if (!met) return false;
            tile.full = tile.full && covered;
        }
        if (has_dense_rows()) {
            tile.full = false;
            const Pack<int, 2> place = scratch_.load<2>(PLACE);
            return dense_tile_any<Team>(place.at[0], place.at[1], row_, last_row() + 1, begin);
        }
        return true;
    }

    int row_;
    Shared<int> scratch_;
    // Valid between next() and settle().
    int next_, begun_;       // tile; whether there was one
    int entry_[2] = {0, 0};  // form D: the rest of each block row begins there
};
