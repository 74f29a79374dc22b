// attention backward by queries, on wgmma: compute capability 9.0 alone.
//
// Contract   That of sm80_backward_queries.cuh, for head dims up to 128. What it leaves for the backward by keys is the same for both kernels there.
// Numerics   Those of sm80_backward_queries.cuh. Whether the estimated centres were good enough each 64 queries of a block decide for themselves; if
//            some were not, the block walks once more.
// Algorithm  A block owns 128 queries of one head, with their rows of q and grad_out in shared memory, and has three warpgroups. The first walks over
//            the tiles of 64 keys that the mask does not leave empty, as in sm90_forward.cuh, into rings for k and v. A step is one tile, or two of
//            narrow heads. The other warpgroups have 64 queries each, with their gradient in registers. Of a step they issue S = Q K^T, then dQ +=
//            dS K of the step before and dP = dO V^T; e of the scores is worked out while dP runs, ds once it has. (The wait for S is one for dQ
//            too: ptxas counts each product as a group. Waiting for S alone takes a dQ in every step, also the first, and registers that EXTRAS
//            of wide heads lacks.) They issue by turns, so that one works out e and ds while the other multiplies.
// Measured   Not run on a GPU yet; checked in emulation. No spills; a step of full tiles takes a warp 417 instructions, of two tiles of narrow heads
//            639, where the products of both warpgroups take the tensor cores 1,536 cycles at their peak.
#pragma once
#include <primitives/launch.cuh>

#include "block_order.cuh"
#include "gradient_block.cuh"
#include "key_steps.cuh"
#include "ring.cuh"

constexpr int GRADIENT_STAGES = 4;  // k of a step is read until ds of the next is worked out

template <typename T, int DIM, bool EXTRAS, int TILES>
using GradientSteps =
    KeySteps<T, DIM, 2 * 64, EXTRAS, GradientBlock<T, DIM, 2 * 64, 1, TILES * KEYS, EXTRAS>, TILES, GRADIENT_STAGES>;

