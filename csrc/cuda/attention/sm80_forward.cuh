// attention forward on mma.sync: compute capability 8.0 and, through PTX, everything after it.
//
// Contract   out = softmax(s) v and lse = log sum exp(s), s = softcap(scale q k^T) + biases under the lowered mask, forms A to D, or a dense one;
//            one sink per head in the denominator of out; dropout as common/philox.h has it. q (B,Hq,Sq,D), k (B,Hkv,Skv,D), v (B,Hkv,Skv,Dv) in
//            float16 or bfloat16, any strides, D and Dv up to DIM, or the rows of a packed batch. A query that sees no key gets 0 and -inf.
// Numerics   s, statistics and sums in float32, exp2 with scale log2(e) folded in; p is rounded to the dtype of v for the second product and
//            summed unrounded. p = 2^(s - base) with a base at most 8 below the row's maximum, so every p lies in [0, 256].
// Algorithm  A block owns ROWS queries of one head, a warp 16 M of them, with their accumulators in registers. It walks over the tiles of 64 keys
//            that the mask does not leave empty: while S = Q K^T and its softmax run, V is on its way to shared memory, and while O += P V runs, the
//            next K. Full tiles skip the mask code. Blocks are numbered so that the last query tiles, under a causal mask the longest, start
//            first. A bias of distance has ROWS + 63 values in a tile: they are worked out once per tile, in shared memory. EXTRAS holds what few
//            calls need (softcap, biases, dropout, dense masks, scale <= 0), out of the way of those that do not.
// Measured   H100 80GB HBM3, bf16, 16,384 tokens a call (bench/results/nvidia-h100-80gb-hbm3-2026-11-26/kernels.json), TFLOP/s of ours before and
//            after the last two steps / torch's FlashAttention-2 in the same run, full at 2,048 and 8,192 positions, causal likewise:
//            d64   273 274 / 297   290 299 / 306   causal 252 252 / 262   299 299 / 294
//            d128  309 321 / 344   316 326 / 342   causal 283 289 / 284   335 346 / 320
//            d80 at 4,096   199 251 / 267   causal 188 230 / 233     d256   281 301 / 320   causal 283 299 / 286
//            The steps: accumulators follow a new base only where it is far below (up to 5%); narrower rows are copied without a branch per chunk.
//            Triton's kernel, on wgmma, runs at 430 to 450 there and is preferred on Hopper. Not timed since it shares its tiles with backward; as
//            many blocks fit a multiprocessor as before.
#pragma once
#include <primitives/launch.cuh>

#include "forward_block.cuh"

template <typename T, int DIM, int ROWS, int M, bool EXTRAS>
struct Sm80Forward : ForwardBlock<T, DIM, ROWS, M, KEYS, EXTRAS> {
    using Base = ForwardBlock<T, DIM, ROWS, M, KEYS, EXTRAS>;
    using Base::b, Base::h, Base::o, Base::p, Base::rounded, Base::row, Base::s, Base::sequence, Base::warp_row;
    using Base::THREADS, Base::DISTANCES;
    using typename Base::Copy, typename Base::KTile, typename Base::QTile, typename Base::Statistics, typename Base::Walk;
    // Small heads leave registers for a third block on a multiprocessor: more warps to compute while others wait.
    static constexpr int BLOCKS = !EXTRAS && DIM <= 64 ? 3 : 1;
    // Threads that share the bases of their rows: four, or for want of registers none.
    static constexpr int SHARING = M == 1 ? 4 : 1, BASES = THREADS / SHARING * 2 * M;
    static constexpr int SHARED_BYTES = (QTile::SIZE + 2 * KTile::SIZE) * 2 + Walk::SCRATCH * 4 + 32 + ROWS * 8 + BASES * 4 +
                                        THREADS * M * 8 + DISTANCES * 4;
    static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on devices of compute capability 8.6, 8.9 and 12.0");

    enum { K_HEAD, V_HEAD, OUT_HEAD, LSE_HEAD };

    __device__ __forceinline__ Sm80Forward(const AttentionParams<T> &params, int entry, int tile)
        : Base(params, entry, tile, static_cast<int>(threadIdx.x) / WARP) {}

    // Where the bases of this thread's rows of slab m lie in shared memory, and the sums of its part of them: the products need their registers.
    static __device__ __forceinline__ int bases_at(int m) { return (static_cast<int>(threadIdx.x) / SHARING * M + m) * 2; }
    static __device__ __forceinline__ int sums_at(int m) { return (static_cast<int>(threadIdx.x) * M + m) * 2; }

