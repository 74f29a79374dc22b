// attention backward by keys, on mma.sync: the gradients of k and v.
//
// Contract   grad_v = dropout(p)^T grad_out and grad_k = scale ds^T q, summed over the queries of all heads of a group; p and ds as in
//            sm80_backward_queries.cuh, which has run before and left norm and centre. Every key of a sequence gets a gradient, 0 where nobody sees
//            it.
// Numerics   p and ds are rounded to T for the products with grad_out and q; everything else is float32. Sums have a fixed order: head after head,
//            tile after tile.
// Algorithm  A block owns 64 keys of one head of keys, a warp 16 of them with their gradients in registers, and walks over the tiles of 64 queries
//            that see them, head after head of the group (query_walk.cuh), STEP queries at a time. Products are transposed, keys x queries, so that
//            p and ds are left operands as they stand: dp first, while q comes, then s and p grad_out, and ds q while the next grad_out comes. What
//            each query has (its word of the mask, its kept keys, lse, norm and centre) is laid out in shared memory, a thread for a query. Wide
//            heads have registers for one of the two gradients at a time: then DK and DV are two launches.
// Measured   Not run on a GPU yet; checked in emulation.
#pragma once
#include <primitives/launch.cuh>

#include "gradient_params.cuh"
#include "products.cuh"
#include "scores.cuh"

template <typename T, int DIM, int STEP, bool DK, bool DV, bool EXTRAS>
struct Sm80BackwardKeys {
    static constexpr int WARPS = KEYS / 16, THREADS = WARPS * WARP;
    static constexpr int S_TILES = STEP / 8, O_TILES = DIM / 8;
    static constexpr int DISTANCES = EXTRAS ? KEYS + MASK_BLOCK : 0, KEEPS = EXTRAS ? MASK_BLOCK : 0;
    using KTile = Tile<T, KEYS, DIM>;
    using QTile = Tile<T, STEP, DIM>;
    using Copy = TileCopy<T, DIM, THREADS>;
    using Walk = QueryWalk<EXTRAS>;
    static constexpr int SHARED_BYTES = 2 * (KTile::SIZE + QTile::SIZE) * 2 + Walk::SCRATCH * 4 + MASK_BLOCK * (8 + 3 * 4) + KEEPS * 8 +
                                        DISTANCES * 4;
    static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on devices of compute capability 8.6, 8.9 and 12.0");

    // What the queries of a tile have, one after the other.
    struct Rows {
        Shared<uint64_t> words, keeps;      // which of the block's keys each sees, and which of them dropout keeps
        Shared<float> base, norm, centre;   // as in Sm80BackwardQueries
        Shared<float> distances;            // the bias of key j and query i, within their tiles, at j - i + 63
    };

    const AttentionGradientParams<T> &g;
    const AttentionParams<T> &p;
    int b, h_kv, begin;  // the block's first key
    int warp_row;        // this warp's first key within the block
    Sequence sequence;
    float s[1][S_TILES][4], grad_weights[1][S_TILES][4];  // the latter dp
    uint32_t rounded[1][S_TILES / 2][4];
    float grad_k[1][DK ? O_TILES : 1][4], grad_v[1][DV ? O_TILES : 1][4];

    __device__ __forceinline__ Sm80BackwardKeys(const AttentionGradientParams<T> &params, int entry, int tile)
        : g(params),
          p(params.call),
          b(entry / (params.call.heads_q / params.call.group)),
          h_kv(entry % (params.call.heads_q / params.call.group)),
          begin(tile * KEYS),
          warp_row(static_cast<int>(threadIdx.x) / WARP * 16),
          sequence(sequence_of(params.call, b)) {}

    // Key, within the block, of accumulator half `half`.
    __device__ __forceinline__ int key(int half) const { return warp_row + 8 * half + static_cast<int>(threadIdx.x) % WARP / 4; }

