// norm backward: the gradients of norm_forward.cu.
//
// Contract   With n = (z - mean) rstd and g = grad_y (offset + weight), and without mean(g) for RMS:
//            dz = rstd (g - mean(g) - n mean(g n)) + grad_z, grad_x = dropout'(dz), grad_residual = dz,
//            grad_weight = sum over rows of grad_y n, grad_bias = sum over rows of grad_y.
// Numerics   float32, one rounding per output. Every sum has an order that rows, width and `parts` fix: bitwise repeatable.
// Algorithm  A block of up to 512 threads holds as many rows side by side as fit, one or two chunks of eight columns per thread, and each team walks
//            over rows of its own. While a team works on one row its next two are on their way to shared memory. A thread keeps the weight
//            gradients of its columns in registers; a block adds up its teams' and writes one row of partial sums, and a second kernel adds those
//            up in the dtype that is wanted. Rows of more than 8,192 columns are done without sums, which a kernel of their own then makes.
// Measured   H100 80GB HBM3, bf16, share of a large copy's 2.40 TB/s, L2 flushed before each call (LayerNorm / RMSNorm at 4,096 x 4,096), of all
//            that a backward launches:
//            0.35 / 0.40  rows as float32, 167 registers and one block of 256 threads per multiprocessor, sums added up by torch
//            0.57 / 0.66  rows as they lie in memory, the next one under way, sums added up here; two waves of blocks
//            0.68 / 0.74  one block of 512 threads per multiprocessor; 0.90 / 0.99 with a residual, 0.97 / 1.05 at 8,192 columns
//            The copy of that run was a graph's memcpy; by a kernel such a chip was seen to copy 3.0 TB/s, of which the last shares are 0.55 / 0.60.
//            Triton's: 0.49 / 0.78; torch's 0.44 / 0.46. Rows of more than 8,192 columns are read twice: 0.44 / 0.48 at 12,288, Triton 0.57 / 0.60.
//            H200, us at 4,096 x 4,096 (2026-11-27, nvidia-h200-2026-11-27; a large copy, at 4.28 TB/s, would take 23.6):
//            56.4 / 51.5  no more steps across warps than there are warps (team_sums)
//            51.8 / 46.1  dtypes known when compiled, terms of one chunk kept in registers: 354 instructions for a row instead of 478; Triton's 78.8 /
//                         46.7, torch's 71.9 / 67.8
//            not timed    half dtypes: two chunks to a thread and two teams to a block at 4,096 columns, two rows of each on their way by cp.async: a
//                         multiprocessor has 64 KB under way instead of 16, and a row takes 24 instructions an element instead of 44 (sm_90)
#include <primitives/copy_async.cuh>
#include <type_traits>

#include "device_guard.cuh"
#include "norm.cuh"

namespace {

constexpr int THREADS = 512, MOST_CHUNKS = 2, WIDE_CHUNKS = 3;
constexpr int64_t SUMS_WIDTH = THREADS * MOST_CHUNKS * CHUNK;
constexpr int COLUMNS = 32, PARTS_BESIDE = 8;  // of a block of norm_column_sums_kernel
constexpr int ROWS_AHEAD = 2;                  // of each team, on their way to shared memory
constexpr int MAX_TEAMS = 15;                  // of more than one warp: barriers (exchange)
constexpr int PIECE = 8;                       // halves that one asynchronous copy moves: a chunk

struct Backward {
    Elements grad_y, grad_z, z, weight, grad_x, grad_residual, grad_weight, grad_bias;
    Global<float> weight_parts, bias_parts;
    Global<const float> mean, rstd;
    Dropout dropout;
    int64_t rows, parts;
    int width;
    float per_width, offset;
};

// What one thread has of a row.
template <int CHUNKS>
struct Row {
    RawChunk grad_y[CHUNKS], z[CHUNKS], grad_z[CHUNKS];
    float mean, rstd;
};

template <bool VECTOR, int DTYPE, int EACH>
__device__ __forceinline__ RawChunk load_grad_z(const Backward &p, const Team<EACH> &team, int64_t row, int k) {
    return load_if<VECTOR, DTYPE>(p.grad_z, team.place(row, k), team.count(k));
}

// All but grad_z.
template <bool VECTOR, int DTYPE, int CHUNKS, int EACH>
__device__ __forceinline__ Row<CHUNKS> load_row(const Backward &p, const Team<EACH> &team, int64_t row) {
    Row<CHUNKS> found = {};
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        found.grad_y[k] = load_raw<VECTOR, DTYPE>(p.grad_y, team.place(row, k), team.count(k));
        found.z[k] = load_raw<VECTOR, DTYPE>(p.z, team.place(row, k), team.count(k));
    }
    if (p.mean) found.mean = p.mean.get(row);
    found.rstd = p.rstd.get(row);
    return found;
}

