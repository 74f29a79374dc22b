// What the kernels of the backward by keys share: a block owns keys of one head of keys, a warp 16 of a tile of 64, and walks over STEP queries at a
// time. Products are transposed, keys x queries. EXTRAS holds what few calls need, as in query_block.cuh.
#pragma once
#include "gradient_params.cuh"
#include "products.cuh"
#include "scores.cuh"

// DK, DV: which of the two gradients.
template <typename T, int DIM, int STEP, bool DK, bool DV, bool EXTRAS>
struct KeyBlock {
    static constexpr int S_TILES = STEP / 8, O_TILES = DIM / 8;
    static constexpr int DISTANCES = EXTRAS ? KEYS + MASK_BLOCK : 0, KEEPS = EXTRAS ? MASK_BLOCK : 0;  // of one tile of keys

    // What the queries of a tile have, one after the other.
    struct Rows {
        Shared<uint64_t> words, keeps;      // which of the block's keys each sees, and which of them dropout keeps
        Shared<float> base, norm, centre;   // as in GradientBlock
        Shared<float> distances;            // the bias of key j and query i, within their tiles, at j - i + 63
    };

    struct RowOf {
        float lse, norm, centre;
    };

    const AttentionGradientParams<T> &g;
    const AttentionParams<T> &p;
    int b, h_kv, begin;  // the first key of the tile
    int warp_row;        // this warp's first key within the tile
    Sequence sequence;
    float s[1][S_TILES][4], grad_weights[1][S_TILES][4];  // the latter dp
    float grad_k[1][DK ? O_TILES : 1][4], grad_v[1][DV ? O_TILES : 1][4];

    // warp: the number of this one among those that have keys of the tile.
    __device__ __forceinline__ KeyBlock(const AttentionGradientParams<T> &params, int entry, int begin_, int warp)
        : g(params),
          p(params.call),
          b(entry / (params.call.heads_q / params.call.group)),
          h_kv(entry % (params.call.heads_q / params.call.group)),
          begin(begin_),
          warp_row(warp * 16),
          sequence(sequence_of(params.call, b)) {}

    // Key, within the tile, of accumulator half `half`.
    __device__ __forceinline__ int key(int half) const { return warp_row + 8 * half + static_cast<int>(threadIdx.x) % WARP / 4; }

    // What query r of a tile has, and where that goes. row_head: where lse of the sequence's rows of the tile's head begins.
    __device__ __forceinline__ RowOf load_row(const QueryTile &tile, int r, int64_t row_head) const {
        const int i = tile.begin + r;
        const int64_t at = row_head + i;
        const bool exists = i < sequence.len_q;
        return {exists ? p.lse.get(at) : -INFINITY, exists ? g.norm.get(at) : 0.0f, exists ? g.centre.get(at) : 0.0f};
    }
    __device__ __forceinline__ void fill_row(const Rows &rows, int r, const RowOf &row) const {
        rows.base.set(r, row.lse == -INFINITY ? INFINITY : EXTRAS ? row.lse : row.lse * LOG2E);  // infinity makes every e 0
        rows.norm.set(r, row.norm);
        rows.centre.set(r, row.centre);
    }

    // The biases between COUNT keys from `begin` on and the tile's queries, by the first TEAM threads.
    template <int COUNT, int TEAM>
    __device__ __forceinline__ void fill_distances(const Shared<float> &distances, const QueryTile &tile) const {
        fill_distance_biases<COUNT + MASK_BLOCK - 1, TEAM>(distances, p.distance, b, tile.head,
                                                           begin - tile.begin - (MASK_BLOCK - 1) - sequence.distance_shift);
    }

