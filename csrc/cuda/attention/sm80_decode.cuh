// attention over a key-value cache on mma.sync: compute capability 8.0 and, through PTX, everything after it.
//
// Contract   q (B,Hq,Sq,D), out (B,Hq,Sq,Dv) and lse (B,Hq,Sq) of few queries against the keys in use of a cache: k (B,Hkv,S,D) and v (B,Hkv,S,Dv),
//            or pages (pages, page size, Hkv, D) that block_table names; float16 or bfloat16, any strides, D and Dv up to DIM. Query i sits at
//            position cache_length - Sq + i: the band and the distance biases are about it; intervals and the dense bias count places in the cache.
//            A key that intervals or the bias hide from all rows of a block counts as zeros and is not read. Lengths and pages beyond the cache are
//            clamped to it. A query that sees no key gets 0 and -inf. Lengths are read by the kernel alone.
// Numerics   s, statistics and sums in float32. p = e^(s - maximum) is multiplied with v as 2^10 p, so that float16 holds what is small, and in two
//            parts, what rounding takes off being the second: the products of few rows cost little, and with one query of one value column there
//            are no others whose errors would make up for those of rounded weights.
// Algorithm  Time is that of reading the cache once. The rows of a block are queries of all heads that share a key head, so that a key is read once
//            for all of them. A block takes one part of the keys; warps share a tile of KEYS keys by rows and by keys, each with a softmax of
//            its own. Tiles of k and v follow one another through SLOTS places of shared memory, three on their way while one is used. Where
//            each key lies, which takes a look at the block table, is found one tile ahead. At the end the warps of a row, and then in a second
//            kernel the parts, are put together in order (Flash-Decoding, Dao et al. 2023): results are bitwise repeatable. With one part the
//            first kernel finishes alone; blocks of parts behind a sequence's end leave at once.
// Measured   Nothing: it has not run on a GPU yet, only in the emulation. Tile sizes and parts are chosen from what registers and shared memory
//            allow: two blocks of D 128 on a multiprocessor of 8.0, three of 9.0, one of 8.6.
#pragma once
#include <primitives/launch.cuh>

#include "decode_combine.cuh"
#include "scores.cuh"
#include "tile.cuh"

constexpr float HEADROOM = 1024.0f;  // products of p and v are summed up times this

template <typename T, int DIM, int TILE_KEYS, int ROW_WARPS, int KEY_WARPS>
struct Sm80Decode {
    static constexpr int KEYS = TILE_KEYS, ROWS = 16 * ROW_WARPS, THREADS = ROW_WARPS * KEY_WARPS * WARP;
    static constexpr int STEPS = KEYS / KEY_WARPS / 16;  // of 16 keys, per warp and tile
    static constexpr int O_TILES = DIM / 8, CHUNKS = DIM / 8, SLOTS = 4;
    using QTile = Tile<T, ROWS, DIM>;
    using Ring = Tile<T, SLOTS * KEYS, DIM>;  // k of tile t in slot 2 t % SLOTS, v in the next
    static constexpr int MERGED = KEY_WARPS * ROWS * DIM;
    static constexpr int SHARED_BYTES = (QTile::SIZE + Ring::SIZE) * 2 + 2 * KEYS * 16 + ROWS * MAX_INTERVALS * 8;
    static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on devices of compute capability 8.6, 8.9 and 12.0");
    static_assert(MERGED * 4 <= Ring::SIZE * 2 && KEY_WARPS * ROWS * 8 <= QTile::SIZE * 2, "what finish() puts in place of the tiles");
    static_assert(KEYS <= THREADS && STEPS > 0 && SLOTS == 4);

    const DecodeParams<T> &p;
    int b, head_kv, part, first_row;  // of the block; rows count within the head group, query by query, head by head
    int origin;                       // position of query 0
    int begin, end;                   // keys of this part that some row may see
    int warp_row, warp_key;           // of this warp within the block and within a tile
    float s[STEPS][2][4], o[O_TILES][4], base[2], sum[2];

    struct Row {
        int head, query;
    };
    struct Shares {  // where things lie in shared memory
        QTile q;
        Ring ring;
        Shared<int64_t> places;  // (2, KEYS, 2): where k and v of a tile's keys lie; negative: nobody sees the key
        Shared<int> spans;       // (ROWS, n_spans, 2): what a row sees of the cache
    };