__device__ __forceinline__ int thread_of_block() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }
__device__ __forceinline__ int threads_of_block() { return static_cast<int>(blockDim.x * blockDim.y); }

// Half dtypes without dropout: their next rows are on their way to shared memory, and registers hold g and n between their two uses.
template <bool VECTOR, int DTYPE, bool DROPOUT>
constexpr bool IS_ASYNC = VECTOR && DTYPE != ANY_DTYPE && !DROPOUT;

// The rows of a team, one after the other: ROWS_AHEAD on their way to shared memory, where a thread reads only what it brought itself, so that nobody
// waits for anybody.
template <int DTYPE, int CHUNKS, int EACH>
class RowsByCopy {
public:
    __device__ RowsByCopy(const Backward &p, const Team<EACH> &team, const Shared<uint16_t> &slots, int64_t step)
        : p_(p), team_(team), slots_(slots), step_(step) {}

    __device__ __forceinline__ void begin(int64_t row) {
#pragma unroll
        for (int slot = 0; slot < ROWS_AHEAD; slot++) bring(row + slot * step_, slot);
        load_statistics(row);
    }
    // The row whose turn it is.
    __device__ __forceinline__ Row<CHUNKS> take(int64_t) {
        Row<CHUNKS> now = {};
        now.mean = mean_;
        now.rstd = rstd_;
        copy_async_wait<ROWS_AHEAD - 1>();
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            if (team_.count(k) <= 0) continue;
            now.grad_y[k].low = slots_.load_as<Pack<uint32_t, 4>>(place(slot_, 2 * k));
            now.z[k].low = slots_.load_as<Pack<uint32_t, 4>>(place(slot_, 2 * k + 1));
            if (p_.grad_z) now.grad_z[k].low = slots_.load_as<Pack<uint32_t, 4>>(place_of_grad_z(slot_, k));
        }
        return now;
    }
    // Once that row has been used: the next that finds room.
    __device__ __forceinline__ void refill(int64_t row) {
        bring(row + ROWS_AHEAD * step_, slot_);
        slot_ = slot_ + 1 == ROWS_AHEAD ? 0 : slot_ + 1;
        load_statistics(row + step_);
    }
    __device__ __forceinline__ RawChunk grad_z(const Row<CHUNKS> &now, int64_t, int k) const { return now.grad_z[k]; }

