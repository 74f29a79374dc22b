// The lowered mask seen from a tile of queries: which tiles of 64 keys it has to visit, which of them are full, and who sees what in the rest.
//
// All threads of a block walk alike. What one query sees of a tile of 64 keys is a word of 64 bits, whatever the form of the mask: keys, band,
// intervals and blocks each give such a word and they are combined by and. A dense mask is read element by element on top.
#pragma once
#include <climits>

#include <primitives/threads.cuh>

#include "params.cuh"

constexpr int KEYS = MASK_BLOCK;  // of a tile
constexpr int MAX_INTERVALS = 4;

__device__ __forceinline__ int clamp(int64_t x, int low, int high) { return x < low ? low : x > high ? high : static_cast<int>(x); }
__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

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

// ROWS queries from `row` on, of batch entry b and head h.
template <int ROWS, bool DENSE>
class MaskWalk {
public:
    static constexpr int BLOCK_ROWS = ROWS / MASK_BLOCK;

    __device__ __forceinline__ MaskWalk(const MaskParams &mask, int b, int h, int row, int len_q, int len_k, const Shared<int> &scratch)
        : mask_(mask), b_(b), h_(h), row_(row), rows_(smaller(ROWS, len_q - row)), len_q_(len_q), len_k_(len_k), spans_(scratch) {
        keys_ = {0, len_k};
        if (mask.key_start) keys_.low = clamp(mask.key_start.get(b), 0, len_k);
        if (mask.key_end) keys_.high = clamp(mask.key_end.get(b), 0, len_k);
        Span reach = keys_;
        if (mask.has_left) reach.low = larger(reach.low, band_low(row));
        if (mask.has_right) reach.high = smaller(reach.high, band_high(row + rows_ - 1));
        if (mask.n_intervals > 0) {
            reduce_intervals();
            int low = len_k, high = 0;
            for (int r = 0; r < mask.n_intervals; r++) {
                low = smaller(low, hull(r).low);
                high = larger(high, hull(r).high);
            }
            reach = {larger(reach.low, low), smaller(reach.high, high)};
        }
        next_ = reach.low / KEYS;
        end_ = reach.high > reach.low ? (reach.high + KEYS - 1) / KEYS : 0;
        if (mask.row_ptr.data) {
#pragma unroll
            for (int i = 0; i < BLOCK_ROWS; i++) {
                const int block_row = row / MASK_BLOCK + i;
                const bool exists = block_row * MASK_BLOCK < len_q;
                const int64_t at = mask.row_ptr.at(b, h, 0) + block_row;
                entry_[i] = exists ? mask.row_ptr.data.get(at) : 0;
                last_[i] = exists ? mask.row_ptr.data.get(at + 1) : 0;
            }
        }
    }

    // The next tile that some query sees. All threads of the block call this.
    __device__ __forceinline__ KeyTile next() {
        for (; next_ < end_; next_++) {
            KeyTile tile = {next_ * KEYS, true, ~uint64_t(0), {0, 0}};
            if (mask_.row_ptr.data && !find_blocks(tile)) break;
            if (!look(tile)) continue;
            next_ = tile.begin / KEYS + 1;
            return tile;
        }
        next_ = end_;
        return {-1, false, 0, {0, 0}};
    }

    // What query `row` sees of a tile, dense mask apart. 0 behind the last query.
    __device__ __forceinline__ uint64_t visible(const KeyTile &tile, int row) const {
        if (row >= len_q_) return 0;
        uint64_t word = tile.keys;
        if (mask_.has_left || mask_.has_right) word &= bit_range(band_low(row) - tile.begin, band_high(row) - tile.begin);
        if (mask_.n_intervals > 0) {
            uint64_t either = 0;
            for (int r = 0; r < mask_.n_intervals; r++) {
                const Span interval = interval_of(r, row);
                either |= bit_range(interval.low - tile.begin, interval.high - tile.begin);
            }
            word &= either;
        }
        if (mask_.row_ptr.data) {
            const int block = BLOCK_ROWS == 1 || row - row_ < MASK_BLOCK ? tile.block[0] : tile.block[1];
            if (block < 0) return 0;
            if (block > 0) word &= static_cast<uint64_t>(mask_.bitmaps.get(static_cast<int64_t>(block) * MASK_BLOCK + row % MASK_BLOCK));
        }
        return word;
    }

    // Whether the dense mask lets query `row` see `key`; both exist.
    __device__ __forceinline__ bool dense_sees(int row, int key) const {
        return mask_.dense.data.get(mask_.dense.at(b_, h_, row) + key * mask_.dense.inner) != 0;
    }
    __device__ __forceinline__ bool has_dense_rows() const { return DENSE && mask_.dense.data && !is_key_mask(); }

private:
    // A mask that no head and no query distinguishes hides keys from everybody: they then count as zeros.
    __device__ __forceinline__ bool is_key_mask() const { return mask_.dense.head == 0 && mask_.dense.row == 0; }

