// attention forward on wgmma: compute capability 9.0 alone.
//
// Contract   That of sm80_forward.cuh, for head dims up to 128.
// Numerics   Those of sm80_forward.cuh.
// Algorithm  A block owns 128 queries of one head and has three warpgroups. The first walks over the tiles of 64 keys that the mask does not leave
//            empty and copies them wherever they lie into rings of two steps each for k and v, with a note of what the queries see of them. A step
//            is two tiles, or one with EXTRAS, which needs the registers. The other warpgroups have 64 queries each: S = Q K^T of a step is issued
//            together with O += P V of the step before, and the softmax of S runs while that second product does. They issue by turns, so that one
//            computes a softmax while the other multiplies.
//            Steps go by barriers in shared memory, of which the ring's place is full once its copies have come, and empty once both warpgroups are
//            done with it. k runs a step ahead of v, in the order in which their places become empty. Copies are cp.async rather than the tensor
//            copy engine: tiles of a sparse mask lie anywhere, rows of hidden keys come as zeros, and nothing has to be encoded on the host.
// Measured   Not run on a GPU yet; checked in emulation. No spills. After FlashAttention-3 (arXiv 2407.08608), which has 1.5 to 2 times the
//            throughput of mma.sync there by the same means.
#pragma once
#include <primitives/launch.cuh>

#include "block_order.cuh"
#include "forward_block.cuh"
#include "key_steps.cuh"
#include "ring.cuh"

constexpr int FORWARD_NOTES = 3;  // a note is written while two before it are still read

template <typename T, int DIM, bool EXTRAS, int TILES>
using ForwardSteps = KeySteps<T, DIM, 2 * 64, EXTRAS, ForwardBlock<T, DIM, 2 * 64, 1, TILES * KEYS, EXTRAS>, TILES, FORWARD_NOTES>;

