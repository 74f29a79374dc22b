// Biases that depend on distance alone (tables, slopes), on a block of scores.
//
// Scores lie (key, query lane), so the distances of a block are constant along its diagonals: keys + lanes of them, and a vector of consecutive
// queries against one key meets consecutive ones. The bias of a block is therefore a strip of so many numbers, expanded from the table for
// that block alone, of which each vector of scores adds one unaligned load. Its gradient is the sums along the diagonals, a strip as well.
//
// Element x of a strip belongs to the scores (row, lane) with lane + count - 1 - row = x, whose distance is that of (count - 1, 0) less x.
#pragma once
#include "mask.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int64_t kMaxStrip = kKeyBlock + kMaxLanes;
constexpr float kLowest = -3.40282347e38f;

FASTATTN_INLINE bool is_given(const fastattn_distance_bias &bias) { return bias.table || bias.slopes; }
FASTATTN_INLINE bool wants_gradient(const fastattn_distance_bias &bias) { return bias.grad_table || bias.grad_slopes; }

// x + y, not -inf where neither of them is: sums of finite biases stay finite.
FASTATTN_INLINE vfloat add_finite(vfloat x, vfloat y) {
    const vfloat total = x + y;
    return select((vint)(total == -kInf) & (vint)(x != -kInf) & (vint)(y != -kInf), broadcast(kLowest), total);
}

// Where a strip of the distances distance, distance + step, ... lies in a table: [0, from) has the column `before`, x of [from, to) its column(x),
// the rest the column `after`.
template <int step>
struct TableSpan {
    int64_t first_column, from, to, before, after;
    TableSpan(const fastattn_distance_bias &bias, int64_t distance, int64_t count) : first_column(distance - bias.table_first) {
        const int64_t last = bias.table_size - 1;
        before = step < 0 ? last : 0, after = last - before;
        from = larger(0, smaller(count, step < 0 ? first_column - last : -first_column));
        to = larger(from, smaller(count, step < 0 ? first_column + 1 : last - first_column + 1));
    }
    int64_t column(int64_t x) const { return first_column + step * x; }
};

// The bias of the distances distance, distance + step, ..., `count` of them; `strip` has room for whole vectors.
template <int step>
void expand_distances(const fastattn_distance_bias &bias, int64_t batch, int64_t head, int64_t distance, int64_t count, float *strip) {
    if (bias.table) {
        const float *table = bias.table + head * bias.table_stride;
        const TableSpan<step> span(bias, distance, count);
        int64_t x = 0;
        for (; x < span.from; x++) strip[x] = table[span.before];
        for (; x < span.to; x++) strip[x] = table[span.column(x)];
        for (; x < count; x++) strip[x] = table[span.after];
    } else {
        for (int64_t x = 0; x < count; x += kLanes) store(strip + x, zero());
    }
    if (!bias.slopes) return;
    const float slope = bias.slopes[batch * bias.slopes_stride + head];
    for (int64_t x = 0; x < count; x += kLanes) {
        const vint distances = (int32_t)(distance + step * x) + step * lane_index();
        const vfloat steps = abs(__builtin_convertvector(distances, vfloat));
        store(strip + x, add_finite(load(strip + x), -slope * steps));
    }
}

FASTATTN_INLINE int64_t top_distance(const fastattn_attention &p, const QueryTile &tile, int64_t begin, int64_t count) {
    const int64_t position = tile.begin + (p.distance.top_left ? 0 : tile.offset);
    return begin + count - 1 - position;
}

// scores(key, lane) += the bias of its distance, for keys [begin, begin + count).
static inline void add_distance_bias(const fastattn_attention &p, const QueryTile &tile, int64_t begin, int64_t count, float *scores) {
    float strip[kMaxStrip + kLanes];
    expand_distances<-1>(p.distance, tile.batch, tile.head, top_distance(p, tile, begin, count), count + tile.lanes() - 1, strip);
    for (int64_t row = 0; row < count; row++)
        for (int64_t v = 0; v < tile.vectors; v++) {
            float *target = scores + row * tile.lanes() + v * kLanes;
            const vfloat bias = load(strip + count - 1 - row + v * kLanes);
            store(target, p.bias.data ? add_finite(load(target), bias) : load(target) + bias);
        }
}

// strip[x] = the sum of values(row, lane) along diagonal x.
static inline void sum_diagonals(const float *values, int64_t count, int64_t vectors, float *strip) {
    const int64_t lanes = vectors * kLanes;
    for (int64_t x = 0; x < count + lanes; x += kLanes) store(strip + x, zero());
    // Rows a vector apart meet the same stretches of the strip: these are summed in a register before they go there.
    for (int64_t shift = 0; shift < smaller(kLanes, count); shift++) {
        const int64_t rows = (count - shift + kLanes - 1) / kLanes;
        for (int64_t stretch = 0; stretch < rows + vectors - 1; stretch++) {
            vfloat total = zero();
            for (int64_t v = larger(0, stretch - rows + 1); v < smaller(vectors, stretch + 1); v++)
                total += load(values + (count - 1 - shift - (stretch - v) * kLanes) * lanes + v * kLanes);
            add_to(strip + shift + stretch * kLanes, total);
        }
    }
}

FASTATTN_NAMESPACE_END
