// The lowered mask on one tile: a few queries (the lanes) against a block of keys (the rows).
#pragma once
#include "../simd.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int64_t kKeyBlock = 64;
constexpr int kMaxVectors = 3;  // query vectors in a tile: the width of the micro-kernel
constexpr int64_t kMaxLanes = kMaxVectors * kLanes;
constexpr int kMaxIntervals = 4;

// Queries [begin, begin + count) of one head; lane l is query begin + l, lanes past `count` are padding.
struct QueryTile {
    int64_t batch, head;
    int64_t begin, count;
    int64_t vectors;

    int64_t lanes() const { return vectors * kLanes; }
    int64_t last() const { return begin + count - 1; }
};

struct KeySpan {
    int64_t begin, end;
};

enum class Coverage { empty, partial, full };

FASTATTN_INLINE const uint8_t *bool_at(const fastattn_tensor &t, int64_t b, int64_t h, int64_t i, int64_t j) {
    return (const uint8_t *)t.data + b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j * t.stride[3];
}

class TileMask {
  public:
    TileMask(const fastattn_mask &mask, const QueryTile &tile, int64_t len_k) : mask_(mask), tile_(tile) {
        span_ = {0, len_k};
        if (mask.key_start) span_.begin = larger(span_.begin, mask.key_start[tile.batch]);
        if (mask.key_end) span_.end = smaller(span_.end, mask.key_end[tile.batch]);
        if (mask.band_has_left) span_.begin = larger(span_.begin, tile.begin + mask.band_offset - mask.band_left);
        if (mask.band_has_right) span_.end = smaller(span_.end, tile.last() + mask.band_offset + mask.band_right + 1);
        if (mask.n_intervals) read_intervals();
    }

    // The keys that some query of the tile may see by everything but the dense mask.
    KeySpan span() const { return span_; }

    // Looks at keys [begin, begin + count), count <= kKeyBlock; apply() and hidden_rows() then speak of them.
    Coverage look(int64_t begin, int64_t count) {
        begin_ = begin;
        count_ = count;
        band_cuts_ = !band_covers();
        intervals_cut_ = !interval_covers();
        dense_ = mask_.dense.data ? look_dense() : Coverage::full;
        if (dense_ == Coverage::empty) return Coverage::empty;
        return band_cuts_ || intervals_cut_ || dense_ == Coverage::partial ? Coverage::partial : Coverage::full;
    }

    // Rows of the block that no query sees by a key mask, as 1 = visible; null when there are none.
    // What lies there in K and V may be NaN and must be read as 0.
    const uint8_t *visible_rows() const { return is_key_mask() && dense_ == Coverage::partial ? row_visible_ : nullptr; }

    // scores(key, lane) = -inf where hidden.
    void apply(float *scores) const {
        for (int64_t row = 0; row < count_; row++)
            for (int64_t v = 0; v < tile_.vectors; v++) {
                float *target = scores + row * tile_.lanes() + v * kLanes;
                store(target, select(visible(row, v), load(target), broadcast(-kInf)));
            }
    }

  private:
    bool is_key_mask() const { return mask_.dense.stride[2] == 0; }

    void read_intervals() {
        const fastattn_tensor &t = mask_.intervals;
        int64_t lowest = INT64_MAX, highest = 0;
        for (int64_t r = 0; r < mask_.n_intervals; r++) {
            inner_[r] = {0, INT64_MAX};
            for (int64_t lane = 0; lane < tile_.lanes(); lane++) {
                const int64_t i = tile_.begin + smaller(lane, tile_.count - 1);  // padding repeats the last query
                const int32_t *bounds =
                    (const int32_t *)t.data + r * t.stride[0] + tile_.batch * t.stride[1] + tile_.head * t.stride[2] + i * t.stride[3];
                starts_[r][lane] = bounds[0];
                ends_[r][lane] = bounds[1];
                inner_[r] = {larger(inner_[r].begin, bounds[0]), smaller(inner_[r].end, bounds[1])};
                if (bounds[0] >= bounds[1]) continue;  // an empty interval says nothing about the span
                lowest = smaller(lowest, bounds[0]);
                highest = larger(highest, bounds[1]);
            }
        }
        span_ = {larger(span_.begin, lowest), smaller(span_.end, highest)};
    }

