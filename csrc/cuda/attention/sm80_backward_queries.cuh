// attention backward by queries, on mma.sync: the gradient of q, what the backward by keys needs of each row, and the sinks' terms.
//
// Contract   grad_q = scale ds k with p = softmax(s), the sink in its denominator; dp = dropout'(grad_out v^T); delta = sum over keys of p dp;
//            ds = p (dp - delta) + grad_lse softmax(s), the last one without the sink; with a softcap ds (1 - tanh^2). Tensors as in
//            sm80_forward.cuh; out and lse are forward's. norm and centre, float32 (B,Hq,Sq), are written for sm80_backward_keys.cuh. A query that
//            sees no key gets 0.
// Numerics   With e = exp(s - lse) a row's terms are p = e norm and ds = e (dp norm - centre). From a float32 lse and a rounded out alone, norm = 1
//            and centre = sum(grad_out out) would put errors of their own into p and ds: lse has lost log n where every score is finfo.min, and a
//            rounded out moves delta by more than ds itself where one key has all the weight. So e and e dp are summed over the keys, which gives
//            both exactly. The product with k has by then been taken with the estimates: a wrong norm is a factor of the row, corrected afterwards,
//            and where the estimated centre was off by more than `tolerance` of the block's largest sum |ds| the block walks its keys once more.
//            ds is rounded to T for the product with k; everything else is float32. No atomics: the same bits every run.
// Algorithm  A block owns 64 queries of one head, with their rows of q and grad_out in shared memory, a warp 16 of them with their gradient in
//            registers. It walks over the tiles of 64 keys that the mask does not leave empty, STEP keys at a time, three products each: dp first,
//            while k comes, then s and ds k, while the next v comes. Masks, biases and the order of blocks are forward's.
// Measured   Not run on a GPU yet; checked in emulation.
#pragma once
#include <primitives/launch.cuh>

#include "gradient_block.cuh"

constexpr int BACKWARD_ROWS = 64;  // queries of a block

template <typename T, int DIM, int STEP, bool EXTRAS>
struct Sm80BackwardQueries : GradientBlock<T, DIM, BACKWARD_ROWS, 1, STEP, EXTRAS> {
    static constexpr int ROWS = BACKWARD_ROWS, M = 1;
    using Base = GradientBlock<T, DIM, ROWS, M, STEP, EXTRAS>;
    using Base::b, Base::g, Base::grad_weights, Base::gradient, Base::h, Base::p, Base::rounded, Base::row, Base::s, Base::sequence, Base::warp_row;
    using Base::S_TILES, Base::THREADS, Base::WARPS, Base::DISTANCES;
    using typename Base::Copy, typename Base::Gap, typename Base::KTile, typename Base::QTile, typename Base::Row, typename Base::Walk;
    static constexpr int BLOCKS = !EXTRAS && DIM <= 32 ? 3 : 1;  // on a multiprocessor, at least
    static constexpr int SHARED_BYTES = 2 * (QTile::SIZE + KTile::SIZE) * 2 + Walk::SCRATCH * 4 + 32 + ROWS * (8 + 24) + DISTANCES * 4 +
                                        2 * WARPS * 4;
    static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on devices of compute capability 8.6, 8.9 and 12.0");

    enum { K_HEAD, V_HEAD, ROW_HEAD, GRAD_Q_HEAD };

    // In shared memory between the steps, since the products need the registers. The four lanes that share a row agree on it, sums over all of them
    // and all, and the first of them writes it.
    struct Rows {
        Shared<float> known, sums;  // four of each row and two

        __device__ __forceinline__ Row get(int r) const {
            const Pack<float, 4> a = known.load<4>(4 * r);
            const Pack<float, 2> b = sums.load<2>(2 * r);
            return {a.at[0], a.at[1], a.at[2], b.at[0], b.at[1], a.at[3]};
        }
        __device__ __forceinline__ void set(int r, const Row &row) const {
            sync_warp();  // all four have read what was there
            if (threadIdx.x % 4 == 0) {
                known.store<4>(4 * r, {{row.base, row.norm, row.centre, row.size}});
                sums.store<2>(2 * r, {{row.total, row.moment}});
            }
            sync_warp();
        }
    };

    __device__ __forceinline__ Sm80BackwardQueries(const AttentionGradientParams<T> &params, int entry, int tile)
        : Base(params, entry, tile, static_cast<int>(threadIdx.x) / WARP) {}