    // Keys [band_low, band_high) of a query.
    __device__ __forceinline__ int band_low(int row) const { return mask_.has_left ? clamp(row + mask_.band_offset - mask_.band_left, 0, len_k_) : 0; }
    __device__ __forceinline__ int band_high(int row) const {
        return mask_.has_right ? clamp(row + mask_.band_offset + mask_.band_right + 1, 0, len_k_) : len_k_;
    }

    __device__ __forceinline__ Span interval_of(int r, int row) const {
        const int64_t at = mask_.intervals.at(b_, h_, row) + r * mask_.interval_stride;
        return {clamp(mask_.intervals.data.get(at), 0, len_k_), clamp(mask_.intervals.data.get(at + 1), 0, len_k_)};
    }

    // Per interval: the hull of what the queries see by it, and the core that all of them see. Threads of the first warp take rows each.
    __device__ __forceinline__ void reduce_intervals() {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread < WARP) {
            for (int r = 0; r < mask_.n_intervals; r++) {
                int hull_low = len_k_, hull_high = 0, core_low = 0, core_high = len_k_;
                for (int i = thread; i < rows_; i += WARP) {
                    const Span interval = interval_of(r, row_ + i);
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
                if (thread == 0) spans_.store<4>(4 * r, {{hull_low, hull_high, core_low, core_high}});
            }
        }
        sync_block();
    }
    __device__ __forceinline__ Span hull(int r) const { return {spans_.get(4 * r), spans_.get(4 * r + 1)}; }
    __device__ __forceinline__ Span core(int r) const { return {spans_.get(4 * r + 2), spans_.get(4 * r + 3)}; }

    // Moves on to the next tile in which some block row has a block, and notes which; false where there is none before end_.
    __device__ __forceinline__ bool find_blocks(KeyTile &tile) {
        int column = INT_MAX;
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; i++) {
            while (entry_[i] < last_[i] && mask_.col.get(entry_[i]) < next_) entry_[i]++;
            if (entry_[i] < last_[i]) column = smaller(column, mask_.col.get(entry_[i]));
        }
        if (column >= end_) return false;
        next_ = column;
        tile.begin = column * KEYS;
#pragma unroll
        for (int i = 0; i < BLOCK_ROWS; i++) {
            const bool exists = entry_[i] < last_[i] && mask_.col.get(entry_[i]) == column;
            tile.block[i] = exists ? mask_.id.get(entry_[i]) : -1;
            if (tile.block[i] != 0 && i * MASK_BLOCK < rows_) tile.full = false;
        }
        return true;
    }

    // Whether some query sees some key of the tile; notes which keys there are and whether the tile is full.
    __device__ __forceinline__ bool look(KeyTile &tile) const {
        const int begin = tile.begin, end = begin + KEYS;
        tile.keys = bit_range(keys_.low - begin, keys_.high - begin);
        if (mask_.key_bits)
            tile.keys &= static_cast<uint64_t>(mask_.key_bits.get(static_cast<int64_t>(b_) * mask_.key_words + begin / KEYS));
        if (DENSE && mask_.dense.data && is_key_mask()) tile.keys &= key_mask_word(begin);
        if (tile.keys == 0) return false;
        tile.full = tile.full && tile.keys == ~uint64_t(0);
        if (mask_.has_left || mask_.has_right) {
            const int last = row_ + rows_ - 1;
            if (!Span{band_low(row_), band_high(last)}.meets(begin, end)) return false;
            tile.full = tile.full && Span{band_low(last), band_high(row_)}.covers(begin, end);
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
            return dense_tile_any(begin);
        }
        return true;
    }

    // The 64 keys of a dense mask that is a key mask: each lane reads two.
    __device__ __forceinline__ uint64_t key_mask_word(int begin) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP, low = begin + lane, high = low + WARP;
        const uint32_t first = warp_ballot(low < len_k_ && dense_sees(0, low)), second = warp_ballot(high < len_k_ && dense_sees(0, high));
        return static_cast<uint64_t>(second) << WARP | first;
    }

    __device__ __forceinline__ bool dense_tile_any(int begin) const {
        bool any = false;
        const int keys = smaller(KEYS, len_k_ - begin);
        for (int i = static_cast<int>(threadIdx.x); i < rows_ * KEYS; i += static_cast<int>(blockDim.x)) {
            const int key = i % KEYS;
            any = any || (key < keys && dense_sees(row_ + i / KEYS, begin + key));
        }
        return sync_block_or(any);
    }

    const MaskParams &mask_;
    int b_, h_, row_, rows_, len_q_, len_k_;
    Span keys_;            // of the batch entry
    int next_, end_;       // tiles
    int entry_[2] = {0, 0}, last_[2] = {0, 0};  // form D: the rest of each block row
    Shared<int> spans_;    // 4 per interval
};