    // Scores become p; the sums and what is accumulated so far follow where a row's base moves.
    __device__ __forceinline__ void soften(const Shared<float> &bases, const Shared<float> &sums) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            Pack<float, 2> row_base = bases.template load<2>(bases_at(m)), row_sum = sums.template load<2>(sums_at(m));
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Statistics of_row = {row_base.at[half], row_sum.at[half]};
                shrink[half] = this->soften_row(m, half, of_row);
                row_base.at[half] = of_row.base, row_sum.at[half] = of_row.sum;
            }
            this->shrink_sums(m, shrink);
            if (threadIdx.x % SHARING == 0) bases.template store<2>(bases_at(m), row_base);
            sums.template store<2>(sums_at(m), row_sum);
        }
    }

    __device__ __forceinline__ void run() {
        if (p.packed.cu_q) {
            if (row == 0) this->clear_unowned();
            if (row >= sequence.len_q) return;
        }
        SharedArena arena;
        const QTile q{arena.take<T>(QTile::SIZE)};
        const KTile k{arena.take<T>(KTile::SIZE)}, v{arena.take<T>(KTile::SIZE)};
        // Where the sequence's rows of this head begin: not in registers, which are few.
        const Shared<int64_t> heads = arena.take<int64_t>(4);
        if (threadIdx.x == 0) {
            const int h_kv = h / p.group;
            heads.set(K_HEAD, p.k.at(b, h_kv, sequence.first_k));
            heads.set(V_HEAD, p.v.at(b, h_kv, sequence.first_k));
            heads.set(OUT_HEAD, p.out.at(b, h, sequence.first_q));
            heads.set(LSE_HEAD, lse_head(p, b, h, sequence));
        }
        Walk walk(p.mask, b, h, row, sequence, arena.take<int>(Walk::SCRATCH));
        const Shared<uint64_t> words = arena.take<uint64_t>(ROWS);
        const Shared<float> bases = arena.take<float>(BASES), sums = arena.take<float>(THREADS * 2 * M), distances = arena.take<float>(DISTANCES);
        Pack<float, 2 * M> none;
#pragma unroll
        for (float &x : none.at) x = -INFINITY;
        if (threadIdx.x % SHARING == 0) bases.template store<2 * M>(static_cast<int>(threadIdx.x) / SHARING * 2 * M, none);
        sums.template store<2 * M>(static_cast<int>(threadIdx.x) * 2 * M, {});
        zero_sums(o);
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
        const Copy copy;
        copy.pad(q, p.dim_qk);
        copy.pad(k, p.dim_qk);
        copy.pad(v, p.dim_v);
        copy.load(q, p.q, p.q_vectors, p.q.at(b, h, sequence.first_q), row, p.dim_qk, row + ROWS <= sequence.len_q,
                  [&](int n) { return row + static_cast<int>(copy.row) + n < sequence.len_q; });
        for (;;) {
            const KeyTile tile = walk.next();
            const uint64_t keys = tile.keys >> copy.row;
            const bool all = tile.keys == ~uint64_t(0);
            const auto lives = [&](int n) { return keys >> n & 1; };
            if (tile.begin >= 0) {
                copy.load(k, p.k, p.k_vectors, heads.get(K_HEAD), tile.begin, p.dim_qk, all, lives);
                walk.tell(tile);
                this->fill_words(words, walk, tile);
                if (EXTRAS && p.distance) this->fill_distances(distances, tile.begin);
            }
            copy_async_commit();
            if (walk.begun()) accumulate<T>(o, rounded, v);
            copy_async_wait<0>();
            if (tile.begin < 0) {
                if (!walk.begun()) sync_block();  // the tile of q, which finish() writes, is no longer being filled
                break;
            }
            sync_block();  // k, words and distances have come, and every warp is done with the v before
            walk.settle();
            copy.load(v, p.v, p.v_vectors, heads.get(V_HEAD), tile.begin, p.dim_v, all, lives);
            copy_async_commit();
            multiply_transposed<T, DIM>(s, q, warp_row, k);
            this->prepare(walk, tile.begin, 0, words, distances, [](int, int, int, float, float) {});
            soften(bases, sums);
            if (EXTRAS && p.dropout) this->drop_out(s, seed, tile.begin);
            round_sums<T>(rounded, s);
            copy_async_wait<0>();
            sync_block();  // v has come, and every warp is done with k, words and distances
        }
        this->finish(q, heads.get(OUT_HEAD), heads.get(LSE_HEAD),
                     [&](int m, int half) { return Statistics{bases.get(bases_at(m) + half), sums.get(sums_at(m) + half)}; });
    }
};

template <typename T, int DIM, int ROWS, int M, bool EXTRAS>
__global__ void __launch_bounds__(Sm80Forward<T, DIM, ROWS, M, EXTRAS>::THREADS, Sm80Forward<T, DIM, ROWS, M, EXTRAS>::BLOCKS)
    attention_forward_sm80(const __grid_constant__ AttentionParams<T> p) {
    const int entry = static_cast<int>(blockIdx.x) % p.entries, tile = p.q_tiles - 1 - static_cast<int>(blockIdx.x) / p.entries;
    Sm80Forward<T, DIM, ROWS, M, EXTRAS>(p, entry, tile).run();
}

template <typename T, int DIM, int ROWS, int M, bool EXTRAS>
cudaError_t launch_sm80_forward(const fastattn_cuda_attention &call) {
    using Kernel = Sm80Forward<T, DIM, ROWS, M, EXTRAS>;
    const AttentionParams<T> p = attention_params<T>(call, ROWS);
    const int64_t blocks = static_cast<int64_t>(p.q_tiles) * call.batch * call.heads_q;
    if (!fits(call, blocks)) return cudaErrorInvalidValue;
    const Launch how = {"attention_forward_sm80", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES, call.stream};
    return launch<Kernel::THREADS>(how, attention_forward_sm80<T, DIM, ROWS, M, EXTRAS>, p);
}