    __device__ __forceinline__ Sm80Decode(const DecodeParams<T> &params, int entry, int part_, int tile)
        : p(params),
          b(entry / params.heads_kv),
          head_kv(entry % params.heads_kv),
          part(part_),
          first_row(tile * ROWS),
          warp_row(static_cast<int>(threadIdx.x) / WARP / KEY_WARPS * 16),
          warp_key(static_cast<int>(threadIdx.x) / WARP % KEY_WARPS * 16 * STEPS) {}

    __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % WARP; }
    // Row within the block of accumulator half `half`.
    __device__ __forceinline__ int own_row(int half) const { return warp_row + 8 * half + lane() / 4; }
    // Key within the tile of element e of the n-th eight keys of a step.
    __device__ __forceinline__ int own_key(int step, int n, int e) const { return warp_key + 16 * step + 8 * n + lane() % 4 * 2 + e % 2; }
    // Head and query of a row of the block that is there.
    __device__ __forceinline__ Row row_at(int r) const {
        const unsigned row = static_cast<unsigned>(first_row + r), len_q = static_cast<unsigned>(p.len_q);
        return {head_kv * p.group + static_cast<int>(row / len_q), static_cast<int>(row % len_q)};
    }
    __device__ __forceinline__ int rows_here() const { return smaller(ROWS, p.rows - first_row); }
    __device__ __forceinline__ int n_spans() const { return larger(p.n_intervals, 1); }
    // Of a row of the block among the rows of all groups.
    __device__ __forceinline__ int64_t row_number(int r) const { return (static_cast<int64_t>(b) * p.heads_kv + head_kv) * p.rows + first_row + r; }

    // N rows of a tile from row `first` on: the n-th from element at(n) of `from`, zeros where that is negative. 16-byte copies are under way when
    // this returns, in the group that is open.
    template <int N, int HEIGHT, typename At>
    __device__ __forceinline__ void copy(const Tile<T, HEIGHT, DIM> &to, int first, const Strided<const T> &from, bool vectors, int width,
                                         const At &at) const {
        static_assert(N * CHUNKS % THREADS == 0);
        const unsigned thread = threadIdx.x;
        const auto bits = to.data.template as<uint16_t>();
        if (vectors) {
#pragma unroll
            for (unsigned i = 0; i < N * CHUNKS; i += THREADS) {
                const int n = static_cast<int>((i + thread) / CHUNKS), column = static_cast<int>((i + thread) % CHUNKS * 8);
                const int64_t source = at(n);
                if (source >= 0 && column < width)
                    copy_async(to.data, to.at(first + n, column), from.data, source + column);
                else
                    bits.template store<8>(to.at(first + n, column), {});
            }
            return;
        }
#pragma unroll 1
        for (unsigned i = thread; i < N * CHUNKS; i += THREADS) {
            const int n = static_cast<int>(i / CHUNKS), column = static_cast<int>(i % CHUNKS * 8);
            const int64_t source = at(n);
            Pack<uint16_t, 8> chunk = {};
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (source >= 0 && column + j < width) chunk.at[j] = from.data.template as<const uint16_t>().get(source + column + j);
            bits.template store<8>(to.at(first + n, column), chunk);
        }
    }
    __device__ __forceinline__ void copy_keys(const Shares &shared, int tile) const {
        if (begin + tile * KEYS < end)
            copy<KEYS>(shared.ring, 2 * tile % SLOTS * KEYS, p.k, p.k_vectors, p.dim_qk,
                       [&](int n) { return shared.places.get((tile % 2 * KEYS + n) * 2); });
        copy_async_commit();
    }
    __device__ __forceinline__ void copy_values(const Shares &shared, int tile) const {
        if (begin + tile * KEYS < end)
            copy<KEYS>(shared.ring, (2 * tile + 1) % SLOTS * KEYS, p.v, p.v_vectors, p.dim_v,
                       [&](int n) { return shared.places.get((tile % 2 * KEYS + n) * 2 + 1); });
        copy_async_commit();
    }

    // What each row of the block sees of the cache, as spans of keys: its band, and each interval within it. Rows that are not there see nothing.
    __device__ __forceinline__ void fill_spans(const Shared<int> &spans, int length) const {
        for (int i = static_cast<int>(threadIdx.x); i < ROWS * n_spans(); i += THREADS) {
            const int r = i / n_spans(), interval = i % n_spans();
            Pack<int, 2> span = {{0, 0}};
            if (first_row + r < p.rows) {
                const Row row = row_at(r);
                const int position = origin + row.query;
                span = {{larger(0, position + p.band_low), smaller(length, position + p.band_high)}};
                if (p.n_intervals > 0) {
                    const int64_t pair = p.intervals.at(b, row.head, row.query) + interval * p.interval_stride;
                    span = {{larger(span.at[0], p.intervals.data.get(pair)), smaller(span.at[1], p.intervals.data.get(pair + 1))}};
                }
            }
            spans.template store<2>(2 * i, span);
        }
    }
    // Leaves of the part's keys those between the first and the last that a row sees.
    __device__ __forceinline__ void narrow(const Shared<int> &spans) {
        int low = end, high = begin;
        for (int i = lane(); i < ROWS * n_spans(); i += WARP) {
            const Pack<int, 2> span = spans.template load<2>(2 * i);
            if (span.at[0] >= span.at[1]) continue;
            low = smaller(low, span.at[0]);
            high = larger(high, span.at[1]);
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            low = smaller(low, shuffle_xor(low, step));
            high = larger(high, shuffle_xor(high, step));
        }
        begin = larger(begin, low);
        end = smaller(end, high);
    }

    __device__ __forceinline__ bool sees(const Shared<int> &spans, int r, int key) const {
        bool seen = false;
        for (int i = 0; i < n_spans(); i++) {
            const Pack<int, 2> span = spans.template load<2>(2 * (r * n_spans() + i));
            seen = seen || (span.at[0] <= key && key < span.at[1]);
        }
        return seen;
    }
    __device__ __forceinline__ float bias_at(const Row &row, int key) const { return dense_bias(p, b, row.head, row.query, key); }
    // Whether some row of the block sees a key of the part. Under a band alone nobody asks: all keys between the first and the last are seen by
    // some query, be it another block's.
    __device__ __forceinline__ bool lives(const Shared<int> &spans, int key) const {
        if (p.n_intervals == 0 && !p.bias) return true;
        for (int r = 0; r < rows_here(); r++)
            if (sees(spans, r, key) && !(p.bias && bias_at(row_at(r), key) == -INFINITY)) return true;
        return false;
    }
    // Where k and v of this thread's key of a tile lie.
    __device__ __forceinline__ Pack<int64_t, 2> find(const Shared<int> &spans, int tile) const {
        const int key = begin + tile * KEYS + static_cast<int>(threadIdx.x);
        if (static_cast<int>(threadIdx.x) >= KEYS || key >= end || !lives(spans, key)) return {{-1, -1}};
        int entry = b, within = key;
        if (p.block_table) {
            if (p.pages == 0) return {{-1, -1}};
            const unsigned size = static_cast<unsigned>(p.page_size), page = static_cast<unsigned>(key) / size;
            entry = clamp(p.block_table.get(b * p.table_stride + page), 0, p.pages - 1);
            within = static_cast<int>(static_cast<unsigned>(key) % size);
        }
        return {{p.k.at(entry, head_kv, within), p.v.at(entry, head_kv, within)}};
    }
    __device__ __forceinline__ void settle(const Shared<int64_t> &places, int tile, const Pack<int64_t, 2> &place) const {
        if (static_cast<int>(threadIdx.x) < KEYS) places.template store<2>((tile % 2 * KEYS + static_cast<int>(threadIdx.x)) * 2, place);
    }

    __device__ __forceinline__ void score(const QTile &q, const Ring &ring, int slot) {
        each([](float &x, int, int) { x = 0.0f; });
        sync_warp();  // copying may have parted the lanes, and the products need all of them
#pragma unroll
        for (int d = 0; d < DIM; d += 16) {
            uint32_t left[4];
            q.left_operand(left, warp_row, d);
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                uint32_t right[4];
                ring.right_transposed(right, slot * KEYS + warp_key + 16 * step, d);
                mma<T>(s[step][0], left, right[0], right[1]);
                mma<T>(s[step][1], left, right[2], right[3]);
            }
        }
    }

    // Calls f(score, half, key within the tile) for each of this thread's scores.
    template <typename F>
    __device__ __forceinline__ void each(const F &f) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) f(s[step][n][2 * half + e], half, own_key(step, n, e));
    }

    // Products become scores, capped and biased, and what a row does not see becomes -inf. In natural units, in which a finite bias is finite.
    __device__ __forceinline__ void prepare(const Shared<int> &spans, int first_key) {
        const float factor = p.softcap != 0.0f ? p.scale / p.softcap : p.scale;
        each([&](float &x, int, int) { x *= factor; });
        if (p.softcap != 0.0f) each([&](float &x, int, int) { x = p.softcap * tanhf(x); });
        if (p.distance) {
            each([&](float &x, int half, int key) {
                if (first_row + own_row(half) >= p.rows) return;
                const Row row = row_at(own_row(half));
                const float bias = distance_bias(p.distance, b, row.head, first_key + key - row.query - origin);
                x = sum_of(x, bias, bias);
            });
        }
        if (p.n_intervals == 0) {
            const Pack<int, 2> span[2] = {spans.template load<2>(2 * own_row(0)), spans.template load<2>(2 * own_row(1))};
            each([&](float &x, int half, int key) {
                if (first_key + key < span[half].at[0] || first_key + key >= smaller(span[half].at[1], end)) x = -INFINITY;
            });
        } else {
            each([&](float &x, int half, int key) {
                if (first_key + key >= end || !sees(spans, own_row(half), first_key + key)) x = -INFINITY;
            });
        }
        if (p.bias)
            each([&](float &x, int half, int key) {
                if (x == -INFINITY) return;  // not seen: the bias may not reach so far, and may hold anything
                const float bias = bias_at(row_at(own_row(half)), first_key + key);
                x = bias == -INFINITY ? bias : sum_of(x, bias, bias);
            });
    }

    // p = e^(s - base) in place of s; what is summed up so far follows where a row's base moves.
    __device__ __forceinline__ void soften() {
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float greatest = -INFINITY;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int e = 0; e < 4; e++) greatest = fmaxf(greatest, s[step][e / 2][2 * half + e % 2]);
            greatest = fmaxf(greatest, shuffle_xor(greatest, 1));
            greatest = fmaxf(greatest, shuffle_xor(greatest, 2));
            const float before = base[half];
            base[half] = fmaxf(before, greatest);
            const float zero = base[half] == -INFINITY ? 0.0f : base[half];
            shrink[half] = base[half] == before ? 1.0f : exp2_fast((before - zero) * LOG2E);
            sum[half] *= shrink[half];
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float &x = s[step][e / 2][2 * half + e % 2];
                    x = exp2_fast((x - zero) * LOG2E);
                    sum[half] += x;
                }
        }
        if (!warp_any(shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[n][e] *= shrink[e / 2];
    }

    __device__ __forceinline__ void accumulate(const Ring &ring, int slot) {
        sync_warp();  // as in score()
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t high[4], low[4];  // rounded to the dtype of v, and what that takes off
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float first = HEADROOM * s[step][i / 2][i % 2 * 2], second = HEADROOM * s[step][i / 2][i % 2 * 2 + 1];
                float rounded[2];
                high[i] = pack_pair<T>(first, second);
                unpack_pair<T>(high[i], rounded[0], rounded[1]);
                low[i] = pack_pair<T>(first - rounded[0], second - rounded[1]);
            }
#pragma unroll
            for (int n = 0; n < O_TILES; n += 2) {
                uint32_t right[4];
                ring.right_operand(right, slot * KEYS + warp_key + 16 * step, 8 * n);
                mma<T>(o[n], low, right[0], right[1]);
                mma<T>(o[n + 1], low, right[2], right[3]);
                mma<T>(o[n], high, right[0], right[1]);
                mma<T>(o[n + 1], high, right[2], right[3]);
            }
        }
    }

    // What the warps of a row leave of it, in place of the tiles: base and sum, and the sums of its columns, those of the rows that a warp writes
    // at once in different banks.
    static __device__ __forceinline__ int statistics_at(int key_warp, int r) { return (key_warp * ROWS + r) * 2; }
    static __device__ __forceinline__ int merged_at(int key_warp, int r, int column) { return (key_warp * ROWS + r) * DIM + (column ^ r % 4 * 8); }
    static __device__ __forceinline__ float top_of(const Shared<float> &statistics, int r) {
        float top = -INFINITY;
#pragma unroll
        for (int w = 0; w < KEY_WARPS; w++) top = fmaxf(top, statistics.get(statistics_at(w, r)));
        return top;
    }

    // Puts the warps of each row together and writes out and lse, or what decode_combine makes them of.
    __device__ __forceinline__ void finish(const Shares &shared) {
        const int key_warp = static_cast<int>(threadIdx.x) / WARP % KEY_WARPS;
        const Shared<float> statistics = shared.q.data.template as<float>(), merged = shared.ring.data.template as<float>();
        sync_block();  // every warp is done with the tiles
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] += shuffle_xor(sum[half], 1);
            sum[half] += shuffle_xor(sum[half], 2);
            if (lane() % 4 == 0) statistics.template store<2>(statistics_at(key_warp, own_row(half)), {{base[half], sum[half]}});
        }
        sync_block();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float share = share_of(base[half], top_of(statistics, own_row(half))) / HEADROOM;