private:
    __device__ __forceinline__ void load_statistics(int64_t row) {
        if (row >= p_.rows) return;
        if (p_.mean) mean_ = p_.mean.get(row);
        rstd_ = p_.rstd.get(row);
    }
    // What a warp brings lies together, so that all but its beginning is known when this is compiled; grad_z, if there is one, behind all the rest.
    __device__ __forceinline__ int place(int slot, int piece, int pieces = 2 * CHUNKS) const {
        const int warp = thread_of_block() / WARP, lane = thread_of_block() % WARP;
        return (((warp * ROWS_AHEAD + slot) * pieces + piece) * WARP + lane) * PIECE;
    }
    __device__ __forceinline__ int place_of_grad_z(int slot, int k) const {
        return threads_of_block() * (ROWS_AHEAD * 2 * CHUNKS * PIECE) + place(slot, k, CHUNKS);
    }
    __device__ __forceinline__ void bring(int64_t row, int slot) const {
        if (row < p_.rows)
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) {
                if (team_.count(k) <= 0) continue;
                const int64_t at = team_.place(row, k);
                copy_async(slots_, place(slot, 2 * k), p_.grad_y.halves().template as<const uint16_t>(), at);
                copy_async(slots_, place(slot, 2 * k + 1), p_.z.halves().template as<const uint16_t>(), at);
                if (p_.grad_z) copy_async(slots_, place_of_grad_z(slot, k), p_.grad_z.halves().template as<const uint16_t>(), at);
            }
        copy_async_commit();  // also where there was no row: waiting counts groups
    }

    const Backward &p_;
    const Team<EACH> &team_;
    Shared<uint16_t> slots_;
    int64_t step_;
    int slot_ = 0;
    float mean_ = 0.0f, rstd_ = 0.0f;
};

// The same by loads: of one chunk a row ahead; of several as their turn comes, and grad_z when it is needed, for want of registers.
template <bool VECTOR, int DTYPE, int CHUNKS, int EACH>
class RowsByLoad {
public:
    __device__ RowsByLoad(const Backward &p, const Team<EACH> &team, const Shared<uint16_t> &, int64_t step) : p_(p), team_(team), step_(step) {}

    __device__ __forceinline__ void begin(int64_t row) {
        if constexpr (CHUNKS == 1) next_ = load(row);
    }
    __device__ __forceinline__ Row<CHUNKS> take(int64_t row) {
        if constexpr (CHUNKS > 1) return load(row);
        const Row<CHUNKS> now = next_;
        next_ = load(row + step_);
        return now;
    }
    __device__ __forceinline__ void refill(int64_t) {}
    __device__ __forceinline__ RawChunk grad_z(const Row<CHUNKS> &now, int64_t row, int k) const {
        return CHUNKS == 1 ? now.grad_z[0] : load_grad_z<VECTOR, DTYPE>(p_, team_, row, k);
    }

private:
    __device__ __forceinline__ Row<CHUNKS> load(int64_t row) const {
        if (row >= p_.rows) return {};
        Row<CHUNKS> found = load_row<VECTOR, DTYPE, CHUNKS>(p_, team_, row);
        if constexpr (CHUNKS == 1) found.grad_z[0] = load_grad_z<VECTOR, DTYPE>(p_, team_, row, 0);
        return found;
    }

    const Backward &p_;
    const Team<EACH> &team_;
    int64_t step_;
    Row<CHUNKS> next_ = {};
};

// What one chunk contributes: grad_y and n, both 0 outside the row.
struct Terms {
    Chunk grad_y, n;
};

template <bool VECTOR, int DTYPE>
__device__ __forceinline__ Terms make_terms(const Backward &p, const RawChunk &grad_y, const RawChunk &z, int count, float mean, float rstd) {
    if (count <= 0) return {};
    Terms terms = {widen<DTYPE>(grad_y, p.grad_y.dtype()), widen<DTYPE>(z, p.z.dtype())};
#pragma unroll
    for (int i = 0; i < CHUNK; i++) terms.n.at[i] = VECTOR || i < count ? (terms.n.at[i] - mean) * rstd : 0.0f;
    return terms;
}

// offset + weight, or 1
template <bool VECTOR>
__device__ __forceinline__ Chunk load_factor(const Backward &p, int column, int count) {
    Chunk factor;
    if (p.weight) factor = load_chunk<VECTOR>(p.weight, column, count);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) factor.at[i] = p.weight ? p.offset + factor.at[i] : 1.0f;
    return factor;
}

__device__ __forceinline__ Chunk product(const Chunk &a, const Chunk &b) {
    Chunk both;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) both.at[i] = a.at[i] * b.at[i];
    return both;
}