    // Scores become ds in their place, by the norm and centre that are known; the sums follow.
    __device__ __forceinline__ void differentiate(const Rows &rows, const uint32_t (&slopes)[M][S_TILES][2]) {
        this->each_row([&](int m, int half) {
            const int at = this->query(m, half) - row;
            Row r = rows.get(at);
            r.total += this->over_lanes(this->exponentiate_row(m, half, r.base));
            const Pack<float, 2> sums = this->differentiate_row(m, half, r, slopes);
            r.moment += this->over_lanes(sums.at[0]), r.size += this->over_lanes(sums.at[1]);
            rows.set(at, r);
        });
    }

    // Sums over the keys become the exact norm and centre; the gradient of the row follows the norm. False where the estimated centres of the block's
    // rows were good enough, or exact already.
    __device__ __forceinline__ bool correct(const Rows &rows, const Shared<float> &gaps, int64_t row_head) {
        Gap gap = {0.0f, 0.0f};
        this->each_row([&](int m, int half) {
            const int at = this->query(m, half) - row;
            rows.set(at, this->correct_row(m, half, rows.get(at), row_head, gap));
        });
        gap = this->template over_warps<WARPS>(gap, gaps, 0, static_cast<int>(threadIdx.x) / WARP, [] { sync_block(); });
        return gap.gap > g.tolerance * gap.greatest;
    }

    // One walk over the keys, from a gradient and sums of zero.
    __device__ __forceinline__ void walk_keys(const Copy &copy, const QTile &q, const QTile &grad_out, const KTile &k, const KTile &v,
                                              const Shared<int> &scratch, const Shared<int64_t> &heads, const Shared<uint64_t> &words,
                                              const Shared<float> &distances, const Rows &rows, uint64_t seed) {
        zero_sums(gradient);
        this->each_row([&](int m, int half) {
            const int at = this->query(m, half) - row;
            const Row r = rows.get(at);
            rows.set(at, {r.base, r.norm, r.centre, 0.0f, 0.0f, 0.0f});
        });
        Walk walk(p.mask, b, h, row, sequence, scratch);
        const auto fetch = [&](const KTile &to, const Strided<const T> &from, bool vectors, int head, int width, const KeyTile &tile, int first) {
            const uint64_t keys = tile.keys >> (copy.row + first);
            copy.load(to, from, vectors, heads.get(head), tile.begin + first, width, tile.keys == ~uint64_t(0), [&](int n) { return keys >> n & 1; });
            copy_async_commit();
        };
        KeyTile tile = walk.next();
        sync_block();
        walk.settle();
        if (tile.begin >= 0) fetch(v, p.v, p.v_vectors, V_HEAD, p.dim_v, tile, 0);
        while (tile.begin >= 0) {
            KeyTile following = tile;
#pragma unroll 1
            for (int first = 0; first < KEYS; first += STEP) {
                copy_async_wait<0>();
                sync_block();  // v has come, and every warp is done with k, words and distances
                fetch(k, p.k, p.k_vectors, K_HEAD, p.dim_qk, tile, first);
                if (first == 0) {
                    walk.tell(tile);
                    this->fill_words(words, walk, tile);
                    if (EXTRAS && p.distance) this->fill_distances(distances, tile.begin);
                }
                multiply_transposed<T, DIM>(grad_weights, grad_out, warp_row, v);
                const bool last = first + STEP == KEYS;
                if (last) following = walk.next();
                copy_async_wait<0>();
                sync_block();  // k, words and distances have come, and every warp is done with v
                if (last) walk.settle();
                if (following.begin >= 0) fetch(v, p.v, p.v_vectors, V_HEAD, p.dim_v, following, last ? 0 : first + STEP);
                multiply_transposed<T, DIM>(s, q, warp_row, k);
                uint32_t slopes[M][S_TILES][2];
                this->prepare(walk, tile.begin, first, words, distances, [&](int m, int n, int half, float low, float high) {
                    slopes[m][n][half] = pack_slopes(low, high);
                });
                if (EXTRAS && p.dropout) this->drop_gradients(seed, tile.begin + first);
                differentiate(rows, slopes);
                round_sums<T>(rounded, s);
                accumulate<T>(gradient, rounded, k);
            }
            tile = following;
        }
    }

