// Which tiles of 64 queries see a tile of 64 keys, head after head, and what each query sees of it: the mask read the other way round.
//
// The band leaves a range of query tiles. Within it intervals are judged by their bounds over 64 queries, 32 tiles at once, and form D by its
// transpose; a dense mask is read whole. Whatever they let pass is a word of 64 bits per query, as in mask.cuh.
#pragma once
#include "mask.cuh"

// How the mask reads by keys; each part comes with its counterpart in MaskParams.
struct MaskTranspose {
    Strided<const int32_t> bounds;   // (B,H,ceil(Sq/64)) of intervals: least and greatest start, least and greatest end
    int64_t bounds_stride;           // between the intervals
    Strided<const int32_t> col_ptr;  // (B,H), block columns behind
    Global<const int32_t> row, row_id;
};

// A tile of queries to visit.
struct QueryTile {
    int head;
    int begin;  // its first query; negative: there is no further tile
    bool full;  // every query sees every key
    int block;  // form D: 0 full, else the bitmap
};

// The threads of Team walk.
template <bool DENSE, typename Team = WholeBlock>
class QueryWalk : MaskRows {
public:
    static constexpr int SCRATCH = 16;

    // The tiles that see keys [begin, begin + 64) of batch entry b. scratch: shared memory of SCRATCH integers, which holds all that the walk needs
    // between one call of it and the next.
    __device__ __forceinline__ QueryWalk(const MaskParams &mask, const MaskTranspose &transpose, int b, int begin, const Sequence &sequence,
                                         const Shared<int> &scratch)
        : MaskRows(mask, sequence), transpose_(transpose), b_(b), begin_(begin), scratch_(scratch) {}

    // Begins with the tiles of the first of the heads [head, heads_end). All threads of the team call this.
    __device__ __forceinline__ void start(int head, int heads_end, const Sequence &sequence) {
        const Bounds bounds = bounds_of(b_, sequence);
        const uint64_t keys = keys_of<DENSE>(bounds, b_, begin_);
        const int low = larger(begin_, bounds.keys.low), high = smaller(begin_ + KEYS, bounds.keys.high);
        int first = 0, end = keys != 0 ? len_q_ : 0;
        if (mask_.has_right) first = larger(first, low - bounds.band.high + 1);
        if (mask_.has_left) end = smaller(end, high - bounds.band.low);
        first /= MASK_BLOCK, end = end > 0 ? (end + MASK_BLOCK - 1) / MASK_BLOCK : 0;
        begin_head(head, first);
        if (threadIdx.x == 0) {
            scratch_.store<4>(BOUNDS, {{bounds.band.low, bounds.band.high, low, high}});
            scratch_.store<4>(ENDS, {{first, end, first < end ? heads_end : 0, 0}});
            scratch_.store<2>(WORD, {{static_cast<int>(keys), static_cast<int>(keys >> 32)}});
        }
        settle();
        Team::sync();
    }

    // The next tile of which some query sees some key. All threads of the team call this, and settle() when all have.
    __device__ __forceinline__ QueryTile next() {
        const Pack<int, 4> state = scratch_.load<4>(STATE), ends = scratch_.load<4>(ENDS);
        head_ = state.at[0], next_ = state.at[1], entry_ = state.at[2], last_ = state.at[3];
        while (head_ < ends.at[2]) {
            QueryTile tile = {head_, 0, false, 0};
            while (find(tile, ends.at[1])) {
                next_ = tile.begin / MASK_BLOCK + 1;
                if (look(tile)) return tile;
            }
            head_++;
            if (head_ < ends.at[2]) begin_head(head_, ends.at[0]);
        }
        return {-1, -1, false, 0};
    }
    // Keeps the place in shared memory until the next call of next(): between barriers of the team.
    __device__ __forceinline__ void settle() const {
        if (threadIdx.x == 0) scratch_.store<4>(STATE, {{head_, next_, entry_, last_}});
    }

    // The keys that some query of the batch entry may see.
    __device__ __forceinline__ uint64_t keys() const {
        const Pack<int, 2> word = scratch_.load<2>(WORD);
        return static_cast<uint64_t>(static_cast<uint32_t>(word.at[1])) << 32 | static_cast<uint32_t>(word.at[0]);
    }