template <typename T, int DIM, bool EXTRAS, int TILES>
struct Sm90BackwardQueries : GradientSteps<T, DIM, EXTRAS, TILES> {
    static constexpr int CONSUMERS = 2, ROWS = CONSUMERS * 64, STAGES = GRADIENT_STAGES;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    // Of a thread: 168 are given out at launch, and no more than those can be shared out again.
    static constexpr int PRODUCER_REGISTERS = EXTRAS ? 72 : 56, CONSUMER_REGISTERS = EXTRAS ? 216 : 224;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * (65536 / THREADS / 8 * 8));
    static constexpr int AHEAD = 2;  // copies under way beside the one that is waited for
    using Base = GradientSteps<T, DIM, EXTRAS, TILES>;
    using Base::b, Base::fetch, Base::g, Base::grad_weights, Base::gradient, Base::h, Base::p, Base::rounded, Base::row, Base::s, Base::sequence,
        Base::warp_row, Base::write_note;
    using Base::S_TILES;
    using typename Base::Copy, typename Base::Gap, typename Base::Keys, typename Base::KTile, typename Base::Note, typename Base::Notes,
        typename Base::QTile, typename Base::Row, typename Base::Walk;
    enum { K, V };  // rings; the note of a step goes with its place for k
    enum { ROW_HEAD, GRAD_Q_HEAD };
    // Named barriers from here on: turns of the consumers, then those at which each meets itself.
    enum { TURN = 2, GROUP = TURN + CONSUMERS };

    static constexpr int SUMS = 6;  // of a thread
    static constexpr int SHARED_BYTES = (2 * QTile::SIZE + 2 * STAGES * KTile::SIZE) * 2 + Rings<STAGES>::BARRIERS * 8 +
                                        (Walk::SCRATCH * 4 + 15) / 16 * 16 + Notes::BYTES + (4 * ROWS + SUMS * THREADS + 2 * ROWS / 16) * 4 + 16;
    static_assert(SHARED_BYTES <= 227 * 1024);

    struct Memory {
        QTile q, grad_out;
        Shared<T> tiles;  // the places of k, then those of v
        Rings<STAGES> rings;
        Shared<int> scratch;
        Notes notes;
        // What the loop has no registers for: base, norm and centre of each row, sums of each thread, where the rows of the head begin in lse and in
        // the gradient. gaps: room for over_warps().
        Shared<float> known, sums, gaps;
        Shared<int64_t> heads;

        __device__ __forceinline__ explicit Memory(SharedArena<1024> &arena)
            : q{arena.take<T>(QTile::SIZE)},
              grad_out{arena.take<T>(QTile::SIZE)},
              tiles(arena.take<T>(2 * STAGES * KTile::SIZE)),
              rings(arena.take<uint64_t>(Rings<STAGES>::BARRIERS)),
              scratch(arena.take<int>(Walk::SCRATCH)),
              notes(arena),
              known(arena.take<float>(4 * ROWS)),
              sums(arena.take<float>(SUMS * THREADS)),
              gaps(arena.take<float>(2 * ROWS / 16)),
              heads(arena.take<int64_t>(2)) {}

        __device__ __forceinline__ KTile k(int step) const { return {tiles.from(step % STAGES * KTile::SIZE)}; }
        __device__ __forceinline__ KTile v(int step) const { return {tiles.from((STAGES + step % STAGES) * KTile::SIZE)}; }
    };

    __device__ __forceinline__ Sm90BackwardQueries(const AttentionGradientParams<T> &params, int entry, int tile)
        // The same for all lanes, which the compiler does not see otherwise: what follows from it then takes no registers of threads.
        : Base(params, entry, tile, shuffle(static_cast<int>(threadIdx.x) / WARP, 0) - WARPGROUP / WARP) {}

    // --- The first warpgroup: walks, copies, notes ----------------------------------------------------------------------------------------

    __device__ __forceinline__ void produce(const Memory &memory) const {
        const Copy copy;
        const int64_t k_head = p.k.at(b, h / p.group, sequence.first_k), v_head = p.v.at(b, h / p.group, sequence.first_k);
        copy.pad(memory.q, p.dim_qk);
        copy.pad(memory.grad_out, p.dim_v);
        for (int stage = 0; stage < STAGES; stage++) {
            copy.pad(memory.k(stage), p.dim_qk);
            copy.pad(memory.v(stage), p.dim_v);
        }
        const bool all = row + ROWS <= sequence.len_q;
        const auto lives = [&](int n) { return row + static_cast<int>(copy.row) + n < sequence.len_q; };
        // With the first k and v.
        copy.load(memory.q, p.q, p.q_vectors, p.q.at(b, h, sequence.first_q), row, p.dim_qk, all, lives);
        copy.load(memory.grad_out, g.grad_out, g.grad_out_vectors, g.grad_out.at(b, h, sequence.first_q), row, p.dim_v, all, lives);
        RingFiller<STAGES, AHEAD> filler(memory.rings);
        int step = 0;
#pragma unroll 1
        for (int walks = 0; walks < 2; walks++) {
            Walk walk(p.mask, b, h, row, sequence, memory.scratch);
            bool exists = true;
#pragma unroll 1
            for (; exists; step++) {
                KeyTile tiles[TILES];
                Keys keys[TILES];
                this->next(walk, tiles, keys);
                exists = tiles[0].begin >= 0;
                filler.begin();
                if (exists) fetch(copy, memory.k(step), p.k, p.k_vectors, k_head, p.dim_qk, keys);
                write_note(memory.notes, step, walk, tiles);
                filler.end();
                filler.begin();
                if (exists) fetch(copy, memory.v(step), p.v, p.v_vectors, v_head, p.dim_v, keys);
                filler.end();
            }
            filler.tell_all();
            if (!sync_block_or(false)) return;
        }
    }

    // --- The others: products, ds and what follows from its sums --------------------------------------------------------------------------

    __device__ __forceinline__ void issue_scores(const Memory &memory, int group, int step) {
        issue_transposed(s[0], memory.q, 64 * group, memory.k(step));
        wgmma_commit();
    }
    __device__ __forceinline__ void issue_weights(const Memory &memory, int group, int step) {
        issue_transposed(grad_weights[0], memory.grad_out, 64 * group, memory.v(step));
        wgmma_commit();
    }

    // What is known of this thread's rows. The four lanes that share a row agree on it, and the first of them writes it.
    __device__ __forceinline__ Row known_row(const Memory &memory, int half) const {
        const Pack<float, 4> known = memory.known.template load<4>(4 * (this->query(0, half) - row));
        return {known.at[0], known.at[1], known.at[2], 0.0f, 0.0f, 0.0f};
    }
    __device__ __forceinline__ void keep_row(const Memory &memory, int half, const Row &r) const {
        sync_warp();  // all four have read what was there
        if (threadIdx.x % 4 == 0) memory.known.template store<4>(4 * (this->query(0, half) - row), {{r.base, r.norm, r.centre, 0.0f}});
        sync_warp();
    }

    // This lane's part of the sums over the keys, of e, e dp and |ds|, of both of its rows.
    enum { TOTAL = 0, MOMENT = 2, SIZE = 4 };
    static __device__ __forceinline__ int sums_at(int sum) { return sum * THREADS + static_cast<int>(threadIdx.x) * 2; }
    static __device__ __forceinline__ void add_sums(const Memory &memory, int sum, const float (&of_step)[2]) {
        const Pack<float, 2> before = memory.sums.template load<2>(sums_at(sum));
        memory.sums.template store<2>(sums_at(sum), {{before.at[0] + of_step[0], before.at[1] + of_step[1]}});
    }

    // Scores and dp of a step, under way, become ds, rounded for the product with k; the rows' sums follow.
    __device__ __forceinline__ void differentiate(const Memory &memory, int step, uint64_t seed) {
        uint32_t slopes[1][S_TILES][2];
        const Note note = this->prepare_step(memory.notes, step, [&](int m, int n, int half, float low, float high) {
            slopes[m][n][half] = pack_slopes(low, high);
        });
        static_assert(!EXTRAS || TILES == 1);
        float total[2], moment[2], size[2];
#pragma unroll
        for (int half = 0; half < 2; half++) total[half] = this->exponentiate_row(0, half, known_row(memory, half).base);
        add_sums(memory, TOTAL, total);
        // Before the products are waited for, not after: see sm90_forward.cuh.
        memory.rings.wait_full(K, step + 1);
        wgmma_wait<0>(grad_weights[0]);
        memory.rings.release(V, step);
        if (EXTRAS && p.dropout) this->drop_gradients(seed, note.at[Base::FIRST_KEY]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Pack<float, 2> found = this->differentiate_row(0, half, known_row(memory, half), slopes);
            moment[half] = found.at[0], size[half] = found.at[1];
        }
        add_sums(memory, MOMENT, moment);
        add_sums(memory, SIZE, size);
        round_sums<T>(rounded, s);
    }

    // One walk over the keys, from step `step` on, from a gradient of zero. Returns the step with which the next walk would begin.
    __device__ __forceinline__ int walk_keys(const Memory &memory, int group, int step, uint64_t seed) {
        const int first = step;
        for (int sum = 0; sum < SUMS; sum += 2) memory.sums.template store<2>(sums_at(sum), {});
        zero_sums(gradient);
        memory.rings.wait_full(K, first);
        if (first == 0 && memory.notes.exists(first)) {
            memory.rings.wait_full(V, first);
#pragma unroll
            for (int half = 0; half < 2; half++)
                keep_row(memory, half, this->estimate_row(memory.grad_out, memory.heads.get(ROW_HEAD), this->query(0, half)));
        }
#pragma unroll 1
        for (; memory.notes.exists(step); step++) {
            sync_named(TURN + group, CONSUMERS * WARPGROUP);
            issue_scores(memory, group, step);
            if (step > first) issue_sums(gradient[0], rounded[0], memory.k(step - 1));
            memory.rings.wait_full(V, step);
            issue_weights(memory, group, step);
            arrive_named(TURN + (group ^ 1), CONSUMERS * WARPGROUP);
            wgmma_wait<1>(s[0]);
            differentiate(memory, step, seed);
            if (step > first) memory.rings.release(K, step - 1);
        }
        if (step > first) {
            issue_sums(gradient[0], rounded[0], memory.k(step - 1));
            wgmma_commit();
            wgmma_wait<0>(gradient[0]);
            memory.rings.release(K, step - 1);
        }
        memory.rings.release(K, step);
        memory.rings.wait_full(V, step);
        memory.rings.release(V, step);
        return step + 1;
    }

    // The sums of a walk become the exact norm and centre, which the gradient follows; they replace what was known. moment: of e dp, over all keys.
    // False where the estimated centres of this warpgroup's rows were good enough, or exact already.
    __device__ __forceinline__ bool correct(const Memory &memory, int group, float (&moment)[2]) {
        Gap gap = {0.0f, 0.0f};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Row r = known_row(memory, half);
            r.total = this->over_lanes(memory.sums.get(sums_at(TOTAL) + half));
            r.moment = this->over_lanes(memory.sums.get(sums_at(MOMENT) + half));
            r.size = this->over_lanes(memory.sums.get(sums_at(SIZE) + half));
            r = this->correct_row(0, half, r, memory.heads.get(ROW_HEAD), gap);
            keep_row(memory, half, r);
            moment[half] = r.moment;
        }
        gap = this->template over_warps<4>(gap, memory.gaps, 4 * group, warp_row / 16, [&] { sync_named(GROUP + group, WARPGROUP); });
        return gap.gap > g.tolerance * gap.greatest;
    }

    __device__ __forceinline__ void consume(const Memory &memory, int group) {
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
#pragma unroll
        for (int half = 0; half < 2; half++) keep_row(memory, half, {INFINITY, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f});  // a query that sees nothing
        if (group == 1) arrive_named(TURN, CONSUMERS * WARPGROUP);  // the first turn is the other's
        float moment[2];
        int step = 0;
#pragma unroll 1
        for (int walks = 0; walks < 2; walks++) {
            step = walk_keys(memory, group, step, seed);
            // The vote, after one that all take part in, is for the compiler: it sees that a warp's lanes agree on their steps.
            if (!warp_any(sync_block_or(correct(memory, group, moment)))) break;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Row r = known_row(memory, half);
            r.moment = moment[half];
            this->write_row(0, half, r, memory.heads.get(ROW_HEAD));
        }
        // The products of all four warps are done with q: they met in correct().
        store_sums(gradient, memory.q, warp_row, g.grad_q, g.grad_q_vectors, memory.heads.get(GRAD_Q_HEAD), row + warp_row, sequence.len_q,
                   p.dim_qk, [&](int, int, float sum) { return sum * p.scale; });
    }

    __device__ __forceinline__ void run() {
        if (row >= sequence.len_q) return;
        SharedArena<1024> arena;
        const Memory memory(arena);
        if (threadIdx.x == 0) {
            memory.rings.prepare(WARPGROUP, CONSUMERS * WARPGROUP);
            memory.heads.set(ROW_HEAD, lse_head(p, b, h, sequence));
            memory.heads.set(GRAD_Q_HEAD, g.grad_q.at(b, h, sequence.first_q));
        }
        sync_block();
        if (threadIdx.x < WARPGROUP) {
            lower_registers<PRODUCER_REGISTERS>();
            produce(memory);
        } else {
            raise_registers<CONSUMER_REGISTERS>();
            consume(memory, warp_row / 64);
        }
    }
};

