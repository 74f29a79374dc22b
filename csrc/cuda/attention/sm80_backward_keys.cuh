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

#include "key_block.cuh"

template <typename T, int DIM, int STEP, bool DK, bool DV, bool EXTRAS>
struct Sm80BackwardKeys : KeyBlock<T, DIM, STEP, DK, DV, EXTRAS> {
    static constexpr int WARPS = KEYS / 16, THREADS = WARPS * WARP;
    using Base = KeyBlock<T, DIM, STEP, DK, DV, EXTRAS>;
    using Base::b, Base::begin, Base::g, Base::grad_k, Base::grad_v, Base::grad_weights, Base::h_kv, Base::key, Base::p, Base::s, Base::sequence,
        Base::warp_row;
    using Base::S_TILES, Base::DISTANCES, Base::KEEPS;
    using typename Base::Rows;
    using KTile = Tile<T, KEYS, DIM>;
    using QTile = Tile<T, STEP, DIM>;
    using Copy = TileCopy<T, DIM, THREADS>;
    using Walk = QueryWalk<EXTRAS>;
    static constexpr int SHARED_BYTES = 2 * (KTile::SIZE + QTile::SIZE) * 2 + Walk::SCRATCH * 4 + MASK_BLOCK * (8 + 3 * 4) + KEEPS * 8 +
                                        DISTANCES * 4;
    static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on devices of compute capability 8.6, 8.9 and 12.0");

    uint32_t rounded[1][S_TILES / 2][4];

    __device__ __forceinline__ Sm80BackwardKeys(const AttentionGradientParams<T> &params, int entry, int tile)
        : Base(params, entry, tile * KEYS, static_cast<int>(threadIdx.x) / WARP) {}

    // What the rows hold for a tile, by all threads of the block together.
    __device__ __forceinline__ void fill_rows(const Rows &rows, const Walk &walk, const QueryTile &tile, uint64_t seed) const {
        if (!tile.full || (EXTRAS && p.bias)) walk.fill_words(rows.words, tile);
        for (int r = static_cast<int>(threadIdx.x); r < MASK_BLOCK; r += THREADS)
            this->fill_row(rows, r, this->load_row(tile, r, lse_head(p, b, tile.head, sequence)));
        if constexpr (EXTRAS) {
            if (p.distance) this->template fill_distances<KEYS, THREADS>(rows.distances, tile);
            if (p.dropout) this->template fill_keeps<THREADS>(rows.keeps, tile, begin, seed);
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
        Walk walk(p.mask, g.transpose, b, begin, sequence, scratch);
        walk.start(h_kv * p.group, (h_kv + 1) * p.group, sequence);
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
                this->prepare(tile, first, rows, slopes);
                this->differentiate(first, rows, slopes);
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