template <typename T, int DIM, bool EXTRAS>
struct Sm90Forward : ForwardSteps<T, DIM, EXTRAS, EXTRAS ? 1 : 2> {
    static constexpr int CONSUMERS = 2, ROWS = CONSUMERS * 64;
    static constexpr int TILES = EXTRAS ? 1 : 2, STEP = TILES * KEYS;  // of a step
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    // Of a thread: 168 are given out at launch, and no more than those can be shared out again.
    static constexpr int PRODUCER_REGISTERS = EXTRAS ? 88 : 56, CONSUMER_REGISTERS = EXTRAS ? 208 : 224;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * (65536 / THREADS / 8 * 8));
    static constexpr int STAGES = 2;
    using Base = ForwardSteps<T, DIM, EXTRAS, TILES>;
    using Base::b, Base::h, Base::o, Base::p, Base::rounded, Base::row, Base::s, Base::sequence, Base::warp_row, Base::fetch, Base::write_note;
    using typename Base::Copy, typename Base::Keys, typename Base::KTile, typename Base::Note, typename Base::Notes, typename Base::QTile,
        typename Base::Statistics, typename Base::Walk;
    enum { K, V };  // rings
    // Named barriers from here on: turns of the consumers, then those at which each meets itself.
    enum { TURN = 2, GROUP = TURN + CONSUMERS };

    static constexpr int SHARED_BYTES = (QTile::SIZE + 2 * STAGES * KTile::SIZE) * 2 + Rings<STAGES>::BARRIERS * 8 +
                                        (Walk::SCRATCH * 4 + 15) / 16 * 16 + Notes::BYTES;
    static_assert(SHARED_BYTES <= 227 * 1024);

    struct Memory {
        QTile q;
        Shared<T> tiles;  // the places of k, then those of v
        Rings<STAGES> rings;
        Shared<int> scratch;
        Notes notes;

        __device__ __forceinline__ explicit Memory(SharedArena<1024> &arena)
            : q{arena.take<T>(QTile::SIZE)},
              tiles(arena.take<T>(2 * STAGES * KTile::SIZE)),
              rings(arena.take<uint64_t>(Rings<STAGES>::BARRIERS)),
              scratch(arena.take<int>(Walk::SCRATCH)),
              notes(arena) {}

        __device__ __forceinline__ KTile k(int step) const { return {tiles.from(step % STAGES * KTile::SIZE)}; }
        __device__ __forceinline__ KTile v(int step) const { return {tiles.from((STAGES + step % STAGES) * KTile::SIZE)}; }
    };

    __device__ __forceinline__ Sm90Forward(const AttentionParams<T> &params, int entry, int tile)
        : Base(params, entry, tile, static_cast<int>(threadIdx.x) / WARP - WARPGROUP / WARP) {}

    // --- The first warpgroup: walks, copies, notes ----------------------------------------------------------------------------------------

    __device__ __forceinline__ void produce(const Memory &memory) const {
        Walk walk(p.mask, b, h, row, sequence, memory.scratch);
        const Copy copy;
        const int64_t k_head = p.k.at(b, h / p.group, sequence.first_k), v_head = p.v.at(b, h / p.group, sequence.first_k);
        copy.pad(memory.q, p.dim_qk);
        for (int stage = 0; stage < STAGES; stage++) {
            copy.pad(memory.k(stage), p.dim_qk);
            copy.pad(memory.v(stage), p.dim_v);
        }
        copy.load(memory.q, p.q, p.q_vectors, p.q.at(b, h, sequence.first_q), row, p.dim_qk, row + ROWS <= sequence.len_q,
                  [&](int n) { return row + static_cast<int>(copy.row) + n < sequence.len_q; });
        copy_async_commit();
        Keys keys[TILES], before[TILES];
#pragma unroll 1
        for (int step = 0;; step++) {
            KeyTile tiles[TILES];
            this->next(walk, tiles, keys);
            const bool exists = tiles[0].begin >= 0;
            // Under way is v of the step before the last, at first q and k. Where copies are what all wait for, k of this step goes to them at once;
            // where products are, its place is still full, and who waits for v does not wait for that too.
            bool told = step == 0;
            const auto tell = [&] { memory.rings.tell_full(step == 1 ? K : V, step == 1 ? 0 : step - 2); };
            if (!told && !memory.rings.is_empty(K, step)) {
                complete_copies<0>();
                tell();
                told = true;
            }
            memory.rings.wait_empty(K, step);
            if (exists) {
                fetch(copy, memory.k(step), p.k, p.k_vectors, k_head, p.dim_qk, keys);
                copy_async_commit();
            }
            write_note(memory.notes, step, walk, tiles);
            if (!told) {
                exists ? complete_copies<1>() : complete_copies<0>();
                tell();
            }
            if (!exists) {
                complete_copies<0>();                // q, through which out is written, if there was no step
                memory.rings.tell_full(K, step);  // that there is nothing
            }
            if (step > 0) {
                memory.rings.wait_empty(V, step - 1);
                fetch(copy, memory.v(step - 1), p.v, p.v_vectors, v_head, p.dim_v, before);
                copy_async_commit();
                exists ? complete_copies<1>() : complete_copies<0>();
                memory.rings.tell_full(exists ? K : V, exists ? step : step - 1);
            }
            if (!exists) return;
#pragma unroll
            for (int i = 0; i < TILES; i++) before[i] = keys[i];
        }
    }

    // --- The others: products and softmax -------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void issue_scores(const Memory &memory, int group, int step) {
        issue_transposed(s[0], memory.q, 64 * group, memory.k(step));
        wgmma_commit();
    }
    __device__ __forceinline__ void issue_out(const Memory &memory, int step) {
        issue_sums(o[0], rounded[0], memory.v(step));
        wgmma_commit();
    }

    // Scores become p, not yet rounded. shrink: what the accumulators are to be multiplied by.
    __device__ __forceinline__ void soften(const Memory &memory, int step, uint64_t seed, Statistics (&statistics)[2], float (&shrink)[2]) {
        const Note note = this->prepare_step(memory.notes, step, [](int, int, int, float, float) {});
#pragma unroll
        for (int half = 0; half < 2; half++) shrink[half] = this->soften_row(0, half, statistics[half]);
        static_assert(!EXTRAS || TILES == 1);
        if (EXTRAS && p.dropout) this->drop_out(s, seed, note.at[Base::FIRST_KEY]);
    }

    __device__ __forceinline__ void consume(const Memory &memory, int group) {
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
        Statistics statistics[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
        float shrink[2];
        zero_sums(o);
        if (group == 1) arrive_named(TURN, CONSUMERS * WARPGROUP);  // the first turn is the other's
        memory.rings.wait_full(K, 0);
        if (memory.notes.exists(0)) {
            issue_scores(memory, group, 0);
            wgmma_wait<0>(s[0]);
            memory.rings.release(K, 0);
            soften(memory, 0, seed, statistics, shrink);
            round_sums<T>(rounded, s);
            memory.rings.wait_full(K, 1);
            int step = 1;
#pragma unroll 1
            for (;; step++) {
                if (!memory.notes.exists(step)) break;
                sync_named(TURN + group, CONSUMERS * WARPGROUP);
                issue_scores(memory, group, step);
                memory.rings.wait_full(V, step - 1);
                issue_out(memory, step - 1);
                arrive_named(TURN + (group ^ 1), CONSUMERS * WARPGROUP);
                wgmma_wait<1>(s[0]);
                memory.rings.release(K, step);
                soften(memory, step, seed, statistics, shrink);
                // Before the products are waited for, not after: within straight code ptxas has that wait as early as it can, before the softmax,
                // and it does not move it over this one's branch.
                memory.rings.wait_full(K, step + 1);
                wgmma_wait<0>(o[0]);
                memory.rings.release(V, step - 1);
                this->shrink_sums(0, shrink);
                round_sums<T>(rounded, s);
            }
            memory.rings.wait_full(V, step - 1);
            issue_out(memory, step - 1);
            wgmma_wait<0>(o[0]);
        }
        sync_named(GROUP + group, WARPGROUP);  // products of all four warps are done with q, through which each writes its rows
        this->finish(memory.q, p.out.at(b, h, sequence.first_q), lse_head(p, b, h, sequence), [&](int, int half) { return statistics[half]; });
    }

    __device__ __forceinline__ void run() {
        if (p.packed.cu_q) {
            if (row == 0) this->clear_unowned();
            if (row >= sequence.len_q) return;
        }
        SharedArena<1024> arena;
        const Memory memory(arena);
        if (threadIdx.x == 0) memory.rings.prepare(WARPGROUP, CONSUMERS * WARPGROUP);
        sync_block();
        if (threadIdx.x < WARPGROUP) {
            lower_registers<PRODUCER_REGISTERS>();
            produce(memory);
        } else {
            raise_registers<CONSUMER_REGISTERS>();
            // The same for all lanes, which the compiler does not see otherwise: operands' descriptors then take no registers of threads.
            consume(memory, shuffle(static_cast<int>(threadIdx.x) / WARPGROUP - 1, 0));
        }
    }
};

template <typename T, int DIM, bool EXTRAS>
__global__ void __launch_bounds__(Sm90Forward<T, DIM, EXTRAS>::THREADS, 1)
    attention_forward_sm90(const __grid_constant__ AttentionParams<T> p, int section) {
    const BlockPlace place = place_of(static_cast<int>(blockIdx.x), section, p.entries, p.q_tiles);
    Sm90Forward<T, DIM, EXTRAS>(p, place.entry, place.tile).run();
}

template <typename T, int DIM, bool EXTRAS>
cudaError_t launch_sm90_forward(const fastattn_cuda_attention &call) {
    using Kernel = Sm90Forward<T, DIM, EXTRAS>;
    const AttentionParams<T> p = attention_params<T>(call, Kernel::ROWS);
    const int64_t blocks = static_cast<int64_t>(p.q_tiles) * call.batch * call.heads_q;
    if (!fits(call, blocks)) return cudaErrorInvalidValue;
    const Launch how = {"attention_forward_sm90", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES, call.stream};
    return launch<Kernel::THREADS>(how, attention_forward_sm90<T, DIM, EXTRAS>, p, section_of_queries(call));
}
