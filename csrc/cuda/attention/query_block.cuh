// What forward and the backward by queries share: a block owns ROWS queries of one head, a warp 16 M of them, and walks over STEP keys at a time.
// EXTRAS holds what few calls need (softcap, biases, dropout, dense masks, scale <= 0), out of the way of those that do not.
#pragma once
#include <cmath>

#include "mask.cuh"
#include "products.cuh"
#include "scores.cuh"

template <typename T, int DIM, int ROWS, int M, int STEP, bool EXTRAS>
struct QueryBlock {
    static constexpr int WARPS = ROWS / (16 * M), THREADS = WARPS * WARP;
    static constexpr int S_TILES = STEP / 8, O_TILES = DIM / 8;
    static constexpr int PART_TILES = STEP < KEYS ? S_TILES : KEYS / 8;  // of the scores of one tile of keys, or of the part of it that is a step
    static constexpr int DISTANCES = EXTRAS ? ROWS + KEYS : 0;
    using QTile = Tile<T, ROWS, DIM>;
    using KTile = Tile<T, STEP, DIM>;
    using Copy = TileCopy<T, DIM, THREADS>;
    using Walk = MaskWalk<ROWS, EXTRAS>;

    const AttentionParams<T> &p;
    int b, h, row;        // of the block's first query
    int warp_row;         // of this warp's first query within the block
    Sequence sequence;
    float s[M][S_TILES][4];

    // warp: the number of this one among those that have queries.
    __device__ __forceinline__ QueryBlock(const AttentionParams<T> &params, int entry, int tile, int warp)
        : p(params),
          b(entry / params.heads_q),
          h(entry % params.heads_q),
          row(tile * ROWS),
          warp_row(warp * 16 * M),
          sequence(sequence_of(params, b)) {}

    // Query (within the sequence) of accumulator half `half` of slab m.
    __device__ __forceinline__ int query(int m, int half) const {
        return row + warp_row + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % WARP / 4;
    }

    // The biases of the distances between the block's queries and a tile's keys: of key j and query i at j - i + ROWS - 1. By the first TEAM threads.
    template <int TEAM = THREADS>
    __device__ __forceinline__ void fill_distances(const Shared<float> &distances, int first_key) const {
        fill_distance_biases<ROWS + KEYS - 1, TEAM>(distances, p.distance, b, h, first_key - row - (ROWS - 1) - sequence.distance_shift);
    }

    // What each query of the block sees of a tile, a thread for a query, by the first TEAM threads; only where somebody asks.
    template <int TEAM = THREADS, typename SomeWalk>
    __device__ __forceinline__ void fill_words(const Shared<uint64_t> &words, const SomeWalk &walk, const KeyTile &tile) const {
        if (tile.full && !(EXTRAS && p.bias)) return;
        for (int i = static_cast<int>(threadIdx.x); i < ROWS; i += TEAM) words.set(i, walk.visible(tile, row + i));
    }

    // Products with the keys of one tile, column tiles [FIRST, FIRST + PART_TILES) of s, become scores, capped and biased, and what this warp's
    // queries do not see becomes -inf. Without EXTRAS the scale waits for exp2, and a full tile is left alone. Scores stay in natural units, in which a
    // finite bias is finite: times log2 e it may not be.
    // view: of the mask on the tile; begin: its first key; first: the number within it of the first key of a step. note_bend(m, n, half, low, high)
    // is told tanh of capped scores, in pairs.
    template <int FIRST = 0, typename View, typename NoteBend>
    __device__ __forceinline__ void prepare(const View &view, int begin, int first, const Shared<uint64_t> &words, const Shared<float> &distances,
                                            const NoteBend &note_bend) {
        if constexpr (EXTRAS) {
            const float factor = p.softcap != 0.0f ? p.scale / p.softcap : p.scale;
            each<FIRST>([&](float &x, int, int, int) { x *= factor; });
            if (p.softcap != 0.0f) bend<FIRST>(note_bend);
            if (p.distance)
                each<FIRST>([&](float &x, int m, int half, int column) {
                    const float bias = distances.get(first + column + row - query(m, half) + ROWS - 1);
                    x = sum_of(x, bias, bias);
                });
        }
        if (view.is_full() && !(EXTRAS && p.bias)) return;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half);
                // Bit 8 n + e: whether the query sees element e of column tile n.
                const uint64_t word = words.get(i - row) >> (first + sum_column(0, 0));
#pragma unroll
                for (int n = 0; n < PART_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[m][FIRST + n][2 * half + e];
                        bool seen = word >> (8 * n + e) & 1;
                        if constexpr (EXTRAS) {
                            const int key = begin + first + sum_column(n, e);
                            if (seen && view.has_dense_rows()) seen = view.dense_sees(i, key);
                            if (seen && p.bias) {
                                const float bias = dense_bias(p, b, h, i, key);
                                x = sum_of(x, bias, bias);
                            }
                        }
                        if (!seen) x = -INFINITY;
                    }
            }
    }

    // Calls f(score, m, half, column) for each of this thread's scores of a tile.
    template <int FIRST, typename F>
    __device__ __forceinline__ void each(const F &f) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < PART_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) f(s[m][FIRST + n][e], m, e / 2, sum_column(n, e));
    }

    // Zeroes what is dropped; the scale of what is kept is left to the caller. One call of the generator serves a thread's eight elements of 32
    // keys, of which first_key is the first.
    __device__ __forceinline__ void drop_out(float (&x)[M][S_TILES][4], uint64_t seed, int first_key) const {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int group = 0; group < STEP / 32; group++) {
                    const uint32_t pair = static_cast<uint32_t>(4 * (first_key / 32 + group) + static_cast<int>(threadIdx.x) % 4);
                    const Random drawn = philox(seed, static_cast<uint32_t>(query(m, half)), pair, static_cast<uint32_t>(b * p.heads_q + h));
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        float(&four)[4] = x[m][4 * group + w];
                        if ((drawn.word[w] & 0xFFFF) < p.dropout.threshold) four[2 * half] = 0.0f;
                        if ((drawn.word[w] >> 16) < p.dropout.threshold) four[2 * half + 1] = 0.0f;
                    }
                }
    }

private:
    template <int FIRST, typename NoteBend>
    __device__ __forceinline__ void bend(const NoteBend &note_bend) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < PART_TILES; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &low = s[m][FIRST + n][2 * half], &high = s[m][FIRST + n][2 * half + 1];
                    low = tanhf(low), high = tanhf(high);
                    note_bend(m, n, half, low, high);
                    low *= p.softcap, high *= p.softcap;
                }
    }
};
