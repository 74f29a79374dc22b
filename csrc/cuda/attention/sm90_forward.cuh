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
#include <primitives/mbarrier.cuh>

#include "forward_block.cuh"
#include "swizzled_tile.cuh"

template <typename T, int DIM, bool EXTRAS>
struct Sm90Forward : ForwardBlock<T, DIM, 2 * 64, 1, EXTRAS ? KEYS : 2 * KEYS, EXTRAS> {
    static constexpr int CONSUMERS = 2, ROWS = CONSUMERS * 64;
    static constexpr int TILES = EXTRAS ? 1 : 2, STEP = TILES * KEYS;  // of a step
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    // Of a thread: 168 are given out at launch, and no more than those can be shared out again.
    static constexpr int PRODUCER_REGISTERS = EXTRAS ? 88 : 56, CONSUMER_REGISTERS = EXTRAS ? 208 : 224;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * (65536 / THREADS / 8 * 8));
    static constexpr int STAGES = 2, NOTES = 3;  // a note is written while two before it are still read
    using Base = ForwardBlock<T, DIM, ROWS, 1, STEP, EXTRAS>;
    using Base::b, Base::h, Base::o, Base::p, Base::rounded, Base::row, Base::s, Base::sequence, Base::warp_row;
    using Base::S_TILES, Base::O_TILES, Base::DISTANCES;
    using typename Base::Statistics;
    using Producer = FirstThreads<WARPGROUP, 1>;
    using Walk = MaskWalk<ROWS, EXTRAS, Producer>;
    using Copy = TileCopy<T, DIM, WARPGROUP, true>;
    using QTile = SwizzledTile<T, ROWS, DIM>;
    using KTile = SwizzledTile<T, STEP, DIM>;  // of k or v

    // What is noted of a step: the first key of each of its tiles, negative where there is none, as of all where the walk has ended; whether they
    // are full. Words and distances of each tile lie in arrays of their own.
    enum { FIRST_KEY, FULL = TILES, NOTE = 2 * TILES };
    using Note = Pack<int, NOTE>;
    // Barriers, each kind one per stage.
    enum { K_FULL = 0, K_EMPTY = STAGES, V_FULL = 2 * STAGES, V_EMPTY = 3 * STAGES, BARRIERS = 4 * STAGES };
    // Named barriers from here on: turns of the consumers, then those at which each meets itself.
    enum { TURN = 2, GROUP = TURN + CONSUMERS };

    static constexpr int SHARED_BYTES = (QTile::SIZE + 2 * STAGES * KTile::SIZE) * 2 + BARRIERS * 8 + (Walk::SCRATCH * 4 + 15) / 16 * 16 +
                                        (NOTES * NOTE * 4 + 15) / 16 * 16 + NOTES * TILES * (ROWS * 8 + DISTANCES * 4);
    static_assert(SHARED_BYTES <= 227 * 1024);

    struct Memory {
        QTile q;
        Shared<T> tiles;  // the stages of k, then those of v
        Barriers barriers;
        Shared<int> scratch, notes;
        Shared<uint64_t> words;
        Shared<float> distances;

        __device__ __forceinline__ explicit Memory(SharedArena<1024> &arena)
            : q{arena.take<T>(QTile::SIZE)},
              tiles(arena.take<T>(2 * STAGES * KTile::SIZE)),
              barriers(arena.take<uint64_t>(BARRIERS)),
              scratch(arena.take<int>(Walk::SCRATCH)),
              notes(arena.take<int>(NOTES * NOTE)),
              words(arena.take<uint64_t>(NOTES * TILES * ROWS)),
              distances(arena.take<float>(NOTES * TILES * DISTANCES)) {}

        __device__ __forceinline__ KTile k(int step) const { return {tiles.from(step % STAGES * KTile::SIZE)}; }
        __device__ __forceinline__ KTile v(int step) const { return {tiles.from((STAGES + step % STAGES) * KTile::SIZE)}; }
        __device__ __forceinline__ Shared<int> note(int step) const { return notes.from(step % NOTES * NOTE); }
        __device__ __forceinline__ Shared<uint64_t> words_of(int step, int tile) const { return words.from((step % NOTES * TILES + tile) * ROWS); }
        __device__ __forceinline__ Shared<float> distances_of(int step, int tile) const {
            return distances.from((step % NOTES * TILES + tile) * DISTANCES);
        }

        // A place of a ring is full, or empty, for the (step / STAGES)-th time.
        __device__ __forceinline__ void wait_full(int kind, int step) const { barriers.wait(kind + step % STAGES, step / STAGES & 1); }
        __device__ __forceinline__ bool is_empty(int kind, int step) const {
            return barriers.is_complete(kind + step % STAGES, (step / STAGES & 1) ^ 1);
        }
        __device__ __forceinline__ void wait_empty(int kind, int step) const { barriers.wait(kind + step % STAGES, (step / STAGES & 1) ^ 1); }
        __device__ __forceinline__ void arrive(int kind, int step) const { barriers.arrive(kind + step % STAGES); }
    };

    // A tile of keys as far as copies need it.
    struct Keys {
        int begin;
        uint64_t alive;
    };

    __device__ __forceinline__ Sm90Forward(const AttentionParams<T> &params, int entry, int tile)
        : Base(params, entry, tile, static_cast<int>(threadIdx.x) / WARP - WARPGROUP / WARP) {}

    // --- The first warpgroup: walks, copies, notes ----------------------------------------------------------------------------------------

    static __device__ __forceinline__ KeyTile next(Walk &walk) {
        const KeyTile tile = walk.next();
        Producer::sync();
        walk.settle();
        Producer::sync();
        return tile;
    }

    __device__ __forceinline__ void write_note(const Memory &memory, int step, const Walk &walk, const KeyTile (&tiles)[TILES]) const {
        Note note;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            note.at[FIRST_KEY + i] = tiles[i].begin, note.at[FULL + i] = tiles[i].full;
            if (tiles[0].begin < 0) continue;
            // Of a tile that is not there nobody sees anything: consumers need no case of its own, which would cost their accumulators' places.
            this->template fill_words<WARPGROUP>(memory.words_of(step, i), walk, tiles[i]);
            if (EXTRAS && p.distance) this->template fill_distances<WARPGROUP>(memory.distances_of(step, i), tiles[i].begin);
        }
        if (threadIdx.x == 0) memory.note(step).template store<NOTE>(0, note);
    }

    // Tiles of keys into the place of a step; zeros where there are no more.
    __device__ __forceinline__ void fetch(const Copy &copy, const KTile &to, const Strided<const T> &from, bool vectors, int64_t head_at, int width,
                                          const Keys (&keys)[TILES]) const {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const uint64_t alive = keys[i].alive >> copy.row;
            copy.load(to.template rows<KEYS>(i * KEYS), from, vectors, head_at, static_cast<unsigned>(larger(keys[i].begin, 0)),
                      static_cast<unsigned>(width), keys[i].alive == ~uint64_t(0), [&](int n) { return alive >> n & 1; });
        }
        copy_async_commit();
    }

    // This thread's copies have come, all but those of the LEFT last groups, and what it wrote may be read by products.
    template <int LEFT>
    static __device__ __forceinline__ void complete() {
        copy_async_wait<LEFT>();
        wgmma_share();
    }

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
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                tiles[i] = i > 0 && tiles[0].begin < 0 ? tiles[0] : next(walk);
                keys[i] = {tiles[i].begin, tiles[i].keys};
            }
            const bool exists = tiles[0].begin >= 0;
            // Under way is v of the step before the last, at first q and k. Where copies are what all wait for, k of this step goes to them at once;
            // where products are, its place is still full, and who waits for v does not wait for that too.
            bool told = step == 0;
            const auto tell = [&] { memory.arrive(step == 1 ? K_FULL : V_FULL, step == 1 ? 0 : step - 2); };
            if (!told && !memory.is_empty(K_EMPTY, step)) {
                complete<0>();
                tell();
                told = true;
            }
            memory.wait_empty(K_EMPTY, step);
            if (exists) fetch(copy, memory.k(step), p.k, p.k_vectors, k_head, p.dim_qk, keys);
            write_note(memory, step, walk, tiles);
            if (!told) {
                exists ? complete<1>() : complete<0>();
                tell();
            }
            if (!exists) {
                complete<0>();                // q, through which out is written, if there was no step
                memory.arrive(K_FULL, step);  // that there is nothing
            }
            if (step > 0) {
                memory.wait_empty(V_EMPTY, step - 1);
                fetch(copy, memory.v(step - 1), p.v, p.v_vectors, v_head, p.dim_v, before);
                exists ? complete<1>() : complete<0>();
                memory.arrive(exists ? K_FULL : V_FULL, exists ? step : step - 1);
            }
            if (!exists) return;