    bool band_covers() const {
        if (mask_.band_has_left && begin_ < tile_.last() + mask_.band_offset - mask_.band_left) return false;
        return !mask_.band_has_right || begin_ + count_ - 1 <= tile_.begin + mask_.band_offset + mask_.band_right;
    }

    bool interval_covers() const {
        for (int64_t r = 0; r < mask_.n_intervals; r++)
            if (inner_[r].begin <= begin_ && begin_ + count_ <= inner_[r].end) return true;
        return mask_.n_intervals == 0;
    }

    Coverage look_dense() {
        bool any_visible = false, all_visible = true;
        if (is_key_mask()) {
            for (int64_t row = 0; row < count_; row++) {
                row_visible_[row] = *bool_at(mask_.dense, tile_.batch, tile_.head, 0, begin_ + row);
                any_visible |= row_visible_[row] != 0;
                all_visible &= row_visible_[row] != 0;
            }
        } else {
            for (int64_t lane = 0; lane < tile_.lanes(); lane++) {
                const int64_t i = tile_.begin + smaller(lane, tile_.count - 1);
                const uint8_t *source = bool_at(mask_.dense, tile_.batch, tile_.head, i, begin_);
                const int64_t stride = mask_.dense.stride[3];
                for (int64_t row = 0; row < count_; row++) {
                    const bool seen = source[row * stride] != 0;
                    dense_tile_[row][lane] = seen ? -1 : 0;
                    any_visible |= seen;
                    all_visible &= seen;
                }
            }
        }
        return all_visible ? Coverage::full : any_visible ? Coverage::partial : Coverage::empty;
    }

    FASTATTN_INLINE vint in_range(vint lane, int64_t low, int64_t high) {  // low <= lane <= high, bounds brought into int32
        const int32_t first = (int32_t)larger(-1, smaller(low, kMaxLanes)), last = (int32_t)larger(-1, smaller(high, kMaxLanes));
        return (vint)(lane >= first) & (vint)(lane <= last);
    }

    vint visible(int64_t row, int64_t v) const {
        const int64_t j = begin_ + row;
        vint seen = broadcast_int(-1);
        if (band_cuts_) {
            const int64_t position = j - mask_.band_offset - tile_.begin;  // the lane whose own position key j has
            const int64_t low = mask_.band_has_right ? position - mask_.band_right : -1;
            const int64_t high = mask_.band_has_left ? position + mask_.band_left : kMaxLanes;
            seen &= in_range(lane_index() + (int32_t)(v * kLanes), low, high);
        }
        if (intervals_cut_) {
            vint inside = {};
            for (int64_t r = 0; r < mask_.n_intervals; r++)
                inside |= (vint)(load_int(starts_[r] + v * kLanes) <= (int32_t)j) & (vint)(load_int(ends_[r] + v * kLanes) > (int32_t)j);
            seen &= inside;
        }
        if (dense_ == Coverage::partial) seen &= is_key_mask() ? broadcast_int(row_visible_[row] ? -1 : 0) : load_int(dense_tile_[row] + v * kLanes);
        return seen;
    }

    const fastattn_mask &mask_;
    QueryTile tile_;
    KeySpan span_;
    KeySpan inner_[kMaxIntervals];  // keys inside interval r of every query of the tile
    int32_t starts_[kMaxIntervals][kMaxLanes], ends_[kMaxIntervals][kMaxLanes];
    int64_t begin_ = 0, count_ = 0;
    bool band_cuts_ = false, intervals_cut_ = false;
    Coverage dense_ = Coverage::full;
    uint8_t row_visible_[kKeyBlock];
    int32_t dense_tile_[kKeyBlock][kMaxLanes];
};

FASTATTN_NAMESPACE_END
