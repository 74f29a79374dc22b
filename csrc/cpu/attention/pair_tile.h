// bfloat16 operands as words of pairs (../pairs.h), where the processor multiplies pairs (vdpbf16ps): rows of keys, values, queries and output
// gradients in pairs along the head dim, the first two in place; or in pairs along keys or lanes, where these are summed over. Products are exact,
// sums float32. Probabilities and the gradients of scores are rounded to bfloat16, as every kernel that multiplies in bfloat16 rounds them, after
// what else is made of them in float32. With AMX both operands lie in rows of words, to be read 16 rows by 16 words (32 elements) at a time: what does
// not fill such a block is copied, with zeros along k.
#pragma once
#include "../pairs.h"
#include "tile.h"

FASTATTN_NAMESPACE_BEGIN

// Floats of a row of seen_rows(), 0 where there are none.
static inline int64_t seen_width(const fastattn_attention &p) { return multiplies_pairs(p) ? round_up(larger(p.dim_qk, p.dim_v), 2 * kLanes) / 2 : 0; }

#if defined(__AVX512BF16__)

static inline WordsTarget word_rows(float *data, int64_t ld) { return {data, ld, 16 * ld, 16, 0}; }

// words(i, lane) = elements 2i and 2i + 1 of a query; lanes past the last read 0.
static inline void pack_query_words(Rows source, int64_t rows, int64_t columns, float *target, int64_t lanes) {
    pack_words_transposed<1>(source, rows, columns, word_rows(target, lanes), words_of_elements(columns));
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
    const bool fills_blocks = !kWordBlocks || (columns % (2 * kWordDepth) == 0 && count % 16 == 0);
    if (fills_blocks && rows.stride % 2 == 0 && (uintptr_t)rows.data % 4 == 0) return {(const float *)rows.data, rows.stride / 2, Layout::rows, 1};
    const int64_t ld = round_up(columns / 2, kLanes);
    pack_words_in_rows<1>(rows, count, columns, word_rows(scratch, ld), ld);
    return {scratch, ld, Layout::rows, 1};
}

// The same with pairs along a column: words(i, column) = rows 2i and 2i + 1; with AMX its rows are columns.
static inline Left column_words(Rows rows, int64_t count, int64_t columns, float *scratch) {
    if constexpr (kWordBlocks) {
        constexpr int64_t kLd = kKeyBlock / 2;
        pack_words_of_columns<1>(rows, count, columns, word_rows(scratch, kLd), words_of_elements(count));
        return {scratch, kLd, Layout::rows, 1};
    }
    const int64_t ld = round_up(columns, kLanes);
    pack_words_of_row_pairs<1>(rows, count, columns, word_rows(scratch, ld), (count + 1) / 2);
    return {scratch, ld, Layout::columns, 1};
}

// words(i, lane) = the probabilities, or gradients of scores, of keys 2i and 2i + 1; `floats` to a row.
static inline void pack_key_pairs(const float *source, int64_t count, int64_t floats, float *target) {
    for (int64_t key = 0; key < count; key += 2)
        for (int64_t at = 0; at < floats; at += kLanes) {
            const float *low = source + key * floats + at;
            store(target + key / 2 * floats + at, row_pair(load(low), key + 1 < count ? load(low + floats) : zero()));
        }
    for (int64_t word = (count + 1) / 2; word < words_of_elements(count); word++) memset(target + word * floats, 0, (size_t)floats * 4);
}

// words(i, column) = rows 2i and 2i + 1 of the queries or output gradients of a tile, of which the padding lanes are 0.
static inline void pack_lane_words(Rows source, int64_t rows, int64_t columns, int64_t lanes, float *target, int64_t ld) {
    pack_words_of_row_pairs<1>(source, rows, columns, word_rows(target, ld), words_of_elements(lanes));
}

