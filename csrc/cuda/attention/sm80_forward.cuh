// attention forward on mma.sync: compute capability 8.0 and, through PTX, everything after it.
//
// Contract   out = softmax(s) v and lse = log sum exp(s), s = softcap(scale q k^T) + bias under the lowered mask, forms A to D, or a dense one;
//            one sink per head in the denominator of out; dropout as common/philox.h has it. q (B,Hq,Sq,D), k (B,Hkv,Skv,D), v (B,Hkv,Skv,Dv) in
//            float16 or bfloat16, any strides, D and Dv up to DIM. A query that sees no key gets 0 and -inf.
// Numerics   s, statistics and sums in float32, exp2 with scale log2(e) folded in; p is rounded to the dtype of v for the second product and
//            summed unrounded. The row maximum is exact, so every p lies in [0, 1].
// Algorithm  A block owns ROWS queries of one head, a warp 16 M of them, with their accumulators in registers. It walks over the tiles of 64 keys
//            that the mask does not leave empty: while S = Q K^T and its softmax run, V is on its way to shared memory, and while O += P V runs, the
//            next K. Full tiles skip the mask code. Blocks are numbered so that the last query tiles, under a causal mask the longest, start
//            first. EXTRAS holds what few calls need (softcap, bias, dropout, dense masks, scale <= 0), out of the way of those that do not.
// Measured   not yet: compiled for sm_80 and sm_90 and run in the emulation, never on a GPU.
#pragma once
#include <cfloat>
#include <cmath>

#include <primitives/launch.cuh>

#include "mask.cuh"
#include "tile.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.69314718055994531f;

template <typename T, int DIM, int ROWS, int M, bool EXTRAS>
struct Sm80Forward {
    static constexpr int WARPS = ROWS / (16 * M), THREADS = WARPS * WARP;
    static constexpr int S_TILES = KEYS / 8, O_TILES = DIM / 8;
    using QTile = Tile<T, ROWS, DIM>;
    using KTile = Tile<T, KEYS, DIM>;
    using Walk = MaskWalk<ROWS, EXTRAS>;
    static constexpr int SHARED_BYTES = (QTile::SIZE + 2 * KTile::SIZE) * 2 + MAX_INTERVALS * 16;

    const AttentionParams<T> &p;
    int b, h, row;        // of the block's first query
    int warp_row;         // of this warp's first query within the block
    float s[M][S_TILES][4], o[M][O_TILES][4];
    float row_max[M][2], row_sum[M][2];  // row_sum: of this thread's columns

    __device__ __forceinline__ Sm80Forward(const AttentionParams<T> &params, int entry, int tile)
        : p(params),
          b(entry / params.heads_q),
          h(entry % params.heads_q),
          row(tile * ROWS),
          warp_row(static_cast<int>(threadIdx.x) / WARP * 16 * M) {}

    // Query (within the sequence) of accumulator half `half` of slab m.
    __device__ __forceinline__ int query(int m, int half) const {
        return row + warp_row + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % WARP / 4;
    }
    // Column of accumulator element e of column tile n.
    static __device__ __forceinline__ int column(int n, int e) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2; }

    __device__ __forceinline__ void score(const QTile &q, const KTile &k) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll
        for (int d = 0; d < DIM; d += 16) {
            uint32_t left[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) q.left_operand(left[m], warp_row + 16 * m, d);
#pragma unroll
            for (int n = 0; n < S_TILES; n += 2) {
                uint32_t right[4];
                k.right_transposed(right, 8 * n, d);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma<T>(s[m][n], left[m], right[0], right[1]);
                    mma<T>(s[m][n + 1], left[m], right[2], right[3]);
                }
            }
        }
    }

    __device__ __forceinline__ float bias_at(int query, int key) const {
        const int64_t at = b * p.bias_stride[0] + h * p.bias_stride[1] + query * p.bias_stride[2] + key * p.bias_stride[3];
        if (p.bias.dtype() == FASTATTN_FLOAT32) return p.bias.floats().get(at);
        const uint32_t bits = p.bias.halves().get(at);
        float value, unused;
        if (p.bias.dtype() == FASTATTN_BFLOAT16)
            unpack_pair<bfloat16>(bits, value, unused);
        else
            unpack_pair<float16>(bits, value, unused);
        return value;
    }

    // Raw products become exponents of 2: scaled, capped, biased. Only elements that the word lets through are biased.
    __device__ __forceinline__ float exponent(float raw, int query, int key, bool seen) const {
        float x = raw * p.scale;
        if (p.softcap != 0.0f) x = p.softcap * tanhf(x / p.softcap);
        x *= LOG2E;
        if (p.bias && seen) {
            const float bias = bias_at(query, key);
            float add = bias * LOG2E;
            // A finite bias stays finite: only -inf hides.
            if (fabsf(bias) <= FLT_MAX && fabsf(add) > FLT_MAX) add = bias < 0.0f ? -FLT_MAX : FLT_MAX;
            x += add;
        }
        return x;
    }

    // Hides what this warp's queries do not see; with EXTRAS also turns products into exponents.
    __device__ __forceinline__ void prepare(const Walk &walk, const KeyTile &tile) {
        if (!EXTRAS && tile.full) return;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half);
                const uint64_t word = (tile.full ? ~uint64_t(0) : walk.visible(tile, i)) & (i < p.len_q ? ~uint64_t(0) : 0);