// sums[0] += sum of g, sums[1] += sum of g n
__device__ __forceinline__ void add_products(const Chunk &g, const Chunk &n, float (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        sums[0] += g.at[i];
        sums[1] += g.at[i] * n.at[i];
    }
}

// From sums over the row to means; those of g are no part of RMSNorm's gradient.
__device__ __forceinline__ void make_means(const Backward &p, float (&sums)[2]) {
    sums[0] = p.mean ? sums[0] * p.per_width : 0.0f;
    sums[1] *= p.per_width;
}

template <bool VECTOR, int DTYPE, bool DROPOUT, int EACH>
__device__ __forceinline__ void store_gradients(const Backward &p, const Team<EACH> &team, int64_t row, int k, const Chunk &g, const Chunk &n,
                                                const RawChunk &grad_z, const float (&means)[2], float rstd) {
    const int64_t at = team.place(row, k);
    const int count = team.count(k);
    Chunk dz;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) dz.at[i] = rstd * (g.at[i] - means[0] - n.at[i] * means[1]);
    if (p.grad_z) {
        const Chunk added = widen<DTYPE>(grad_z, p.grad_z.dtype());
#pragma unroll
        for (int i = 0; i < CHUNK; i++) dz.at[i] += added.at[i];
    }
    if (p.grad_residual) store_chunk<VECTOR, DTYPE>(p.grad_residual, at, count, dz);
    // The seed is read again for each row: held, it costs two registers that there are not.
    if (DROPOUT && p.dropout) drop(dz, p.dropout, static_cast<uint64_t>(p.dropout.seed.get(0)), row, team.column(k));
    store_chunk<VECTOR, DTYPE>(p.grad_x, at, count, dz);
}

// Writes this block's row of partial sums: what its teams have, one after the other. `all`: room for what all threads have.
template <int CHUNKS, int EACH>
__device__ __forceinline__ void store_sums(const Team<EACH> &team, const Shared<float> &all, const Global<float> &parts, const Chunk (&sums)[CHUNKS]) {
    if (!parts) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * team.width;
    if (blockDim.y == 1) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                if (i < team.count(k)) parts.set(begin + team.column(k) + i, sums[k].at[i]);
        return;
    }
    const int padded = team.lanes * CHUNKS * CHUNK;
    sync_block();  // what lay there before has been read
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) all.set(static_cast<int>(threadIdx.y) * padded + team.column(k) + i, sums[k].at[i]);
    sync_block();
    for (int c = thread_of_block(); c < team.width; c += threads_of_block()) {
        float total = 0.0f;
        for (int y = 0; y < static_cast<int>(blockDim.y); y++) total += all.get(y * padded + c);
        parts.set(begin + c, total);
    }
}

// What a block keeps in dynamic shared memory, in elements: the factors of a row's columns, since registers belong to the sums; the rows that are on
// their way; in the end, in their place, what all threads have summed.
struct Room {
    int factors, slots, sums;

    __host__ __device__ Room(const Backward &p, int lanes, int teams, int chunks, bool is_async)
        : factors(lanes * chunks * CHUNK),
          slots(is_async ? lanes * teams * chunks * ROWS_AHEAD * PIECE * (p.grad_z ? 3 : 2) : 0),
          sums(teams > 1 ? lanes * teams * chunks * CHUNK : 0) {}
    __host__ __device__ int halves() const { return 2 * sums > slots ? 2 * sums : slots; }
    int bytes() const { return 4 * factors + 2 * halves(); }
};