#pragma unroll
            for (int i = 0; i < TILES; i++) before[i] = keys[i];
        }
    }

    // --- The others: products and softmax -------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void issue_scores(const Memory &memory, int group, int step) {
        const KTile k = memory.k(step);
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < DIM; d += 16) wgmma_transposed<T>(s[0], memory.q.columns(64 * group, d), k.columns(0, d), d > 0);
        wgmma_commit();
    }
    __device__ __forceinline__ void issue_sums(const Memory &memory, int step) {
        const KTile v = memory.v(step);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < STEP / 16; i++) wgmma<T>(o[0], rounded[0][i], v.right_operand(16 * i));
        wgmma_commit();
    }

    // A warp is done with a place of a ring.
    static __device__ __forceinline__ void release(const Memory &memory, int kind, int step) {
        if (threadIdx.x % WARP == 0) memory.arrive(kind, step);
    }

    // Products with the keys of one of the step's tiles become scores.
    template <int TILE>
    __device__ __forceinline__ void prepare_tile(const Memory &memory, int step, int begin, bool full) {
        const MaskView<EXTRAS> view(p.mask, sequence, b, h, full);
        this->template prepare<TILE * KEYS / 8>(view, begin, 0, memory.words_of(step, TILE), memory.distances_of(step, TILE),
                                      [](int, int, int, float, float) {});
    }
    // Scores become p, not yet rounded. shrink: what the accumulators are to be multiplied by.
    __device__ __forceinline__ void soften(const Memory &memory, int step, uint64_t seed, Statistics (&statistics)[2], float (&shrink)[2]) {
        const Note note = memory.note(step).template load<NOTE>(0);
        prepare_tile<0>(memory, step, note.at[FIRST_KEY], note.at[FULL]);
        if constexpr (TILES == 2) prepare_tile<1>(memory, step, note.at[FIRST_KEY + 1], note.at[FULL + 1]);
#pragma unroll
        for (int half = 0; half < 2; half++) shrink[half] = this->soften_row(0, half, statistics[half]);
        static_assert(!EXTRAS || TILES == 1);
        if (EXTRAS && p.dropout) this->drop_out(s, seed, note.at[FIRST_KEY]);
    }

    __device__ __forceinline__ void consume(const Memory &memory, int group) {
        const uint64_t seed = EXTRAS && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
        Statistics statistics[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
        float shrink[2];
        zero_sums(o);
        if (group == 1) arrive_named(TURN, CONSUMERS * WARPGROUP);  // the first turn is the other's
        memory.wait_full(K_FULL, 0);
        if (memory.note(0).get(FIRST_KEY) >= 0) {
            issue_scores(memory, group, 0);
            wgmma_wait<0>(s[0]);
            release(memory, K_EMPTY, 0);
            soften(memory, 0, seed, statistics, shrink);
            round_sums<T>(rounded, s);
            memory.wait_full(K_FULL, 1);
            int step = 1;
#pragma unroll 1
            for (;; step++) {
                if (memory.note(step).get(FIRST_KEY) < 0) break;
                sync_named(TURN + group, CONSUMERS * WARPGROUP);
                issue_scores(memory, group, step);
                memory.wait_full(V_FULL, step - 1);
                issue_sums(memory, step - 1);
                arrive_named(TURN + (group ^ 1), CONSUMERS * WARPGROUP);
                wgmma_wait<1>(s[0]);
                release(memory, K_EMPTY, step);
                soften(memory, step, seed, statistics, shrink);
                // Before the products are waited for, not after: within straight code ptxas has that wait as early as it can, before the softmax,
                // and it does not move it over this one's branch.
                memory.wait_full(K_FULL, step + 1);
                wgmma_wait<0>(o[0]);
                release(memory, V_EMPTY, step - 1);
                this->shrink_sums(0, shrink);
                round_sums<T>(rounded, s);
            }
            memory.wait_full(V_FULL, step - 1);
            issue_sums(memory, step - 1);
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
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; stage++) {
                memory.barriers.prepare(K_FULL + stage, WARPGROUP);
                memory.barriers.prepare(V_FULL + stage, WARPGROUP);
                memory.barriers.prepare(K_EMPTY + stage, CONSUMERS * WARPGROUP / WARP);
                memory.barriers.prepare(V_EMPTY + stage, CONSUMERS * WARPGROUP / WARP);
            }
        }
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

// The order of the blocks. Those that run at a time read the keys and values of few heads, or else L2 does not keep them for the next tile of queries
// and every block reads them from memory: heads come in sections of `section` entries, whose keys and values L2 holds together. Within a section the
// last tiles of queries come first, which under a causal mask have most keys.
struct BlockPlace {
    int entry, tile;
};
__host__ __device__ constexpr BlockPlace place_of(int block, int section, int entries, int q_tiles) {
    const int first = block / (section * q_tiles) * section, within = block - first * q_tiles;
    const int count = section < entries - first ? section : entries - first;
    return {first + within % count, q_tiles - 1 - within / count};
}
constexpr bool places_differ(int section, int entries, int q_tiles) {
    uint64_t met = 0;
    for (int block = 0; block < entries * q_tiles; block++) {
        const BlockPlace place = place_of(block, section, entries, q_tiles);
        met |= uint64_t(1) << (place.entry * q_tiles + place.tile);
    }
    return met == ~uint64_t(0) >> (64 - entries * q_tiles);
}
static_assert(places_differ(3, 8, 5) && places_differ(8, 8, 5) && places_differ(1, 7, 9) && places_differ(4, 6, 1));

constexpr int64_t L2_BYTES = 32 << 20;  // of 50 MiB: queries and out pass through too

template <typename Call>
int section_of(const Call &call) {
    const int64_t bytes = call.len_k * (call.dim_qk + call.dim_v) * 2, heads = call.batch * call.heads_kv;
    const int64_t held = bytes * heads > L2_BYTES ? (bytes < L2_BYTES ? L2_BYTES / bytes : 1) : heads;
    return static_cast<int>(held * (call.heads_q / call.heads_kv));
}

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
    return launch<Kernel::THREADS>(how, attention_forward_sm90<T, DIM, EXTRAS>, p, section_of(call));
}
