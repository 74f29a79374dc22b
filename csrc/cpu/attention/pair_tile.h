// bfloat16 operands as words of pairs (../pairs.h), where the processor multiplies pairs (vdpbf16ps): rows of keys, values, queries and output
// gradients in pairs along the head dim, the first two in place; or in pairs along keys or lanes, where these are summed over. Products are exact,
// sums float32. Probabilities and the gradients of scores are rounded to bfloat16, as every kernel that multiplies in bfloat16 rounds them, after
// what else is made of them in float32.
#pragma once
#include "../pairs.h"
#include "tile.h"

FASTATTN_NAMESPACE_BEGIN

// Not with AMX, whose words lie in blocks.
static inline bool multiplies_pairs(const fastattn_attention &p) {
    return kBfloat16Parts > 0 && !kWordBlocks && p.dtype == FASTATTN_BFLOAT16 && p.dim_qk % 2 == 0;
}

// Floats of a row of seen_rows(), 0 where there are none.
static inline int64_t seen_width(const fastattn_attention &p) { return multiplies_pairs(p) ? round_up(larger(p.dim_qk, p.dim_v), 2 * kLanes) / 2 : 0; }

#if defined(__AVX512BF16__)

static inline WordsTarget word_rows(float *data, int64_t ld) { return {data, ld, 16 * ld, 16, 0}; }

// words(i, lane) = elements 2i and 2i + 1 of a query; lanes past the last read 0.
static inline void pack_query_words(Rows source, int64_t rows, int64_t columns, float *target, int64_t lanes) {
    pack_words_transposed<1>(source, rows, columns, word_rows(target, lanes), columns / 2);
}

// The rows of a block of K or V, in place, or copied with zeros for those that no query of the tile sees.
static inline Rows seen_rows(Rows source, const KeyBlock &block, int64_t columns, float *scratch) {
    const Rows rows{source.at(block.begin, 0), source.dtype, source.stride};
    if (block.seen == bits_below(block.count)) return rows;
    const Rows copy{scratch, source.dtype, round_up(columns, 2 * kLanes)};
    for (int64_t row = 0; row < block.count; row++) {
        void *target = (void *)copy.at(row, 0);
        if (block.seen >> row & 1) memcpy(target, rows.at(row, 0), (size_t)columns * 2);
        else memset(target, 0, (size_t)columns * 2);
    }
    return copy;
}

// Keys or values for the micro-kernel, a row of pairs each: in place where pairs are whole words.
static inline Left row_words(Rows rows, int64_t count, int64_t columns, float *scratch) {
    if (rows.stride % 2 == 0 && (uintptr_t)rows.data % 4 == 0) return {(const float *)rows.data, rows.stride / 2, Layout::rows, 1};
    const int64_t ld = round_up(columns / 2, kLanes);
    pack_words_in_rows<1>(rows, count, columns, word_rows(scratch, ld), ld);
    return {scratch, ld, Layout::rows, 1};
}

// The same with pairs along a column: words(i, column) = rows 2i and 2i + 1.
static inline Left column_words(Rows rows, int64_t count, int64_t columns, float *scratch) {
    const int64_t ld = round_up(columns, kLanes);
    pack_words_of_row_pairs<1>(rows, count, columns, word_rows(scratch, ld), (count + 1) / 2);
    return {scratch, ld, Layout::columns, 1};
}

// words(i, lane) = the probabilities, or gradients of scores, of keys 2i and 2i + 1; `floats` to a row.
static inline void pack_key_pairs(const float *source, int64_t count, int64_t floats, float *target) {
    for (int64_t key = 0; key < count; key += 2)
        for (int64_t at = 0; at < floats; at += kLanes) {
            const vuint low = narrow(load(source + key * floats + at));
            const vuint high = key + 1 < count ? narrow(load(source + (key + 1) * floats + at)) : vuint{};
            store(target + key / 2 * floats + at, (vfloat)(low | high << 16));
        }
}

// words(i, column) = rows 2i and 2i + 1 of the queries or output gradients of a tile, of which the padding lanes are 0.
static inline void pack_lane_words(Rows source, int64_t rows, int64_t columns, int64_t lanes, float *target, int64_t ld) {
    pack_words_of_row_pairs<1>(source, rows, columns, word_rows(target, ld), lanes / 2);
}

// C(rows, columns) += left right for rows of `lanes` floats, which are rounded, and words of pairs of lanes.
static inline void multiply_lane_words(int64_t rows, int64_t columns, int64_t lanes, const float *left, const float *right, float *target) {
    alignas(64) float words[kKeyBlock * kMaxLanes / 2];
    const int64_t ld = round_up(lanes / 2, kLanes);
    pack_words_in_rows<1>({left, FASTATTN_FLOAT32, lanes}, rows, lanes, word_rows(words, ld), ld);
    multiply(rows, columns / kLanes, lanes / 2, {words, ld, Layout::rows, 1}, right, columns, target, columns, true);
}

#else

static inline void pack_query_words(Rows, int64_t, int64_t, float *, int64_t) {}
static inline Rows seen_rows(Rows source, const KeyBlock &, int64_t, float *) { return source; }
static inline Left row_words(Rows, int64_t, int64_t, float *) { return {}; }
static inline Left column_words(Rows, int64_t, int64_t, float *) { return {}; }
static inline void pack_key_pairs(const float *, int64_t, int64_t, float *) {}
static inline void pack_lane_words(Rows, int64_t, int64_t, int64_t, float *, int64_t) {}
static inline void multiply_lane_words(int64_t, int64_t, int64_t, const float *, const float *, float *) {}

#endif

// Where blocks of keys or values are converted: kKeyBlock rows of whole vectors; of seen_width(); and kKeyBlock x lanes.
struct BlockScratch {
    float *rows, *seen, *pairs;
};

// The rows of a block as the left operand of scores, of pairs or float32.
static inline Left load_rows(bool pairs, Rows source, const KeyBlock &block, int64_t columns, const BlockScratch &scratch) {
    if (pairs) return row_words(seen_rows(source, block, columns, scratch.seen), block.count, columns, scratch.rows);
    return load_block(source, block, columns, Layout::rows, scratch.rows);
}

// C(column, lane) (+)= sum over the keys of a block of source(key, column) weights(key, lane).
static inline void multiply_columns(bool pairs, Rows source, const KeyBlock &block, int64_t columns, int64_t vectors, const float *weights,
                                    const BlockScratch &scratch, float *c, bool accumulate, Fetches *fetches = nullptr) {
    if (!pairs) {
        const Left left = load_block(source, block, columns, Layout::columns, scratch.rows);
        return multiply_lanes(columns, vectors, block.count, left, weights, c, accumulate, fetches);
    }
    const Left left = column_words(seen_rows(source, block, columns, scratch.seen), block.count, columns, scratch.rows);
    pack_key_pairs(weights, block.count, vectors * kLanes, scratch.pairs);
    multiply_lanes(columns, vectors, (block.count + 1) / 2, left, scratch.pairs, c, accumulate, fetches);
}

FASTATTN_NAMESPACE_END