// Whole rows in registers, and the sums of their columns beside them. DTYPE: of all but the weight. DROPOUT: there may be dropout. EXACT: every thread
// has CHUNKS chunks.
template <bool VECTOR, bool EXACT, int DTYPE, bool DROPOUT, int CHUNKS>
__global__ void __launch_bounds__(THREADS, 1) norm_backward_kernel(const __grid_constant__ Backward p) {
    constexpr int EACH = EXACT ? CHUNKS : 0;
    const Team<EACH> team(p.width);
    constexpr bool ASYNC = IS_ASYNC<VECTOR, DTYPE, DROPOUT>;
    const Room room(p, team.lanes, static_cast<int>(blockDim.y), CHUNKS, ASYNC);
    SharedArena arena;
    const Shared<float> factors = arena.take<float>(room.factors);
    const Shared<uint16_t> slots = arena.take<uint16_t>(room.halves());
    const auto factor_at = [&](int k, int i) { return ((k * CHUNK + i) / 4 * team.lanes + static_cast<int>(threadIdx.x)) * 4; };
    const int64_t step = p.parts * blockDim.y;
    int64_t row = threadIdx.y * p.parts + blockIdx.x;
    std::conditional_t<ASYNC, RowsByCopy<DTYPE, CHUNKS, EACH>, RowsByLoad<VECTOR, DTYPE, CHUNKS, EACH>> rows(p, team, slots, step);
    rows.begin(row);
    if (threadIdx.y == 0)
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const Chunk factor = load_factor<VECTOR>(p, team.column(k), team.count(k));
#pragma unroll
            for (int i = 0; i < CHUNK; i += 4) factors.store<4>(factor_at(k, i), {{factor.at[i], factor.at[i + 1], factor.at[i + 2], factor.at[i + 3]}});
        }
    sync_block();
    const auto factor_of = [&](int k) {
        Chunk factor;
#pragma unroll
        for (int i = 0; i < CHUNK; i += 4) {
            const Pack<float, 4> four = factors.load<4>(factor_at(k, i));
#pragma unroll
            for (int j = 0; j < 4; j++) factor.at[i + j] = four.at[j];
        }
        return factor;
    };
    constexpr bool KEPT = CHUNKS == 1 || ASYNC;  // whether registers hold g and n between their two uses
    Chunk weight_sum[CHUNKS] = {}, bias_sum[CHUNKS] = {};
    for (int buffer = 0; row < p.rows; row += step, buffer ^= 1) {
        const Row<CHUNKS> now = rows.take(row);
        float sums[2] = {0.0f, 0.0f};
        Chunk g[KEPT ? CHUNKS : 1], n[KEPT ? CHUNKS : 1];
        const auto make = [&](int k) {
            const Terms terms = make_terms<VECTOR, DTYPE>(p, now.grad_y[k], now.z[k], team.count(k), now.mean, now.rstd);
            g[KEPT ? k : 0] = product(terms.grad_y, factor_of(k));
            n[KEPT ? k : 0] = terms.n;
            return terms.grad_y;
        };
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const Chunk grad_y = make(k), &its_n = n[KEPT ? k : 0];
            add_products(g[KEPT ? k : 0], its_n, sums);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                weight_sum[k].at[i] += grad_y.at[i] * its_n.at[i];
                bias_sum[k].at[i] += grad_y.at[i];
            }
        }
        rows.refill(row);
        team_sums(team, sums, buffer);
        make_means(p, sums);
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            if constexpr (!KEPT) make(k);
            store_gradients<VECTOR, DTYPE, DROPOUT>(p, team, row, k, g[KEPT ? k : 0], n[KEPT ? k : 0], rows.grad_z(now, row, k), sums, now.rstd);
        }
    }
    if constexpr (ASYNC) copy_async_wait<0>();
    const Shared<float> all = slots.as<float>();
    store_sums(team, all, p.weight_parts, weight_sum);
    store_sums(team, all, p.bias_parts, bias_sum);
}