    __device__ __forceinline__ void run() {
        if (row >= sequence.len_q) return;
        SharedArena arena;
        const QTile q{arena.take<T>(QTile::SIZE)}, grad_out{arena.take<T>(QTile::SIZE)};
        const KTile k{arena.take<T>(KTile::SIZE)}, v{arena.take<T>(KTile::SIZE)};
        // Where the sequence's rows of this head begin: not in registers, which are few.
        const Shared<int64_t> heads = arena.take<int64_t>(4);
        const Shared<int> scratch = arena.take<int>(Walk::SCRATCH);
        const Shared<uint64_t> words = arena.take<uint64_t>(ROWS);
        const Shared<float> distances = arena.take<float>(DISTANCES), gaps = arena.take<float>(2 * WARPS);
        const Rows rows = {arena.take<float>(4 * ROWS), arena.take<float>(2 * ROWS)};
        const int64_t row_head = lse_head(p, b, h, sequence);
        if (threadIdx.x == 0) {
            const int h_kv = h / p.group;
            heads.set(K_HEAD, p.k.at(b, h_kv, sequence.first_k));
            heads.set(V_HEAD, p.v.at(b, h_kv, sequence.first_k));
            heads.set(ROW_HEAD, row_head);
            heads.set(GRAD_Q_HEAD, g.grad_q.at(b, h, sequence.first_q));
        }
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
        const Copy copy;
        copy.pad(q, p.dim_qk);
        copy.pad(grad_out, p.dim_v);
        copy.pad(k, p.dim_qk);
        copy.pad(v, p.dim_v);
        const bool all = row + ROWS <= sequence.len_q;
        const auto lives = [&](int n) { return row + static_cast<int>(copy.row) + n < sequence.len_q; };
        copy.load(q, p.q, p.q_vectors, p.q.at(b, h, sequence.first_q), row, p.dim_qk, all, lives);
        copy.load(grad_out, g.grad_out, g.grad_out_vectors, g.grad_out.at(b, h, sequence.first_q), row, p.dim_v, all, lives);
        copy_async_commit();
        copy_async_wait<0>();
        sync_block();
        this->each_row([&](int m, int half) {
            const int i = this->query(m, half);
            rows.set(i - row, this->estimate_row(grad_out, row_head, i));
        });
#pragma unroll 1
        for (int again = 0; again < 2; again++) {
            walk_keys(copy, q, grad_out, k, v, scratch, heads, words, distances, rows, seed);
            if (!correct(rows, gaps, heads.get(ROW_HEAD))) break;
        }
        this->each_row([&](int m, int half) { this->write_row(m, half, rows.get(this->query(m, half) - row), heads.get(ROW_HEAD)); });
        store_sums(gradient, q, warp_row, g.grad_q, g.grad_q_vectors, heads.get(GRAD_Q_HEAD), row + warp_row, sequence.len_q, p.dim_qk,
                   [&](int, int, float sum) { return sum * p.scale; });
    }
};

template <typename T, int DIM, int STEP, bool EXTRAS>
__global__ void __launch_bounds__(Sm80BackwardQueries<T, DIM, STEP, EXTRAS>::THREADS, Sm80BackwardQueries<T, DIM, STEP, EXTRAS>::BLOCKS)
    attention_backward_queries_sm80(const __grid_constant__ AttentionGradientParams<T> p) {
    const int entry = static_cast<int>(blockIdx.x) % p.call.entries, tile = p.call.q_tiles - 1 - static_cast<int>(blockIdx.x) / p.call.entries;
    Sm80BackwardQueries<T, DIM, STEP, EXTRAS>(p, entry, tile).run();
}

template <typename T, int DIM, int STEP, bool EXTRAS>
cudaError_t launch_sm80_backward_queries(const fastattn_cuda_attention_gradient &from) {
    using Kernel = Sm80BackwardQueries<T, DIM, STEP, EXTRAS>;
    const AttentionGradientParams<T> p = gradient_params<T>(from, BACKWARD_ROWS);
    const int64_t blocks = static_cast<int64_t>(p.call.q_tiles) * from.call.batch * from.call.heads_q;
    if (!fits(from.call, blocks)) return cudaErrorInvalidValue;
    const Launch how = {"attention_backward_queries_sm80", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES,
                        from.call.stream};
    return launch<Kernel::THREADS>(how, attention_backward_queries_sm80<T, DIM, STEP, EXTRAS>, p);
}
