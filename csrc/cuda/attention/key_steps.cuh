// What the kernels on wgmma share that walk over keys: the steps of a walk, their copies by the first warpgroup, and a note of each.
#pragma once
#include "query_block.cuh"
#include "swizzled_tile.cuh"

// Over QueryBlock or what is made of it, Base, whose steps are TILES whole tiles of keys. NOTES: how many steps are noted at a time.
template <typename T, int DIM, int ROWS, bool EXTRAS, typename Base, int TILES, int NOTES>
struct KeySteps : Base {
    using Base::b, Base::h, Base::p, Base::sequence;
    using Base::DISTANCES;
    using Producer = FirstThreads<WARPGROUP, 1>;
    using Walk = MaskWalk<ROWS, EXTRAS, Producer>;
    using Copy = TileCopy<T, DIM, WARPGROUP, true>;
    using QTile = SwizzledTile<T, ROWS, DIM>;
    using KTile = SwizzledTile<T, TILES * KEYS, DIM>;  // of k or v

    // What is noted of a step: the first key of each of its tiles, negative where there is none, as of all where the walk has ended; whether they
    // are full. Words and distances of each tile lie in arrays of their own.
    enum { FIRST_KEY, FULL = TILES, NOTE = 2 * TILES };
    using Note = Pack<int, NOTE>;

    struct Notes {
        Shared<int> notes;
        Shared<uint64_t> words;
        Shared<float> distances;

        static constexpr int BYTES = (NOTES * NOTE * 4 + 15) / 16 * 16 + NOTES * TILES * (ROWS * 8 + DISTANCES * 4);

        __device__ __forceinline__ explicit Notes(SharedArena<1024> &arena)
            : notes(arena.take<int>(NOTES * NOTE)),
              words(arena.take<uint64_t>(NOTES * TILES * ROWS)),
              distances(arena.take<float>(NOTES * TILES * DISTANCES)) {}

        __device__ __forceinline__ Shared<int> note(int step) const { return notes.from(step % NOTES * NOTE); }
        // Whether there is a step of this number. By a vote, from which the compiler sees that a warp's lanes agree on their steps.
        __device__ __forceinline__ bool exists(int step) const { return warp_any(note(step).get(FIRST_KEY) >= 0); }
        __device__ __forceinline__ Shared<uint64_t> words_of(int step, int tile) const { return words.from((step % NOTES * TILES + tile) * ROWS); }
        __device__ __forceinline__ Shared<float> distances_of(int step, int tile) const {
            return distances.from((step % NOTES * TILES + tile) * DISTANCES);
        }
    };

    // A tile of keys as far as copies need it.
    struct Keys {
        int begin;
        uint64_t alive;
    };

    using Base::Base;

    // The tiles of the next step. All threads of the first warpgroup call this.
    static __device__ __forceinline__ void next(Walk &walk, KeyTile (&tiles)[TILES], Keys (&keys)[TILES]) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            tiles[i] = i > 0 && tiles[0].begin < 0 ? tiles[0] : next(walk);
            keys[i] = {tiles[i].begin, tiles[i].keys};
        }
    }

    __device__ __forceinline__ void write_note(const Notes &notes, int step, const Walk &walk, const KeyTile (&tiles)[TILES]) const {
        Note note;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            note.at[FIRST_KEY + i] = tiles[i].begin, note.at[FULL + i] = tiles[i].full;
            if (tiles[0].begin < 0) continue;
            // Of a tile that is not there nobody sees anything: consumers need no case of its own, which would cost their accumulators' places.
            this->template fill_words<WARPGROUP>(notes.words_of(step, i), walk, tiles[i]);
            if (EXTRAS && p.distance) this->template fill_distances<WARPGROUP>(notes.distances_of(step, i), tiles[i].begin);
        }
        if (threadIdx.x == 0) notes.note(step).template store<NOTE>(0, note);
    }

    // Copies tiles of keys into the place of a step; zeros where there are no more.
    __device__ __forceinline__ void fetch(const Copy &copy, const KTile &to, const Strided<const T> &from, bool vectors, int64_t head_at, int width,
                                          const Keys (&keys)[TILES]) const {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const uint64_t alive = keys[i].alive >> copy.row;
            copy.load(to.template rows<KEYS>(i * KEYS), from, vectors, head_at, static_cast<unsigned>(larger(keys[i].begin, 0)),
                      static_cast<unsigned>(width), keys[i].alive == ~uint64_t(0), [&](int n) { return alive >> n & 1; });
        }
    }

    // Products with the keys of a step become scores, by those who only have its note, which is returned.
    template <typename NoteBend>
    __device__ __forceinline__ Note prepare_step(const Notes &notes, int step, const NoteBend &note_bend) {
        const Note note = notes.note(step).template load<NOTE>(0);
        prepare_tile<0>(notes, step, note, note_bend);
        if constexpr (TILES == 2) prepare_tile<1>(notes, step, note, note_bend);
        return note;
    }

private:
    static __device__ __forceinline__ KeyTile next(Walk &walk) {
        const KeyTile tile = walk.next();
        Producer::sync();
        walk.settle();
        Producer::sync();
        return tile;
    }

    template <int TILE, typename NoteBend>
    __device__ __forceinline__ void prepare_tile(const Notes &notes, int step, const Note &note, const NoteBend &note_bend) {
        const MaskView<EXTRAS> view(p.mask, sequence, b, h, note.at[FULL + TILE]);
        this->template prepare<TILE * KEYS / 8>(view, note.at[FIRST_KEY + TILE], 0, notes.words_of(step, TILE), notes.distances_of(step, TILE),
                                                note_bend);
    }
};