// A block per row of more than SUMS_WIDTH columns; what lies behind WIDE_CHUNKS chunks is read twice.
template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) norm_backward_wide_kernel(const __grid_constant__ Backward p) {
    const Team<0> team(p.width);
    const int64_t row = blockIdx.x;
    const Row<WIDE_CHUNKS> held = load_row<VECTOR, ANY_DTYPE, WIDE_CHUNKS>(p, team, row);
    const int rounds = team.rounds();
    float sums[2] = {0.0f, 0.0f};
    const auto terms_of = [&](const RawChunk &grad_y, const RawChunk &z, int k) {
        return make_terms<VECTOR, ANY_DTYPE>(p, grad_y, z, team.count(k), held.mean, held.rstd);
    };
    const auto reload = [&](int k) {
        const int64_t at = team.place(row, k);
        return terms_of(load_raw<VECTOR>(p.grad_y, at, team.count(k)), load_raw<VECTOR>(p.z, at, team.count(k)), k);
    };
    const auto g_of = [&](const Terms &terms, int k) { return product(terms.grad_y, load_factor<VECTOR>(p, team.column(k), team.count(k))); };
    const auto add = [&](const Terms &terms, int k) { add_products(g_of(terms, k), terms.n, sums); };
    const auto store = [&](const Terms &terms, int k) {
        const RawChunk grad_z = load_grad_z<VECTOR, ANY_DTYPE>(p, team, row, k);
        store_gradients<VECTOR, ANY_DTYPE, true>(p, team, row, k, g_of(terms, k), terms.n, grad_z, sums, held.rstd);
    };
#pragma unroll
    for (int k = 0; k < WIDE_CHUNKS; k++) add(terms_of(held.grad_y[k], held.z[k], k), k);
    for (int k = WIDE_CHUNKS; k < rounds; k++) add(reload(k), k);
    team_sums(team, sums, 0);
    make_means(p, sums);
#pragma unroll
    for (int k = 0; k < WIDE_CHUNKS; k++) store(terms_of(held.grad_y[k], held.z[k], k), k);
    for (int k = WIDE_CHUNKS; k < rounds; k++) store(reload(k), k);
}

// Row blockIdx.y of the partial sums, for rows too wide for the kernel that makes them on its way: a thread owns eight columns.
template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) norm_wide_sums_kernel(const __grid_constant__ Backward p) {
    const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * CHUNK;
    const int count = p.width - column < CHUNK ? p.width - column : CHUNK;
    if (count <= 0) return;
    Chunk weight_sum = {}, bias_sum = {};
    for (int64_t row = blockIdx.y; row < p.rows; row += p.parts) {
        const int64_t at = row * p.width + column;
        const Terms terms = make_terms<VECTOR, ANY_DTYPE>(p, load_raw<VECTOR>(p.grad_y, at, count), load_raw<VECTOR>(p.z, at, count), count,
                                              p.mean ? p.mean.get(row) : 0.0f, p.rstd.get(row));
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            weight_sum.at[i] += terms.grad_y.at[i] * terms.n.at[i];
            bias_sum.at[i] += terms.grad_y.at[i];
        }
    }
    const int64_t at = static_cast<int64_t>(blockIdx.y) * p.width + column;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        if (i >= count) continue;
        if (p.weight_parts) p.weight_parts.set(at + i, weight_sum.at[i]);
        if (p.bias_parts) p.bias_parts.set(at + i, bias_sum.at[i]);
    }
}

// The sums of the partial sums of COLUMNS columns: of the weight's where blockIdx.y is 0, else of the bias'.
__global__ void __launch_bounds__(COLUMNS *PARTS_BESIDE) norm_column_sums_kernel(const __grid_constant__ Backward p) {
    const Global<float> &parts = blockIdx.y == 0 ? p.weight_parts : p.bias_parts;
    const Elements &to = blockIdx.y == 0 ? p.grad_weight : p.grad_bias;
    const int column = static_cast<int>(blockIdx.x) * COLUMNS + static_cast<int>(threadIdx.x);
    const bool exists = parts && column < p.width;
    float total = 0.0f;
    if (exists)
#pragma unroll 8
        for (int64_t part = threadIdx.y; part < p.parts; part += PARTS_BESIDE) total += parts.get(part * p.width + column);
    const Shared<float> all = static_shared<float, COLUMNS * PARTS_BESIDE>();
    all.set(static_cast<int>(threadIdx.y) * COLUMNS + static_cast<int>(threadIdx.x), total);
    sync_block();
    if (threadIdx.y != 0 || !exists) return;
    Chunk sum = {};
#pragma unroll
    for (int y = 0; y < PARTS_BESIDE; y++) sum.at[0] += all.get(y * COLUMNS + static_cast<int>(threadIdx.x));
    store_chunk<false>(to, column, 1, sum);
}

