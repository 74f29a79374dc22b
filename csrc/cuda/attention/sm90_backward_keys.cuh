// attention backward by keys, on wgmma: compute capability 9.0 alone.
//
// Contract   That of sm80_backward_keys.cuh, for head dims up to 128. norm and centre are those of either kernel by queries.
// Numerics   Those of sm80_backward_keys.cuh.
// Algorithm  A block owns 128 keys of one head of keys, with their rows of k and v in shared memory, and has three warpgroups. The first walks over
//            the tiles of 64 queries that see them, head after head of the group, and copies their rows of q and grad_out into rings of places, with
//            what each query has (query_walk.cuh, key_block.cuh). It walks for either half of the keys and visits a tile that one of them sees: the
//            other sees nothing of it then. The other warpgroups have 64 keys each, with their gradients in registers. Of a tile they issue dK +=
//            dS^T Q of the tile before, S^T = K Q^T and dP^T = V dO^T, by turns as in sm90_forward.cuh; p of the scores is worked out while the
//            last of these runs, ds while dV += P^T dO does. Both gradients of wide heads leave no registers for that: S^T and dP^T come first then,
//            p and ds together, and what these are multiplied by. With EXTRAS not even those are there: DK and DV are two launches.
// Measured   Not run on a GPU yet; checked in emulation. No spills; a full tile takes a warp 382 instructions, where the products of both warpgroups
//            take the tensor cores 2,048 cycles at their peak, or 1,024 of narrow heads.
#pragma once
#include <primitives/launch.cuh>

#include "block_order.cuh"
#include "key_block.cuh"
#include "ring.cuh"
#include "swizzled_tile.cuh"