    // What each of the tile's queries sees, into words of shared memory, by all threads of the team together.
    __device__ __forceinline__ void fill_words(const Shared<uint64_t> &words, const QueryTile &tile) const {
        const uint64_t keys = this->keys();
        const Bounds bounds = load_bounds();
        const int thread = static_cast<int>(threadIdx.x), threads = Team::threads();
        if (!has_dense_rows()) {
            for (int i = thread; i < MASK_BLOCK; i += threads) words.set(i, word_of(keys, bounds, tile.block, b_, tile.head, tile.begin + i, begin_));
            return;
        }
        for (int i = thread / WARP; i < MASK_BLOCK; i += threads / WARP) {
            uint64_t word = word_of(keys, bounds, tile.block, b_, tile.head, tile.begin + i, begin_);
            if (tile.begin + i < len_q_) word &= dense_word(b_, tile.head, tile.begin + i, begin_);
            if (thread % WARP == 0) words.set(i, word);
        }
    }

private:
    // Where things lie in scratch_. BOUNDS: of the band about a query's number, then of the tile's keys that the batch entry has.
    static constexpr int BOUNDS = 0, ENDS = 4, STATE = 8, WORD = 12;

    __device__ __forceinline__ Bounds load_bounds() const {
        const Pack<int, 4> found = scratch_.load<4>(BOUNDS);
        return {{found.at[0], found.at[1]}, {found.at[2], found.at[3]}};
    }
    __device__ __forceinline__ bool has_dense_rows() const { return DENSE && MaskRows::has_dense_rows(); }

    __device__ __forceinline__ void begin_head(int head, int first) {
        head_ = head, next_ = first;
        if (!mask_.row_ptr.data) return;
        const int64_t column = transpose_.col_ptr.at(b_, head, 0) + begin_ / KEYS;
        entry_ = transpose_.col_ptr.data.get(column);
        last_ = transpose_.col_ptr.data.get(column + 1);
    }

    // Moves on to the next tile, from next_ on, that may see a key; false where there is none before tile `end`.
    __device__ __forceinline__ bool find(QueryTile &tile, int end) {
        if (mask_.row_ptr.data) {
            for (; entry_ < last_; entry_++) {
                const int row = transpose_.row.get(entry_);
                if (row < next_ || (row < end && !may_see(tile.head, row))) continue;
                if (row >= end) break;
                tile.begin = row * MASK_BLOCK;
                tile.block = transpose_.row_id.get(entry_++);
                return true;
            }
            return false;
        }
        if (mask_.n_intervals > 0) {
            const int lane = static_cast<int>(threadIdx.x) % WARP;
            for (uint32_t found = 0; next_ < end; next_ += WARP) {
                found = warp_ballot(next_ + lane < end && may_see(tile.head, next_ + lane));
                if (found == 0) continue;
                next_ += first_bit(found);
                break;
            }
        }
        tile.begin = next_ * MASK_BLOCK;
        return next_ < end;
    }

    // Whether some interval of a tile of queries may hold one of the keys.
    __device__ __forceinline__ bool may_see(int head, int query_tile) const {
        if (mask_.n_intervals == 0) return true;
        const Bounds bounds = load_bounds();
        for (int r = 0; r < mask_.n_intervals; r++) {
            const Pack<int, 4> of = bounds_at(r, head, query_tile);
            if (of.at[0] < bounds.keys.high && of.at[3] > bounds.keys.low) return true;
        }
        return false;
    }
    __device__ __forceinline__ Pack<int, 4> bounds_at(int r, int head, int query_tile) const {
        const int64_t at = transpose_.bounds.at(b_, head, query_tile) + r * transpose_.bounds_stride;
        const Global<const int32_t> &data = transpose_.bounds.data;
        return {{data.get(at), data.get(at + 1), data.get(at + 2), data.get(at + 3)}};
    }

    // Whether some query of the tile may see some key; notes whether each sees all.
    __device__ __forceinline__ bool look(QueryTile &tile) const {
        const Bounds bounds = load_bounds();
        const int end = begin_ + KEYS, rows_end = smaller(tile.begin + MASK_BLOCK, len_q_);
        tile.full = tile.block == 0 && keys() == ~uint64_t(0);
        if (mask_.has_left || mask_.has_right)
            tile.full = tile.full && Span{band_low(bounds, rows_end - 1), band_high(bounds, tile.begin)}.covers(begin_, end);
        if (mask_.n_intervals > 0 && tile.full) {
            bool covered = false;
            for (int r = 0; r < mask_.n_intervals; r++) {
                const Pack<int, 4> of = bounds_at(r, tile.head, tile.begin / MASK_BLOCK);
                covered = covered || Span{of.at[1], of.at[2]}.covers(begin_, end);
            }
            tile.full = covered;
        }
        if (!has_dense_rows()) return true;
        tile.full = false;
        return dense_tile_any<Team>(b_, tile.head, tile.begin, rows_end, begin_);
    }

    const MaskTranspose &transpose_;
    int b_, begin_;
    Shared<int> scratch_;
    // Valid between next() and settle().
    int head_, next_;             // of what comes next
    int entry_ = 0, last_ = 0;    // form D: the rest of the head's block column
};