    // What the rows hold for a tile, by all threads of the block together.
    __device__ __forceinline__ void fill_rows(const Rows &rows, const Walk &walk, const QueryTile &tile, uint64_t seed) const {
        if (!tile.full || (EXTRAS && p.bias)) walk.fill_words(rows.words, tile);
        for (int r = static_cast<int>(threadIdx.x); r < MASK_BLOCK; r += THREADS) {
            const int i = tile.begin + r;
            const int64_t at = lse_head(p, b, tile.head, sequence) + i;
            const bool exists = i < sequence.len_q;
            const float lse = exists ? p.lse.get(at) : -INFINITY;
            rows.base.set(r, lse == -INFINITY ? INFINITY : EXTRAS ? lse : lse * LOG2E);  // infinity makes every e 0
            rows.norm.set(r, exists ? g.norm.get(at) : 0.0f);
            rows.centre.set(r, exists ? g.centre.get(at) : 0.0f);
        }
        if constexpr (EXTRAS) {
            if (p.distance)
                fill_distance_biases<KEYS + MASK_BLOCK - 1, THREADS>(rows.distances, p.distance, b, tile.head,
                                                                     begin - tile.begin - (MASK_BLOCK - 1) - sequence.distance_shift);
            if (p.dropout) fill_keeps(rows.keeps.template as<uint32_t>(), tile, seed);
        }
    }

    // Which keys dropout keeps, 32 of a query by each thread: one call of the generator decides about eight of them.
    __device__ __forceinline__ void fill_keeps(const Shared<uint32_t> &keeps, const QueryTile &tile, uint64_t seed) const {
        for (int i = static_cast<int>(threadIdx.x); i < 2 * MASK_BLOCK; i += THREADS) {
            uint32_t word = 0;
            for (int pair = 0; pair < 4; pair++) {
                const Random drawn = philox(seed, static_cast<uint32_t>(tile.begin + i / 2), static_cast<uint32_t>(4 * (begin / 32 + i % 2) + pair),
                                            static_cast<uint32_t>(b * p.heads_q + tile.head));
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    word |= static_cast<uint32_t>((drawn.word[w] & 0xFFFF) >= p.dropout.threshold) << (8 * w + 2 * pair);
                    word |= static_cast<uint32_t>((drawn.word[w] >> 16) >= p.dropout.threshold) << (8 * w + 2 * pair + 1);
                }
            }
            keeps.set(i, word);
        }
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
        const float to_log2 = EXTRAS ? LOG2E : p.scale * LOG2E;
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
                    // 2^(s - base); the difference first where scores may be so large that log2 e times them is not finite
                    const float power = exp2_fast(EXTRAS ? (x - base.at[e]) * to_log2 : fmaf(x, to_log2, -base.at[e]));
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