    // Which of 64 keys from first_key on dropout keeps, 32 of a query by each of the first TEAM threads: one call of the generator decides about
    // eight.
    template <int TEAM>
    __device__ __forceinline__ void fill_keeps(const Shared<uint64_t> &keeps, const QueryTile &tile, int first_key, uint64_t seed) const {
        for (int i = static_cast<int>(threadIdx.x); i < 2 * MASK_BLOCK; i += TEAM) {
            uint32_t word = 0;
            for (int pair = 0; pair < 4; pair++) {
                const Random drawn = philox(seed, static_cast<uint32_t>(tile.begin + i / 2),
                                            static_cast<uint32_t>(4 * (first_key / 32 + i % 2) + pair),
                                            static_cast<uint32_t>(b * p.heads_q + tile.head));
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    word |= static_cast<uint32_t>((drawn.word[w] & 0xFFFF) >= p.dropout.threshold) << (8 * w + 2 * pair);
                    word |= static_cast<uint32_t>((drawn.word[w] >> 16) >= p.dropout.threshold) << (8 * w + 2 * pair + 1);
                }
            }
            keeps.template as<uint32_t>().set(i, word);
        }
    }

    // e of a score, 2^(s - base); the difference first where scores may be so large that log2 e times them is not finite.
    __device__ __forceinline__ float power(float x, float base) const {
        const float to_log2 = EXTRAS ? LOG2E : p.scale * LOG2E;
        return exp2_fast(EXTRAS ? (x - base) * to_log2 : fmaf(x, to_log2, -base));
    }

    // Products of keys with queries [first, first + STEP) of a tile become scores, as QueryBlock::prepare makes them.
    __device__ __forceinline__ void prepare(const QueryTile &tile, int first, const Rows &rows, uint32_t (&slopes)[S_TILES][2]) {
        if constexpr (EXTRAS) {
            const float factor = p.softcap != 0.0f ? p.scale / p.softcap : p.scale;
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &low = s[0][n][2 * half], &high = s[0][n][2 * half + 1];
                    low *= factor, high *= factor;
                    if (p.softcap != 0.0f) {
                        low = tanhf(low), high = tanhf(high);
                        slopes[n][half] = pack_slopes(low, high);
                        low *= p.softcap, high *= p.softcap;
                    }
                    if (p.distance) {
                        const int at = key(half) - first - sum_column(n, 0) + MASK_BLOCK - 1;
                        const float low_bias = rows.distances.get(at), high_bias = rows.distances.get(at - 1);
                        low = sum_of(low, low_bias, low_bias), high = sum_of(high, high_bias, high_bias);
                    }
                }
        }
        if (tile.full && !(EXTRAS && p.bias)) return;
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int i = first + sum_column(n, e);
                const uint64_t word = rows.words.get(i) >> key(0);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &x = s[0][n][2 * half + e];
                    const bool seen = word >> (8 * half) & 1;
                    if (EXTRAS && seen && p.bias) {
                        const float bias = dense_bias(p, b, tile.head, tile.begin + i, begin + key(half));
                        x = sum_of(x, bias, bias);
                    }
                    if (!seen) x = -INFINITY;
                }
            }
    }

    // p in place of s, behind dropout, and ds in place of dp.
    __device__ __forceinline__ void differentiate(int first, const Rows &rows, const uint32_t (&slopes)[S_TILES][2]) {
#pragma unroll
        for (int n = 0; n < S_TILES; n++) {
            const int at = first + sum_column(n, 0);
            const Pack<float, 2> base = rows.base.template load<2>(at), norm = rows.norm.template load<2>(at);
            const Pack<float, 2> centre = rows.centre.template load<2>(at);
            uint64_t kept[2] = {~uint64_t(0), ~uint64_t(0)};
            if (EXTRAS && p.dropout) kept[0] = rows.keeps.get(at) >> key(0), kept[1] = rows.keeps.get(at + 1) >> key(0);
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[0][n][2 * half + e], &dp = grad_weights[0][n][2 * half + e];
                    const float power = this->power(x, base.at[e]);
                    float factor = 1.0f;
                    if (EXTRAS && p.dropout) factor = kept[e] >> (8 * half) & 1 ? p.dropout.keep_scale : 0.0f;
                    x = power * norm.at[e];
                    if (EXTRAS && p.dropout) x *= factor;
                    if (!DK) continue;
                    if (EXTRAS && p.dropout) dp *= factor;
                    dp = power * fmaf(dp, norm.at[e], -centre.at[e]);
                }
                if (DK && EXTRAS && p.softcap != 0.0f)
                    bend_gradients(grad_weights[0][n][2 * half], grad_weights[0][n][2 * half + 1], slopes[n][half]);
            }
        }
    }
};