// C(rows, columns) += left right for rows of `lanes` floats, which are rounded, and words of pairs of lanes.
static inline void multiply_lane_words(int64_t rows, int64_t columns, int64_t lanes, const float *left, const float *right, float *target) {
    alignas(64) float words[kKeyBlock * kMaxLanes / 2];
    const int64_t ld = round_up(lanes / 2, kLanes);
    pack_words_in_rows<1>({left, FASTATTN_FLOAT32, lanes}, rows, lanes, word_rows(words, ld), ld);
    if constexpr (kWordBlocks) return multiply_word_rows(rows, columns / kLanes, ld, words, ld, right, columns, target, columns, true);
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

// Where blocks of keys or values are converted: kKeyBlock rows of whole vectors; of seen_width().
struct BlockScratch {
    float *rows, *seen;
};

// Blocks of the keys or values of a head as words, which a thread keeps for its next tiles: those of a head see mostly the same. Only with AMX: all columns
// are transposed, and rows that do not fill its blocks copied.
class WordBlocks {
  public:
    enum Kind { rows, columns };

    static int64_t floats(const fastattn_attention &p, Kind kind, int64_t width) {
        return slots(p, kind, width) * (block_floats(width) + (int64_t)(sizeof(Entry) / 4)) + 2 * 16;
    }
    WordBlocks(const fastattn_attention &p, Kind kind, int64_t width, Pieces &pieces)
        : kind_(kind), width_(width), slots_(slots(p, kind, width)), entries_((Entry *)pieces.take(slots_ * (int64_t)(sizeof(Entry) / 4))),
          words_(pieces.take(slots_ * block_floats(width))) {}
    // Before the first use, once there is memory.
    void clear() { memset(entries_, 0, (size_t)slots_ * sizeof(Entry)); }

    // The words of a block of `source`, the rows of a sequence's head; `scratch` takes what is not kept.
    Left words(const QueryTile &tile, int64_t head, Rows source, const KeyBlock &block, const BlockScratch &scratch) {
        const bool all_seen = block.seen == bits_below(block.count);  // else rows that nobody sees read as 0, in this tile
        if (slots_ == 0 || !all_seen) return convert(seen_rows(source, block, width_, scratch.seen), block.count, scratch.rows);
        const int64_t slot = block.begin / kKeyBlock % slots_;
        const Entry wanted = {tile.batch, head, block.begin, block.count};
        float *kept = words_ + slot * block_floats(width_);
        const Left left = {kept, kind_ == rows ? round_up(width_ / 2, kLanes) : kKeyBlock / 2, Layout::rows, 1};
        if (wanted == entries_[slot]) return left;
        entries_[slot] = wanted;
        return convert(seen_rows(source, block, width_, nullptr), block.count, kept);
    }

  private:
    struct Entry {
        int64_t batch, head, begin, count;
        bool operator==(const Entry &) const = default;
    };
    static constexpr int64_t kFloats = 1 << 18;  // half of a level-2 cache

    static int64_t slots(const fastattn_attention &p, Kind kind, int64_t width) {
        const bool is_used = kWordBlocks && multiplies_pairs(p) && (kind == columns || width % (2 * kWordDepth));
        return is_used ? smaller((p.len_k + kKeyBlock - 1) / kKeyBlock, kFloats / block_floats(width)) : 0;
    }
    static int64_t block_floats(int64_t width) { return kKeyBlock / 2 * round_up(width, 2 * kLanes); }
    Left convert(Rows source, int64_t count, float *target) const {
        return kind_ == rows ? row_words(source, count, width_, target) : column_words(source, count, width_, target);
    }

    Kind kind_;
    int64_t width_, slots_;
    Entry *entries_;
    float *words_;
};

// C(column, lane) (+)= sum over the keys of a block of source(key, column) weights(key, lane).
static inline void multiply_columns(Rows source, const KeyBlock &block, int64_t columns, int64_t vectors, const float *weights, float *scratch, float *c,
                                    bool accumulate, Fetches *fetches = nullptr) {
    const Left left = load_block(source, block, columns, Layout::columns, scratch);
    multiply_lanes(columns, vectors, block.count, left, weights, c, accumulate, fetches);
}

// The same of pairs of keys.
static inline void multiply_column_words(Left words, const KeyBlock &block, int64_t columns, int64_t vectors, const float *weights, float *c,
                                         bool accumulate, Fetches *fetches = nullptr) {
    multiply_lanes(columns, vectors, words_of_elements(block.count), words, weights, c, accumulate, fetches);
}

FASTATTN_NAMESPACE_END