    __device__ __forceinline__ void run() {
        if (begin >= sequence.len_k) return;
        SharedArena arena;
        const KTile k{arena.take<T>(KTile::SIZE)}, v{arena.take<T>(KTile::SIZE)};
        const QTile q{arena.take<T>(QTile::SIZE)}, grad_out{arena.take<T>(QTile::SIZE)};
        const Shared<int> scratch = arena.take<int>(Walk::SCRATCH);
        const Rows rows = {arena.take<uint64_t>(MASK_BLOCK), arena.take<uint64_t>(KEEPS),      arena.take<float>(MASK_BLOCK),
                           arena.take<float>(MASK_BLOCK),    arena.take<float>(MASK_BLOCK), arena.take<float>(DISTANCES)};
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
        Walk walk(p.mask, g.transpose, b, h_kv * p.group, (h_kv + 1) * p.group, begin, sequence, scratch);
        zero_sums(grad_k), zero_sums(grad_v);
        const Copy copy;
        copy.pad(k, p.dim_qk);
        copy.pad(v, p.dim_v);
        copy.pad(q, p.dim_qk);
        copy.pad(grad_out, p.dim_v);
        const uint64_t keys = walk.keys();
        const auto lives = [&](int n) { return keys >> (copy.row + n) & 1; };
        copy.load(k, p.k, p.k_vectors, p.k.at(b, h_kv, sequence.first_k), begin, p.dim_qk, keys == ~uint64_t(0), lives);
        if (DK) copy.load(v, p.v, p.v_vectors, p.v.at(b, h_kv, sequence.first_k), begin, p.dim_v, keys == ~uint64_t(0), lives);
        copy_async_commit();
        const auto fetch = [&](const QTile &to, const Strided<const T> &from, bool vectors, int width, const QueryTile &tile, int first) {
            const int row = tile.begin + first;
            copy.load(to, from, vectors, from.at(b, tile.head, sequence.first_q), row, width, row + STEP <= sequence.len_q,
                      [&](int n) { return row + static_cast<int>(copy.row) + n < sequence.len_q; });
            copy_async_commit();
        };
        QueryTile tile = walk.next();
        sync_block();
        walk.settle();
        if (tile.begin >= 0) fetch(grad_out, g.grad_out, g.grad_out_vectors, p.dim_v, tile, 0);
        while (tile.begin >= 0) {
            QueryTile following = tile;
#pragma unroll 1
            for (int first = 0; first < MASK_BLOCK; first += STEP) {
                copy_async_wait<0>();
                sync_block();  // grad_out has come, and every warp is done with q and the rows
                fetch(q, p.q, p.q_vectors, p.dim_qk, tile, first);
                if (first == 0) fill_rows(rows, walk, tile, seed);
                if (DK) multiply_transposed<T, DIM>(grad_weights, v, warp_row, grad_out);
                const bool last = first + STEP == MASK_BLOCK;
                if (last) following = walk.next();
                copy_async_wait<0>();
                sync_block();  // q and the rows have come
                if (last) walk.settle();
                multiply_transposed<T, DIM>(s, k, warp_row, q);
                uint32_t slopes[S_TILES][2];
                prepare(tile, first, rows, slopes);
                differentiate(first, rows, slopes);
                if constexpr (DV) {
                    round_sums<T>(rounded, s);
                    accumulate<T>(grad_v, rounded, grad_out);
                }
                sync_block();  // every warp is done with grad_out
                if (following.begin >= 0) fetch(grad_out, g.grad_out, g.grad_out_vectors, p.dim_v, following, last ? 0 : first + STEP);
                if constexpr (DK) {
                    round_sums<T>(rounded, grad_weights);
                    accumulate<T>(grad_k, rounded, q);
                }
            }
            tile = following;
        }
        copy_async_wait<0>();
        sync_block();  // the tiles of k and v, through which the gradients are written, are no longer being filled
        if constexpr (DK)
            store_sums(grad_k, k, warp_row, g.grad_k, g.grad_k_vectors, g.grad_k.at(b, h_kv, sequence.first_k), begin + warp_row, sequence.len_k,
                       p.dim_qk, [&](int, int, float sum) { return sum * p.scale; });
        if constexpr (DV)
            store_sums(grad_v, v, warp_row, g.grad_v, g.grad_v_vectors, g.grad_v.at(b, h_kv, sequence.first_k), begin + warp_row, sequence.len_k,
                       p.dim_v, [](int, int, float sum) { return sum; });
    }
};

template <typename T, int DIM, int STEP, bool DK, bool DV, bool EXTRAS>
__global__ void __launch_bounds__(Sm80BackwardKeys<T, DIM, STEP, DK, DV, EXTRAS>::THREADS, 1)
    attention_backward_keys_sm80(const __grid_constant__ AttentionGradientParams<T> p) {
    const int entry = static_cast<int>(blockIdx.x) % p.key_entries, tile = static_cast<int>(blockIdx.x) / p.key_entries;
    Sm80BackwardKeys<T, DIM, STEP, DK, DV, EXTRAS>(p, entry, tile).run();
}

template <typename T, int DIM, int STEP, bool DK, bool DV, bool EXTRAS>
cudaError_t launch_sm80_backward_keys(const fastattn_cuda_attention_gradient &from) {
    using Kernel = Sm80BackwardKeys<T, DIM, STEP, DK, DV, EXTRAS>;
    const AttentionGradientParams<T> p = gradient_params<T>(from, MASK_BLOCK);
    const int64_t blocks = static_cast<int64_t>(p.k_tiles) * from.call.batch * from.call.heads_kv;
    if (!fits(from.call, blocks)) return cudaErrorInvalidValue;
    const Launch how = {"attention_backward_keys_sm80", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES,
                        from.call.stream};
    return launch<Kernel::THREADS>(how, attention_backward_keys_sm80<T, DIM, STEP, DK, DV, EXTRAS>, p);
}