template <typename T, int DIM, bool DK, bool DV, bool EXTRAS>
struct Sm90BackwardKeys : KeyBlock<T, DIM, MASK_BLOCK, DK, DV, EXTRAS> {
    static constexpr int CONSUMERS = 2, BLOCK_KEYS = CONSUMERS * KEYS, STAGES = 4;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    // Of a thread: 168 are given out at launch, and no more than those can be shared out again.
    static constexpr bool TIGHT = DIM == 128 && DK && DV;  // for registers
    static constexpr int PRODUCER_REGISTERS = TIGHT ? 56 : 88, CONSUMER_REGISTERS = TIGHT ? 224 : 208;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * (65536 / THREADS / 8 * 8));
    static constexpr int AHEAD = 2;  // copies under way beside the one that is waited for
    using Base = KeyBlock<T, DIM, MASK_BLOCK, DK, DV, EXTRAS>;
    using Base::b, Base::begin, Base::g, Base::grad_k, Base::grad_v, Base::grad_weights, Base::h_kv, Base::key, Base::p, Base::s, Base::sequence,
        Base::warp_row;
    using Base::S_TILES, Base::KEEPS;
    using typename Base::RowOf, typename Base::Rows;
    using Producer = FirstThreads<WARPGROUP, 1>;
    using Walk = QueryWalk<EXTRAS, Producer>;
    using Copy = TileCopy<T, DIM, WARPGROUP, true>;
    using KTile = SwizzledTile<T, BLOCK_KEYS, DIM>;  // of k or v
    using QTile = SwizzledTile<T, MASK_BLOCK, DIM>;  // of q or grad_out
    enum { Q, GRAD_OUT };                            // rings; the note of a tile and its rows go with the place for q
    enum { Q_HEAD, GRAD_OUT_HEAD, ROW_HEAD };
    // Named barriers from here on: turns of the consumers, then those at which each meets itself.
    enum { TURN = 2, GROUP = TURN + CONSUMERS };
    // What is noted of a step: its tile, and for which of the consumers it is full.
    enum { HEAD, FIRST_QUERY, FULL, NOTE = FULL + CONSUMERS };
    using Note = Pack<int, NOTE>;
    // Of each walk: what the walk keeps, and the tile that it has come to.
    enum { PENDING = Walk::SCRATCH, SCRATCH = PENDING + 4 };
    static constexpr int DISTANCES = EXTRAS ? BLOCK_KEYS + MASK_BLOCK : 0;
    static constexpr int ROWS_BYTES = CONSUMERS * (MASK_BLOCK + KEEPS) * 8 + (3 * MASK_BLOCK + DISTANCES) * 4;

    static constexpr int SHARED_BYTES = 2 * (KTile::SIZE + STAGES * QTile::SIZE) * 2 + Rings<STAGES>::BARRIERS * 8 +
                                        (CONSUMERS * SCRATCH + STAGES * NOTE) * 4 + STAGES * ROWS_BYTES + 32;
    static_assert(SHARED_BYTES <= 227 * 1024);

    struct Memory {
        KTile k, v;
        Shared<T> tiles;  // the places of q, then those of grad_out
        Rings<STAGES> rings;
        Shared<int> scratch, notes;
        Shared<uint64_t> words, keeps;
        Shared<float> base, norm, centre, distances;
        Shared<int64_t> heads;  // where the sequence's rows of head 0 begin: not in registers, which are few

        __device__ __forceinline__ explicit Memory(SharedArena<1024> &arena)
            : k{arena.take<T>(KTile::SIZE)},
              v{arena.take<T>(KTile::SIZE)},
              tiles(arena.take<T>(2 * STAGES * QTile::SIZE)),
              rings(arena.take<uint64_t>(Rings<STAGES>::BARRIERS)),
              scratch(arena.take<int>(CONSUMERS * SCRATCH)),
              notes(arena.take<int>(STAGES * NOTE)),
              words(arena.take<uint64_t>(STAGES * CONSUMERS * MASK_BLOCK)),
              keeps(arena.take<uint64_t>(STAGES * CONSUMERS * KEEPS)),
              base(arena.take<float>(STAGES * MASK_BLOCK)),
              norm(arena.take<float>(STAGES * MASK_BLOCK)),
              centre(arena.take<float>(STAGES * MASK_BLOCK)),
              distances(arena.take<float>(STAGES * DISTANCES)),
              heads(arena.take<int64_t>(4)) {}

        __device__ __forceinline__ QTile q(int step) const { return {tiles.from(step % STAGES * QTile::SIZE)}; }
        __device__ __forceinline__ QTile grad_out(int step) const { return {tiles.from((STAGES + step % STAGES) * QTile::SIZE)}; }
        __device__ __forceinline__ Shared<int> note(int step) const { return notes.from(step % STAGES * NOTE); }
        // Whether there is a step of this number. By a vote, from which the compiler sees that a warp's lanes agree on their steps.
        __device__ __forceinline__ bool exists(int step) const { return warp_any(note(step).get(FIRST_QUERY) >= 0); }
        // What the queries of a step have as keys of a consumer are concerned.
        __device__ __forceinline__ Rows rows(int step, int group) const {
            const int place = step % STAGES, own = place * CONSUMERS + group;
            return {words.from(own * MASK_BLOCK),    keeps.from(own * KEEPS),          base.from(place * MASK_BLOCK),
                    norm.from(place * MASK_BLOCK), centre.from(place * MASK_BLOCK), distances.from(place * DISTANCES + (EXTRAS ? group * KEYS : 0))};
        }
    };

    // warp: the number of this one among the consumers; those of the producer count as the first ones.
    __device__ __forceinline__ Sm90BackwardKeys(const AttentionGradientParams<T> &params, int entry, int tile, int warp)
        : Base(params, entry, tile * BLOCK_KEYS + warp / 4 * KEYS, warp % 4) {}

    // --- The first warpgroup: walks, copies, notes ----------------------------------------------------------------------------------------

    // The walk over what sees the keys of a consumer, as it lies in shared memory. Where the sequence has no such keys it has nothing to visit, and
    // asks for nothing that is not there.
    __device__ __forceinline__ bool has_keys(int group) const { return begin + group * KEYS < sequence.len_k; }
    __device__ __forceinline__ Walk walk_of(const Memory &memory, int group) const {
        return Walk(p.mask, g.transpose, b, has_keys(group) ? begin + group * KEYS : begin, sequence, memory.scratch.from(group * SCRATCH));
    }

    // To which tile a walk has come; at its end to one of a head behind all others.
    static __device__ __forceinline__ QueryTile pending(const Memory &memory, int group) {
        const Pack<int, 4> tile = memory.scratch.template load<4>(group * SCRATCH + PENDING);
        return {tile.at[0], tile.at[1], tile.at[2] != 0, tile.at[3]};
    }
    static __device__ __forceinline__ bool same(const QueryTile &a, const QueryTile &other) {
        return a.head == other.head && a.begin == other.begin;
    }

    // The tile that comes next of those to which the walks have come, once those that have come to `before` have moved on.
    __device__ __forceinline__ QueryTile next(const Memory &memory, const QueryTile &before) const {
#pragma unroll 1
        for (int group = 0; group < CONSUMERS; group++) {
            if (!same(pending(memory, group), before)) continue;
            Walk walk = walk_of(memory, group);
            const QueryTile tile = walk.next();
            Producer::sync();
            walk.settle();
            const int head = tile.begin < 0 ? INT_MAX : tile.head;
            if (threadIdx.x == 0) memory.scratch.template store<4>(group * SCRATCH + PENDING, {{head, tile.begin, tile.full, tile.block}});
            Producer::sync();
        }
        const QueryTile a = pending(memory, 0), other = pending(memory, 1);
        return a.head < other.head || (a.head == other.head && a.begin <= other.begin) ? a : other;
    }

    // What the queries of a tile have, into the place of a step.
    __device__ __forceinline__ void write_note(const Memory &memory, int step, const QueryTile &tile, const RowOf &row) const {
        const int thread = static_cast<int>(threadIdx.x);
        Note note;
        note.at[HEAD] = tile.head, note.at[FIRST_QUERY] = tile.begin;
        if (tile.begin >= 0) {
            if (thread < MASK_BLOCK) this->fill_row(memory.rows(step, 0), thread, row);
            if (EXTRAS && p.distance) this->template fill_distances<BLOCK_KEYS, WARPGROUP>(memory.rows(step, 0).distances, tile);
        }
#pragma unroll
        for (int group = 0; group < CONSUMERS; group++) {
            note.at[FULL + group] = false;
            if (tile.begin < 0) continue;
            const QueryTile own = pending(memory, group);
            const Rows rows = memory.rows(step, group);
            if (!same(own, tile)) {
                for (int i = thread; i < MASK_BLOCK; i += WARPGROUP) rows.words.set(i, 0);
                continue;
            }
            note.at[FULL + group] = own.full;
            if (!own.full || (EXTRAS && p.bias)) walk_of(memory, group).fill_words(rows.words, own);
            if (EXTRAS && p.dropout) {
                const auto seed = static_cast<uint64_t>(p.dropout.seed.get(0));
                this->template fill_keeps<WARPGROUP>(rows.keeps, tile, begin + group * KEYS, seed);
            }
        }
        if (thread == 0) memory.note(step).template store<NOTE>(0, note);
    }

    __device__ __forceinline__ void produce(const Memory &memory) const {
        const int thread = static_cast<int>(threadIdx.x);
        const Copy copy;
        copy.pad(memory.k, p.dim_qk);
        copy.pad(memory.v, p.dim_v);
        for (int stage = 0; stage < STAGES; stage++) {
            copy.pad(memory.q(stage), p.dim_qk);
            copy.pad(memory.grad_out(stage), p.dim_v);
        }
        const QueryTile nowhere = {-1, -1, false, 0};
#pragma unroll 1
        for (int group = 0; group < CONSUMERS; group++) {
            Walk walk = walk_of(memory, group);
            walk.start(h_kv * p.group, has_keys(group) ? (h_kv + 1) * p.group : h_kv * p.group, sequence);
            if (thread == 0) memory.scratch.template store<4>(group * SCRATCH + PENDING, {{nowhere.head, nowhere.begin, 0, 0}});
            // k and v, with the first q.
            const uint64_t keys = has_keys(group) ? walk.keys() : 0;
            const auto lives = [&](int n) { return keys >> (copy.row + n) & 1; };
            const auto fetch = [&](const KTile &to, const Strided<const T> &from, bool vectors, int width) {
                copy.load(to.template rows<KEYS>(group * KEYS), from, vectors, from.at(b, h_kv, sequence.first_k),
                          static_cast<unsigned>(begin + group * KEYS), static_cast<unsigned>(width), keys == ~uint64_t(0), lives);
            };
            fetch(memory.k, p.k, p.k_vectors, p.dim_qk);
            if (DK) fetch(memory.v, p.v, p.v_vectors, p.dim_v);
        }
        Producer::sync();
        const auto fetch = [&](const QTile &to, const Strided<const T> &from, bool vectors, int head, int width, const QueryTile &tile) {
            copy.load(to, from, vectors, memory.heads.get(head) + tile.head * from.head, static_cast<unsigned>(tile.begin),
                      static_cast<unsigned>(width), tile.begin + MASK_BLOCK <= sequence.len_q,
                      [&](int n) { return tile.begin + static_cast<int>(copy.row) + n < sequence.len_q; });
        };
        RingFiller<STAGES, AHEAD> filler(memory.rings);
        QueryTile tile = nowhere;
#pragma unroll 1
        for (int step = 0;; step++) {
            tile = next(memory, tile);
            const bool exists = tile.begin >= 0;
            // Comes while a place is waited for and q is fetched.
            RowOf row = {};
            if (exists && thread < MASK_BLOCK)
                row = this->load_row(tile, thread, memory.heads.get(ROW_HEAD) + static_cast<int64_t>(tile.head) * p.packed.rows_q);
            filler.begin();
            if (exists) fetch(memory.q(step), p.q, p.q_vectors, Q_HEAD, p.dim_qk, tile);
            write_note(memory, step, tile, row);
            filler.end();
            if (!exists) break;
            filler.begin();
            fetch(memory.grad_out(step), g.grad_out, g.grad_out_vectors, GRAD_OUT_HEAD, p.dim_v, tile);
            filler.end();
        }
        filler.tell_all();
    }

    // --- The others: products, p and ds ---------------------------------------------------------------------------------------------------

    // What dropout multiplies p and dp of key half `half` and the query of bits `kept` by.
    __device__ __forceinline__ float dropout_factor(uint64_t kept, int half) const {
        return kept >> (8 * half) & 1 ? p.dropout.keep_scale : 0.0f;
    }
    // Calls f(n, query, kept) for each of this thread's column tiles: its first query of two, and of both, in bit 8 half, whether the key is kept.
    template <typename F>
    __device__ __forceinline__ void each_column(const Rows &rows, const F &f) const {
#pragma unroll
        for (int n = 0; n < S_TILES; n++) {
            const int at = sum_column(n, 0);
            uint64_t kept[2] = {~uint64_t(0), ~uint64_t(0)};
            if (EXTRAS && p.dropout) kept[0] = rows.keeps.get(at) >> key(0), kept[1] = rows.keeps.get(at + 1) >> key(0);
            f(n, at, kept);
        }
    }

    // Scores become e in their place; p is rounded.
    __device__ __forceinline__ void exponentiate(const Rows &rows, uint32_t (&weights)[1][S_TILES / 2][4]) {
        each_column(rows, [&](int n, int at, const uint64_t(&kept)[2]) {
            const Pack<float, 2> base = rows.base.template load<2>(at), norm = rows.norm.template load<2>(at);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float weight[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[0][n][2 * half + e];
                    x = this->power(x, base.at[e]);
                    weight[e] = x * norm.at[e];
                    if (EXTRAS && p.dropout) weight[e] *= dropout_factor(kept[e], half);
                }
                if constexpr (DV) weights[0][n / 2][n % 2 * 2 + half] = pack_pair<T>(weight[0], weight[1]);
            }
        });
    }

    // e and dp become ds, rounded.
    __device__ __forceinline__ void differentiate_scores(const Rows &rows, const uint32_t (&slopes)[S_TILES][2],
                                                         uint32_t (&rounded)[1][S_TILES / 2][4]) {
        each_column(rows, [&](int n, int at, const uint64_t(&kept)[2]) {
            const Pack<float, 2> norm = rows.norm.template load<2>(at), centre = rows.centre.template load<2>(at);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float ds[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float dp = grad_weights[0][n][2 * half + e];
                    if (EXTRAS && p.dropout) dp *= dropout_factor(kept[e], half);
                    ds[e] = s[0][n][2 * half + e] * fmaf(dp, norm.at[e], -centre.at[e]);
                }
                if (EXTRAS && p.softcap != 0.0f) bend_gradients(ds[0], ds[1], slopes[n][half]);
                rounded[0][n / 2][n % 2 * 2 + half] = pack_pair<T>(ds[0], ds[1]);
            }
        });
    }

    // The tile of a step, as far as scores need it.
    static __device__ __forceinline__ QueryTile tile_of(const Memory &memory, int step, int group) {
        const Shared<int> note = memory.note(step);
        return {note.get(HEAD), note.get(FIRST_QUERY), note.get(FULL + group) != 0, 0};
    }

    // The walk of one consumer.
    __device__ __forceinline__ void walk_tiles(const Memory &memory, int group) {
        uint32_t weights[1][S_TILES / 2][4], rounded[1][S_TILES / 2][4];  // p and ds
        if (group == 1) arrive_named(TURN, CONSUMERS * WARPGROUP);        // the first turn is the other's
        int step = 0;
#pragma unroll 1
        for (; memory.exists(step); step++) {
            const QTile q = memory.q(step), grad_out = memory.grad_out(step);
            const Rows rows = memory.rows(step, group);
            sync_named(TURN + group, CONSUMERS * WARPGROUP);
            if constexpr (DK) {
                if (step > 0) issue_sums(grad_k[0], rounded[0], memory.q(step - 1));
            }
            issue_transposed(s[0], memory.k, KEYS * group, q);
            wgmma_commit();
            memory.rings.wait_full(GRAD_OUT, step);
            if constexpr (DK) {
                issue_transposed(grad_weights[0], memory.v, KEYS * group, grad_out);
                wgmma_commit();
            }
            arrive_named(TURN + (group ^ 1), CONSUMERS * WARPGROUP);
            wgmma_wait<DK ? 1 : 0>(s[0]);
            if (DK && step > 0) memory.rings.release(Q, step - 1);
            uint32_t slopes[S_TILES][2];
            this->prepare(tile_of(memory, step, group), 0, rows, slopes);
            exponentiate(rows, weights);
            if constexpr (DV) {
                issue_sums(grad_v[0], weights[0], grad_out);
                wgmma_commit();
            }
            if constexpr (DK) {
                wgmma_wait<DV ? 1 : 0>(grad_weights[0]);
                differentiate_scores(rows, slopes, rounded);
            }
            // Before the product is waited for, not after: see sm90_forward.cuh.
            memory.rings.wait_full(Q, step + 1);
            if constexpr (DV) wgmma_wait<0>(grad_v[0]);
            memory.rings.release(GRAD_OUT, step);
            if (!DK) memory.rings.release(Q, step);
        }
        if constexpr (DK) {
            if (step == 0) return;
            issue_sums(grad_k[0], rounded[0], memory.q(step - 1));
            wgmma_commit();
            wgmma_wait<0>(grad_k[0]);
        }
    }

    // The same where both gradients leave no registers for scores and dp beside what becomes of them: beside this consumer's p and ds run the other's
    // products alone. They take no turns, so that either's fill the gaps between the other's.
    __device__ __forceinline__ void walk_tiles_tightly(const Memory &memory, int group) {
        uint32_t weights[1][S_TILES / 2][4], rounded[1][S_TILES / 2][4];  // p and ds
#pragma unroll 1
        for (int step = 0; memory.exists(step); step++) {
            const QTile q = memory.q(step), grad_out = memory.grad_out(step);
            issue_transposed(s[0], memory.k, KEYS * group, q);
            memory.rings.wait_full(GRAD_OUT, step);
            issue_transposed(grad_weights[0], memory.v, KEYS * group, grad_out);
            wgmma_commit();
            wgmma_wait<0>(s[0]);
            wgmma_wait<0>(grad_weights[0]);
            const Rows rows = memory.rows(step, group);
            uint32_t slopes[S_TILES][2];
            this->prepare(tile_of(memory, step, group), 0, rows, slopes);
            this->differentiate(0, rows, slopes);
            round_sums<T>(weights, s);
            round_sums<T>(rounded, grad_weights);
            issue_sums(grad_v[0], weights[0], grad_out);
            issue_sums(grad_k[0], rounded[0], q);
            wgmma_commit();
            memory.rings.wait_full(Q, step + 1);
            wgmma_wait<0>(grad_v[0]);
            wgmma_wait<0>(grad_k[0]);
            memory.rings.release(GRAD_OUT, step);
            memory.rings.release(Q, step);
        }
    }

    __device__ __forceinline__ void consume(const Memory &memory, int group) {
        zero_sums(grad_k), zero_sums(grad_v);
        memory.rings.wait_full(Q, 0);
        if constexpr (TIGHT)
            walk_tiles_tightly(memory, group);
        else
            walk_tiles(memory, group);
        sync_named(GROUP + group, WARPGROUP);  // products of all four warps are done with k and v, through which each writes its rows
        const int row = KEYS * group + warp_row;
        if constexpr (DK)
            store_sums(grad_k, memory.k, row, g.grad_k, g.grad_k_vectors, g.grad_k.at(b, h_kv, sequence.first_k), begin + warp_row, sequence.len_k,
                       p.dim_qk, [&](int, int, float sum) { return sum * p.scale; });
        if constexpr (DV)
            store_sums(grad_v, memory.v, row, g.grad_v, g.grad_v_vectors, g.grad_v.at(b, h_kv, sequence.first_k), begin + warp_row, sequence.len_k,
                       p.dim_v, [](int, int, float sum) { return sum; });
    }

    // group: of a consumer's number, from 1 on; 0 is the producer.
    __device__ __forceinline__ void run(int group) {
        if (begin - larger(group - 1, 0) * KEYS >= sequence.len_k) return;
        SharedArena<1024> arena;
        const Memory memory(arena);
        if (threadIdx.x == 0) {
            memory.rings.prepare(WARPGROUP, CONSUMERS * WARPGROUP);
            memory.heads.set(Q_HEAD, p.q.at(b, 0, sequence.first_q));
            memory.heads.set(GRAD_OUT_HEAD, g.grad_out.at(b, 0, sequence.first_q));
            memory.heads.set(ROW_HEAD, lse_head(p, b, 0, sequence));
        }
        sync_block();
        if (group == 0) {
            lower_registers<PRODUCER_REGISTERS>();
            produce(memory);
        } else {
            raise_registers<CONSUMER_REGISTERS>();
            consume(memory, group - 1);
        }
    }
};