#pragma unroll
                for (int n = 0; n < S_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[m][n][2 * half + e];
                        bool seen = word >> column(n, e) & 1;
                        if constexpr (EXTRAS) {
                            const int key = tile.begin + column(n, e);
                            if (seen && walk.has_dense_rows()) seen = walk.dense_sees(i, key);
                            x = exponent(x, i, key, seen);
                        }
                        if (!seen) x = -INFINITY;
                    }
            }
    }

    // p = 2^(s - max) in place of s; the sums and what is accumulated so far follow the new maximum.
    __device__ __forceinline__ void soften() {
        const float to_log2 = EXTRAS ? 1.0f : p.scale * LOG2E;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float greatest = row_max[m][half];
#pragma unroll
                for (int n = 0; n < S_TILES; n++) greatest = fmaxf(greatest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                greatest = fmaxf(greatest, shuffle_xor(greatest, 1));
                greatest = fmaxf(greatest, shuffle_xor(greatest, 2));
                const float base = greatest == -INFINITY ? 0.0f : greatest * to_log2;
                const float shrink = exp2_fast(row_max[m][half] * to_log2 - base);
                row_max[m][half] = greatest;
                float sum = row_sum[m][half] * shrink;
#pragma unroll
                for (int n = 0; n < S_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[m][n][2 * half + e];
                        x = exp2_fast(fmaf(x, to_log2, -base));
                        sum += x;
                    }
                row_sum[m][half] = sum;
#pragma unroll
                for (int n = 0; n < O_TILES; n++) {
                    o[m][n][2 * half] *= shrink;
                    o[m][n][2 * half + 1] *= shrink;
                }
            }
    }

    // Zeroes what is dropped; the scale of what is kept comes at the end. One call of the generator serves a thread's eight elements of 32 keys.
    __device__ __forceinline__ void drop_out(uint64_t seed, int first_key) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int group = 0; group < KEYS / 32; group++) {
                    const uint32_t pair = static_cast<uint32_t>(4 * (first_key / 32 + group) + static_cast<int>(threadIdx.x) % 4);
                    const Random drawn = philox(seed, static_cast<uint32_t>(query(m, half)), pair, static_cast<uint32_t>(b * p.heads_q + h));
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        float(&x)[4] = s[m][4 * group + w];
                        if ((drawn.word[w] & 0xFFFF) < p.dropout.threshold) x[2 * half] = 0.0f;
                        if ((drawn.word[w] >> 16) < p.dropout.threshold) x[2 * half + 1] = 0.0f;
                    }
                }
    }

    __device__ __forceinline__ void accumulate(const KTile &v) {
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            uint32_t left[M][4];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&x)[4] = s[m][key / 8 + i / 2];
                    left[m][i] = pack_pair<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
                }
