// Products of a block of a bfloat16 cache by the matrix unit (AMX), for several queries to a head of keys: by vectors each query costs about as much as
// reading the keys.
//
// Keys and values go into the level-1 cache at the pace of memory, values as words of two keys, then by tiles: scores^T = K Q^T with 16 queries to a
// tile, out += P V. The columns of `out` lie as interleave() leaves them, up to put_in_order().
#pragma once
#include "../pairs.h"
#include "decode_block.h"

FASTATTN_NAMESPACE_BEGIN

class DecodeTiles {
  public:
    static constexpr bool kAreThere = kWordBlocks;
    static constexpr int64_t kTile = 16, kColumns = 64;  // of keys, and of values, that go to the cache between products
    static constexpr int kLevel2 = 2;                    // which takes more lines at once, as many as arrive during a product
    static int64_t held(int64_t queries) { return round_up(queries, kLanes); }
    static int64_t width(int64_t dim) { return round_up(dim, 2 * kLanes); }
    static int64_t floats(int64_t queries, int64_t dim_qk, int64_t dim_v) {
        return (held(queries) + kBlock) * width(dim_qk) / 2 + kBlock * held(queries) + kBlock / 2 * width(dim_v);
    }

    DecodeTiles(int64_t queries, int64_t dim_qk, int64_t dim_v, float *memory)
        : count_(queries),
          held_(held(queries)),
          words_(width(dim_qk) / 2),
          width_v_(width(dim_v)),
          queries_(memory),
          keys_(queries_ + held_ * words_),
          products_(keys_ + kBlock * words_),
          values_(products_ + kBlock * held_) {}

#if defined(__AMX_BF16__)
    // The queries in rows of words, as copy_rows() leaves them.
    void take_queries(const float *rows) {
        for (int64_t first = 0; first < held_; first += kLanes)
            for (int64_t word = 0; word < words_; word += kLanes) {
                vfloat block[kLanes];
                for (int r = 0; r < kLanes; r++) block[r] = first + r < count_ ? load(rows + (first + r) * words_ + word) : zero();
                store_transposed(block, queries_ + word * held_ + first, held_);
            }
    }

    // scores(query, key) = factor q . k, kBlock floats to a query.
    void form_scores(const BlockRows &rows, int64_t dim, float factor, NextRows &shared_ahead, float *scores) {
        NextRows ahead = shared_ahead;  // in registers
        for (int64_t first = 0; first < kBlock; first += kTile) {
            for (int64_t key = first; key < first + kTile; key++) {
                for (int64_t c = 0; c < dim; c += 2 * kLanes) store(keys_ + key * words_ + c / 2, words(rows.row[key], c, dim));
                ahead.read<kLevel2>(dim * 2);
            }
            multiply_word_rows(kTile, held_ / kLanes, words_, keys_ + first * words_, words_, queries_, held_, products_ + first * held_, held_, false);
        }
        shared_ahead = ahead;
        for (int64_t first = 0; first < held_; first += kLanes)
            for (int64_t key = 0; key < kBlock; key += kLanes) {
                vfloat block[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; i++) block[i] = load(products_ + (key + i) * held_ + first) * factor;
                store_transposed(block, scores + first * kBlock + key, kBlock);
            }
    }

    // out(query) += sum over the block of p(query, key) v(key); `probabilities` are words of two keys, kBlock floats to a query.
    void add_values(const float *probabilities, const BlockRows &rows, int64_t dim, NextRows &shared_ahead, float *out) {
        NextRows ahead = shared_ahead;  // in registers
        for (int64_t begin = 0; begin < dim; begin += kColumns) {
            const int64_t end = smaller(begin + kColumns, round_up(dim, 2 * kLanes));
            for (int64_t pair = 0; pair < kBlock / 2; pair++) {
                for (int64_t c = begin; c < end; c += 2 * kLanes) {
                    vfloat low, high;
                    interleave(words(rows.row[2 * pair], c, dim), words(rows.row[2 * pair + 1], c, dim), low, high);
                    store(values_ + pair * width_v_ + c, low);
                    store(values_ + pair * width_v_ + c + kLanes, high);
                }
                ahead.read<kLevel2>(4 * (end - begin));
            }
            multiply_word_rows(held_, (end - begin) / kLanes, kBlock / 2, probabilities, kBlock, values_ + begin, width_v_, out + begin, width_v_, true);
        }
        shared_ahead = ahead;
    }

  private:
    static vfloat words(const char *row, int64_t c, int64_t dim) { return load_words(row + c * 2, (int)smaller(2 * kLanes, dim - c)); }
#else
    void take_queries(const float *) {}
    void form_scores(const BlockRows &, int64_t, float, NextRows &, float *) {}
    void add_values(const float *, const BlockRows &, int64_t, NextRows &, float *) {}

  private:
#endif
    int64_t count_, held_, words_, width_v_;
    float *queries_, *keys_, *products_, *values_;
};

FASTATTN_NAMESPACE_END