template <typename T, int DIM, bool EXTRAS, int TILES>
__global__ void __launch_bounds__(Sm90BackwardQueries<T, DIM, EXTRAS, TILES>::THREADS, 1)
    attention_backward_queries_sm90(const __grid_constant__ AttentionGradientParams<T> p, int section) {
    const BlockPlace place = place_of(static_cast<int>(blockIdx.x), section, p.call.entries, p.call.q_tiles);
    Sm90BackwardQueries<T, DIM, EXTRAS, TILES>(p, place.entry, place.tile).run();
}

template <typename T, int DIM, bool EXTRAS, int TILES>
cudaError_t launch_sm90_backward_queries(const fastattn_cuda_attention_gradient &from) {
    using Kernel = Sm90BackwardQueries<T, DIM, EXTRAS, TILES>;
    const AttentionGradientParams<T> p = gradient_params<T>(from, Kernel::ROWS);
    const int64_t blocks = static_cast<int64_t>(p.call.q_tiles) * from.call.batch * from.call.heads_q;
    if (!fits(from.call, blocks)) return cudaErrorInvalidValue;
    const Launch how = {"attention_backward_queries_sm90", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES,
                        from.call.stream};
    return launch<Kernel::THREADS>(how, attention_backward_queries_sm90<T, DIM, EXTRAS, TILES>, p, section_of_queries(from.call));
}