#pragma unroll
            for (int n = 0; n < O_TILES; n += 2) {
                uint32_t right[4];
                v.right_operand(right, key, 8 * n);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma<T>(o[m][n], left[m], right[0], right[1]);
                    mma<T>(o[m][n + 1], left[m], right[2], right[3]);
                }
            }
        }
    }

    // Normalises and writes lse and out, the latter through this warp's rows of the tile of q, which nobody else reads.
    __device__ __forceinline__ void finish(const QTile &q) {
        const float to_log2 = EXTRAS ? 1.0f : p.scale * LOG2E;
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        sync_warp();
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = row_sum[m][half];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const bool sees = !(sum == 0.0f);  // the greatest p is 1, and NaN is not hidden
                const float base = row_max[m][half] * to_log2;
                const int i = query(m, half);
                if (lane % 4 == 0 && i < p.len_q) {
                    // Scores at the end of float32's range were clamped there in units of log 2.
                    const float lse = fabsf(base) == FLT_MAX ? base : (base + log2f(sum)) * LN2;
                    p.lse.set((static_cast<int64_t>(b) * p.heads_q + h) * p.len_q + i, sees ? lse : -INFINITY);
                }
                float factor = sees ? 1.0f / sum : 0.0f;
                if (p.sinks && sees) {
                    const float sink = p.sinks.get(h) * LOG2E, top = fmaxf(base, sink), shrink = exp2f(base - top);
                    factor = shrink / (sum * shrink + exp2f(sink - top));
                }
                if (EXTRAS && p.dropout) factor *= p.dropout.keep_scale;
                const int at = (i - row) * QTile::STRIDE;
#pragma unroll
                for (int n = 0; n < O_TILES; n++) {
                    const uint32_t pair = pack_pair<T>(sees ? o[m][n][2 * half] * factor : 0.0f, sees ? o[m][n][2 * half + 1] * factor : 0.0f);
                    q.data.template as<uint32_t>().set((at + column(n, 0)) / 2, pair);
                }
            }
        sync_warp();
        for (int i = lane; i < 16 * M * QTile::CHUNKS; i += WARP) {
            const int r = warp_row + i / QTile::CHUNKS, first = i % QTile::CHUNKS * 8;
            if (row + r >= p.len_q || first >= p.dim_v) continue;
            const Pack<T, 8> chunk = q.data.template load<8>(r * QTile::STRIDE + first);
            const int64_t at = p.out.at(b, h, row + r) + first;
            if (p.out_vectors) {
                p.out.data.template store<8>(at, chunk);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (first + j < p.dim_v) p.out.data.set(at + j, chunk.at[j]);
            }
        }
    }

    __device__ __forceinline__ void run() {
        SharedArena arena;
        const QTile q{arena.take<T>(QTile::SIZE)};
        const KTile k{arena.take<T>(KTile::SIZE)}, v{arena.take<T>(KTile::SIZE)};
        Walk walk(p.mask, b, h, row, p.len_q, p.len_k, arena.take<int>(4 * MAX_INTERVALS));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_max[m][half] = -INFINITY;
                row_sum[m][half] = 0.0f;
            }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < O_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[m][n][e] = 0.0f;
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
        const int64_t k_head = p.k.at(b, h / p.group, 0), v_head = p.v.at(b, h / p.group, 0);
        q.template load<THREADS>(p.q, p.q_vectors, p.q.at(b, h, 0), row, p.dim_qk, [&](int r) { return row + r < p.len_q; });
        for (bool first = true;; first = false) {
            const KeyTile tile = walk.next();
            if (tile.begin >= 0)
                k.template load<THREADS>(p.k, p.k_vectors, k_head, tile.begin, p.dim_qk, [&](int r) { return tile.keys >> r & 1; });
            copy_async_commit();
            if (!first) accumulate(v);
            copy_async_wait<0>();
            if (tile.begin < 0) {
                if (first) sync_block();  // the tile of q, which finish() writes, is no longer being filled
                break;
            }
            sync_block();  // k has come, and every warp is done with the v before
            v.template load<THREADS>(p.v, p.v_vectors, v_head, tile.begin, p.dim_v, [&](int r) { return tile.keys >> r & 1; });
            copy_async_commit();
            score(q, k);
            prepare(walk, tile);
            soften();
            if (EXTRAS && p.dropout) drop_out(seed, tile.begin);
            copy_async_wait<0>();
            sync_block();  // v has come, and every warp is done with k
        }
        finish(q);
    }
};

template <typename T, int DIM, int ROWS, int M, bool EXTRAS>
__global__ void __launch_bounds__(Sm80Forward<T, DIM, ROWS, M, EXTRAS>::THREADS, 1) attention_forward_sm80(const __grid_constant__ AttentionParams<T> p) {
    const int entry = static_cast<int>(blockIdx.x) % p.entries, tile = p.q_tiles - 1 - static_cast<int>(blockIdx.x) / p.entries;
    Sm80Forward<T, DIM, ROWS, M, EXTRAS>(p, entry, tile).run();
}

template <typename T, int DIM, int ROWS, int M, bool EXTRAS>
cudaError_t launch_sm80_forward(const fastattn_cuda_attention &call) {
    using Kernel = Sm80Forward<T, DIM, ROWS, M, EXTRAS>;
    const AttentionParams<T> p = attention_params<T>(call, ROWS);
    const int64_t blocks = static_cast<int64_t>(p.q_tiles) * call.batch * call.heads_q;
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    const Launch how = {"attention_forward_sm80", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES, call.stream};
    return launch<Kernel::THREADS>(how, attention_forward_sm80<T, DIM, ROWS, M, EXTRAS>, p);
}