// How a block is shared out: `lanes` threads, whole warps, to a row, `teams` rows side by side, `chunks` to a thread. Where registers allow it, two
// chunks halve what a row costs besides its elements, and let the rows of a block wait for one another less.
struct Shape {
    int lanes, teams, chunks;
    bool is_exact;

    Shape(int64_t width, bool is_async) {
        const auto warps = static_cast<int>((width + WARP * CHUNK - 1) / (WARP * CHUNK));  // of a chunk each
        chunks = warps > THREADS / WARP || (is_async && warps % 2 == 0) ? 2 : 1;
        lanes = (warps + chunks - 1) / chunks * WARP;
        teams = THREADS / lanes < MAX_TEAMS || lanes == WARP ? THREADS / lanes : MAX_TEAMS;
        is_exact = width == static_cast<int64_t>(lanes) * chunks * CHUNK;
    }
};

template <bool VECTOR, bool EXACT, int DTYPE, bool DROPOUT, int CHUNKS>
cudaError_t launch_shape(const Backward &p, const Shape &shape, void *stream) {
    constexpr bool ASYNC = IS_ASYNC<VECTOR, DTYPE, DROPOUT>;
    int teams = shape.teams, allowed = 0;
    const cudaError_t error = max_shared_bytes(&allowed);
    if (error != cudaSuccess) return error;
    allowed -= STATIC_BYTES_BESIDE_DYNAMIC;  // those of exchange()
    const auto bytes = [&] { return Room(p, shape.lanes, teams, CHUNKS, ASYNC).bytes(); };
    while (teams > 1 && bytes() > allowed) teams--;
    if constexpr (ASYNC)  // three wide rows of one team, and 99 KiB to a block: then none is on its way
        if (bytes() > allowed) return launch_shape<VECTOR, false, ANY_DTYPE, true, CHUNKS>(p, shape, stream);
    const Launch how = {"norm_backward", dim3(static_cast<unsigned>(p.parts)), dim3(static_cast<unsigned>(shape.lanes), static_cast<unsigned>(teams)),
                        bytes(), stream, allowed};
    return launch<THREADS>(how, norm_backward_kernel<VECTOR, EXACT, DTYPE, DROPOUT, CHUNKS>, p);
}

template <bool VECTOR, bool EXACT, int DTYPE, bool DROPOUT>
cudaError_t launch_rows(const Backward &p, void *stream) {
    const Shape shape(p.width, IS_ASYNC<VECTOR, DTYPE, DROPOUT>);
    if (shape.chunks == 1) return launch_shape<VECTOR, EXACT, DTYPE, DROPOUT, 1>(p, shape, stream);
    return launch_shape<VECTOR, EXACT, DTYPE, DROPOUT, 2>(p, shape, stream);
}

template <bool VECTOR>
cudaError_t launch_wide(const Backward &p, void *stream) {
    const Launch rows = {"norm_backward_wide", dim3(static_cast<unsigned>(p.rows)), dim3(THREADS), 0, stream};
    const cudaError_t error = launch<THREADS>(rows, norm_backward_wide_kernel<VECTOR>, p);
    if (error != cudaSuccess || !(p.weight_parts || p.bias_parts)) return error;
    const auto columns = static_cast<unsigned>((p.width + THREADS * CHUNK - 1) / (THREADS * CHUNK));
    const Launch sums = {"norm_wide_sums", dim3(columns, static_cast<unsigned>(p.parts)), dim3(THREADS), 0, stream};
    return launch<THREADS>(sums, norm_wide_sums_kernel<VECTOR>, p);
}