#pragma unroll
            for (int n = 0; n < O_TILES; n++) {
                const int column = 8 * n + lane() % 4 * 2;
                merged.template store<2>(merged_at(key_warp, own_row(half), column), {{o[n][2 * half] * share, o[n][2 * half + 1] * share}});
            }
        }
        sync_block();
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += THREADS) {
            const int r = static_cast<int>(static_cast<unsigned>(i) / CHUNKS), column = static_cast<int>(static_cast<unsigned>(i) % CHUNKS * 8);
            if (r >= rows_here() || column >= p.dim_v) continue;
            const float top = top_of(statistics, r);
            float total = 0.0f;
            Pack<float, 4> values[2] = {};
#pragma unroll
            for (int w = 0; w < KEY_WARPS; w++) {
                const Pack<float, 2> of_warp = statistics.template load<2>(statistics_at(w, r));
                total += of_warp.at[1] * share_of(of_warp.at[0], top);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const Pack<float, 4> own = merged.template load<4>(merged_at(w, r, column) + 4 * j);
#pragma unroll
                    for (int e = 0; e < 4; e++) values[j].at[e] += own.at[e];
                }
            }
            if (p.parts == 1)
                write_out(r, column, values, top, total);
            else
                write_part(r, column, values, top, total);
        }
    }

    // Eight columns of a row; the first ones bring its lse.
    __device__ __forceinline__ void write_out(int r, int column, const Pack<float, 4> (&values)[2], float top, float total) const {
        const Row row = row_at(r);
        const Normal normal(top, total, p.sinks, row.head);
        if (column == 0) p.lse.set(row_number(r), normal.lse);
        const int64_t at = p.out.at(b, row.head, row.query) + column;
        Pack<T, 8> chunk;
#pragma unroll
        for (int j = 0; j < 8; j++) chunk.at[j] = from_float<T>(normal.of(values[j / 4].at[j % 4]));
        if (p.out_vectors) {
            p.out.data.template store<8>(at, chunk);
            return;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (column + j < p.dim_v) p.out.data.set(at + j, chunk.at[j]);
    }
    __device__ __forceinline__ void write_part(int r, int column, const Pack<float, 4> (&values)[2], float top, float total) const {
        const int64_t number = part * p.all_rows() + row_number(r), at = number * p.dim_v + column;
        if (column == 0) p.statistics.template store<2>(number * 2, {{top, total}});
        if (p.dim_v % 8 == 0) {
            p.sums.template store<4>(at, values[0]);
            p.sums.template store<4>(at + 4, values[1]);
            return;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (column + j < p.dim_v) p.sums.set(at + j, values[j / 4].at[j % 4]);
    }

    __device__ __forceinline__ void run() {
        const int length = p.cache_lengths ? clamp(p.cache_lengths.get(b), 0, p.room) : p.room;
        origin = length - p.len_q;
        const int last = origin + p.len_q - 1, low = larger(0, origin + p.band_low);
        const int64_t from = low + static_cast<int64_t>(part) * p.part_keys;
        begin = clamp(from, 0, FAR);
        end = smaller(smaller(length, last + p.band_high), clamp(from + p.part_keys, 0, FAR));
        if (begin >= end && p.parts > 1) {  // decode_combine passes over what has no total
            for (int r = static_cast<int>(threadIdx.x); r < rows_here(); r += THREADS)
                p.statistics.template store<2>((part * p.all_rows() + row_number(r)) * 2, {{-INFINITY, 0.0f}});
            return;
        }
        SharedArena arena;
        const Shares shared = {
            {arena.take<T>(QTile::SIZE)}, {arena.take<T>(Ring::SIZE)}, arena.take<int64_t>(2 * KEYS * 2), arena.take<int>(ROWS * MAX_INTERVALS * 2)};
        fill_spans(shared.spans, length);
        sync_block();
        narrow(shared.spans);
#pragma unroll
        for (int half = 0; half < 2; half++) base[half] = -INFINITY, sum[half] = 0.0f;
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[n][e] = 0.0f;
        const Pack<int64_t, 2> first = find(shared.spans, 0), second = find(shared.spans, 1);
        settle(shared.places, 0, first);
        settle(shared.places, 1, second);
        copy<ROWS>(shared.q, 0, p.q, p.q_vectors, p.dim_qk, [&](int r) {
            if (r >= rows_here()) return int64_t(-1);
            const Row row = row_at(r);
            return p.q.at(b, row.head, row.query);
        });
        sync_block();
        const Pack<int64_t, 2> third = find(shared.spans, 2);
        copy_keys(shared, 0);
        copy_values(shared, 0);
        copy_keys(shared, 1);
        sync_block();  // every thread has taken the places of tile 0
        settle(shared.places, 2, third);
        const bool busy = warp_row < rows_here();  // warps without rows only copy
        for (int tile = 0; begin + tile * KEYS < end; tile++) {
            copy_async_wait<SLOTS - 2>();
            sync_block();  // k has come, and every warp is done with the slot that is filled next
            copy_values(shared, tile + 1);
            if (busy) {
                score(shared.q, shared.ring, 2 * tile % SLOTS);
                prepare(shared.spans, begin + tile * KEYS);
                soften();
            }
            copy_async_wait<SLOTS - 2>();
            sync_block();  // v has come, and every warp is done with k
            copy_keys(shared, tile + 2);
            const Pack<int64_t, 2> place = find(shared.spans, tile + 3);
            if (busy) accumulate(shared.ring, (2 * tile + 1) % SLOTS);
            settle(shared.places, tile + 3, place);
        }
        copy_async_wait<0>();
        finish(shared);
    }
};

template <typename T, int DIM, int KEYS, int ROW_WARPS, int KEY_WARPS>
__global__ void __launch_bounds__(Sm80Decode<T, DIM, KEYS, ROW_WARPS, KEY_WARPS>::THREADS, 1)
    attention_decode_sm80(const __grid_constant__ DecodeParams<T> p) {
    const unsigned block = blockIdx.x, tiles = static_cast<unsigned>(p.tiles), parts = static_cast<unsigned>(p.parts);
    Sm80Decode<T, DIM, KEYS, ROW_WARPS, KEY_WARPS>(p, static_cast<int>(block / tiles / parts), static_cast<int>(block / tiles % parts),
                                                   static_cast<int>(block % tiles))
        .run();
}

template <typename T, int DIM, int KEYS, int ROW_WARPS, int KEY_WARPS>
cudaError_t launch_sm80_decode(const fastattn_cuda_decode &call) {
    using Kernel = Sm80Decode<T, DIM, KEYS, ROW_WARPS, KEY_WARPS>;
    const bool has_room = call.parts == 1 || (call.sums && call.statistics);
    if (!fits(call, Kernel::ROWS) || call.problem.n_intervals > MAX_INTERVALS || !has_room) return cudaErrorInvalidValue;
    const DecodeParams<T> p = decode_params<T>(call, Kernel::ROWS);
    const unsigned blocks = static_cast<unsigned>(p.batch) * static_cast<unsigned>(p.heads_kv) * static_cast<unsigned>(p.tiles * p.parts);
    const Launch how = {"attention_decode_sm80", dim3(blocks), dim3(Kernel::THREADS), Kernel::SHARED_BYTES, call.stream};
    const cudaError_t error = launch<Kernel::THREADS>(how, attention_decode_sm80<T, DIM, KEYS, ROW_WARPS, KEY_WARPS>, p);
    if (error != cudaSuccess || p.parts == 1) return error;
    constexpr int ROWS = COMBINE_THREADS / WARP;
    const Launch then = {"decode_combine", dim3(static_cast<unsigned>((p.all_rows() + ROWS - 1) / ROWS)), dim3(COMBINE_THREADS), 0, call.stream};
    return launch<COMBINE_THREADS>(then, decode_combine<T>, p);
}