template <typename T, int DIM, bool DK, bool DV, bool EXTRAS>
__global__ void __launch_bounds__(Sm90BackwardKeys<T, DIM, DK, DV, EXTRAS>::THREADS, 1)
    attention_backward_keys_sm90(const __grid_constant__ AttentionGradientParams<T> p, int section, int tiles) {
    // A tile of keys has most queries under a causal mask where it is the first.
    const BlockPlace place = place_of(static_cast<int>(blockIdx.x), section, p.key_entries, tiles);
    // The same for all lanes, which the compiler does not see otherwise: what follows from it then takes no registers of threads.
    const int warp = shuffle(static_cast<int>(threadIdx.x) / WARP, 0);
    Sm90BackwardKeys<T, DIM, DK, DV, EXTRAS>(p, place.entry, tiles - 1 - place.tile, larger(warp - 4, 0)).run(warp / 4);
}

template <typename T, int DIM, bool DK, bool DV, bool EXTRAS>
cudaError_t launch_sm90_backward_keys(const fastattn_cuda_attention_gradient &from) {
    using Kernel = Sm90BackwardKeys<T, DIM, DK, DV, EXTRAS>;
    const AttentionGradientParams<T> p = gradient_params<T>(from, MASK_BLOCK);
    const int tiles = (p.k_tiles + Kernel::CONSUMERS - 1) / Kernel::CONSUMERS;
    const int64_t blocks = static_cast<int64_t>(tiles) * from.call.batch * from.call.heads_kv;
    if (!fits(from.call, blocks)) return cudaErrorInvalidValue;
    const Launch how = {"attention_backward_keys_sm90", dim3(static_cast<unsigned>(blocks)), dim3(Kernel::THREADS), Kernel::SHARED_BYTES,
                        from.call.stream};
    return launch<Kernel::THREADS>(how, attention_backward_keys_sm90<T, DIM, DK, DV, EXTRAS>, p, section_of_keys(from.call), tiles);
}