template <int DTYPE>
cudaError_t launch_known(const Backward &p, void *stream) {
    if (p.dropout) return launch_rows<true, false, DTYPE, true>(p, stream);
    return Shape(p.width, true).is_exact ? launch_rows<true, true, DTYPE, false>(p, stream) : launch_rows<true, false, DTYPE, false>(p, stream);
}

cudaError_t launch_backward(const Backward &p, void *stream) {
    const bool vector = all_vectors(p.width, p.grad_y, p.grad_z, p.z, p.weight, p.grad_x, p.grad_residual);
    if (p.width > SUMS_WIDTH) return vector ? launch_wide<true>(p, stream) : launch_wide<false>(p, stream);
    if (!vector) {  // element by element, two chunks take more registers than there are
        const Shape shape(p.width, false);
        return shape.chunks == 1 ? launch_shape<false, false, ANY_DTYPE, true, 1>(p, shape, stream) : launch_wide<false>(p, stream);
    }
    if (all_of(FASTATTN_BFLOAT16, p.grad_y, p.grad_z, p.z, p.grad_x, p.grad_residual)) return launch_known<FASTATTN_BFLOAT16>(p, stream);
    if (all_of(FASTATTN_FLOAT16, p.grad_y, p.grad_z, p.z, p.grad_x, p.grad_residual)) return launch_known<FASTATTN_FLOAT16>(p, stream);
    return launch_rows<true, false, ANY_DTYPE, true>(p, stream);
}

}  // namespace

extern "C" int64_t fastattn_cuda_norm_backward_parts(int64_t rows, int64_t width, int32_t multiprocessors) {
    // A block for each multiprocessor, or as many as there are groups of rows where fewest go side by side.
    const int64_t teams = width > SUMS_WIDTH ? 1 : Shape(width, false).teams;
    const int64_t wanted = multiprocessors, groups = (rows + teams - 1) / teams;
    return groups < wanted ? groups : wanted;
}

extern "C" int fastattn_cuda_norm_backward(const fastattn_cuda_norm_gradient *call) {
    if (call->rows == 0) return cudaSuccess;
    if (!takes(call->rows, call->width) || call->parts < 1 || call->parts > 65535) return cudaErrorInvalidValue;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    const int64_t size = call->rows * call->width, sums = call->parts * call->width;
    const Backward p = {Elements(call->grad_y, call->x_dtype, size),
                        Elements(call->grad_z, call->z_dtype, size),
                        Elements(call->z, call->z_dtype, size),
                        Elements(call->weight, call->weight_dtype, call->width),
                        Elements(call->grad_x, call->x_dtype, size),
                        Elements(call->grad_residual, call->z_dtype, size),
                        Elements(call->grad_weight, call->grad_weight_dtype, call->width),
                        Elements(call->grad_bias, call->grad_bias_dtype, call->width),
                        Global<float>(call->grad_weight ? call->parts_of_sums : nullptr, call->grad_weight ? sums : 0),
                        Global<float>(call->grad_bias ? call->parts_of_sums + (call->grad_weight ? sums : 0) : nullptr, call->grad_bias ? sums : 0),
                        Global<const float>(call->mean, call->rows),
                        Global<const float>(call->rstd, call->rows),
                        Dropout(call->dropout),
                        call->rows,
                        call->parts,
                        static_cast<int>(call->width),
                        1.0f / static_cast<float>(call->width),
                        call->offset};
    const cudaError_t error = launch_backward(p, call->stream);
    if (error != cudaSuccess || !(call->grad_weight || call->grad_bias)) return error;
    const Launch how = {"norm_column_sums", dim3(static_cast<unsigned>((call->width + COLUMNS - 1) / COLUMNS), 2), dim3(COLUMNS, PARTS_BESIDE), 0,
                        call->stream};
    return launch<COLUMNS * PARTS_BESIDE>(how, norm_column_sums_kernel, p);
}
