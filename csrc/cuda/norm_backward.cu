// norm backward: the gradients of norm_forward.cu.
//
// Contract   With n = (z - mean) rstd and g = grad_y (offset + weight), and without mean(g) for RMS:
//            dz = rstd (g - mean(g) - n mean(g n)) + grad_z, grad_x = dropout'(dz), grad_residual = dz,
//            grad_weight = sum over rows of grad_y n, grad_bias = sum over rows of grad_y.
// Numerics   float32, one rounding per output. Every sum has an order that rows, width and `parts` fix: bitwise repeatable.
// Algorithm  A block of up to 512 threads holds as many rows side by side as fit, a chunk of eight columns per thread (two beyond 4,096 columns),
//            and walks over every parts-th such group. While one group is worked on the next is on its way. A thread keeps the weight gradients
//            of its columns in registers; a block adds up its teams' and writes one row of partial sums, and a second kernel adds those up in
//            the dtype that is wanted. Rows of more than 8,192 columns are done without sums, which a kernel of their own then makes.
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
#include "device_guard.cuh"
#include "norm.cuh"

namespace {

constexpr int THREADS = 512, WIDE_CHUNKS = 3;
constexpr int64_t SUMS_WIDTH = THREADS * 2 * CHUNK;
constexpr int COLUMNS = 32, PARTS_BESIDE = 8;  // of a block of norm_column_sums_kernel

struct Backward {
    Elements grad_y, grad_z, z, weight, grad_x, grad_residual, grad_weight, grad_bias;
    Global<float> weight_parts, bias_parts;
    Global<const float> mean, rstd;
    Dropout dropout;
    int64_t rows, parts;
    int width;
    float offset;
};

// What one thread has of a row.
template <int CHUNKS>
struct Row {
    RawChunk grad_y[CHUNKS], z[CHUNKS];
    RawChunk grad_z[1];  // of several chunks it comes late, for want of registers
    float mean, rstd;
};

template <bool VECTOR, int DTYPE>
__device__ __forceinline__ RawChunk load_grad_z(const Backward &p, const Team &team, int64_t row, int k) {
    return load_if<VECTOR, DTYPE>(p.grad_z, row * p.width + team.column(k), team.count(k));
}

// Zeros where the row does not exist.
template <bool VECTOR, int DTYPE, int CHUNKS>
__device__ __forceinline__ Row<CHUNKS> load_row(const Backward &p, const Team &team, int64_t row) {
    Row<CHUNKS> found = {};
    if (row >= p.rows) return found;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        const int64_t at = row * p.width + team.column(k);
        found.grad_y[k] = load_raw<VECTOR, DTYPE>(p.grad_y, at, team.count(k));
        found.z[k] = load_raw<VECTOR, DTYPE>(p.z, at, team.count(k));
    }
    if constexpr (CHUNKS == 1) found.grad_z[0] = load_grad_z<VECTOR, DTYPE>(p, team, row, 0);
    if (p.mean) found.mean = p.mean.get(row);
    found.rstd = p.rstd.get(row);
    return found;
}

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

// sums[0] += sum of g, sums[1] += sum of g n
__device__ __forceinline__ void add_products(const Terms &terms, const Chunk &factor, float (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        const float g = terms.grad_y.at[i] * factor.at[i];
        sums[0] += g;
        sums[1] += g * terms.n.at[i];
    }
}

// From sums over the row to means; those of g are no part of RMSNorm's gradient.
__device__ __forceinline__ void make_means(const Backward &p, float (&sums)[2]) {
    const float per_width = 1.0f / static_cast<float>(p.width);
    sums[0] = p.mean ? sums[0] * per_width : 0.0f;
    sums[1] *= per_width;
}

template <bool VECTOR, int DTYPE, bool DROPOUT>
__device__ __forceinline__ void store_gradients(const Backward &p, const Terms &terms, const Chunk &factor, const RawChunk &grad_z, uint64_t seed,
                                                int64_t row, int column, int count, const float (&means)[2], float rstd) {
    const int64_t at = row * p.width + column;
    Chunk dz;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) dz.at[i] = rstd * (terms.grad_y.at[i] * factor.at[i] - means[0] - terms.n.at[i] * means[1]);
    if (p.grad_z) {
        const Chunk added = widen<DTYPE>(grad_z, p.grad_z.dtype());
#pragma unroll
        for (int i = 0; i < CHUNK; i++) dz.at[i] += added.at[i];
    }
    if (p.grad_residual) store_chunk<VECTOR, DTYPE>(p.grad_residual, at, count, dz);
    if (DROPOUT && p.dropout) drop(dz, p.dropout, seed, row, column);
    store_chunk<VECTOR, DTYPE>(p.grad_x, at, count, dz);
}

// Writes this block's row of partial sums: what its teams have, one after the other.
template <int CHUNKS>
__device__ __forceinline__ void store_sums(const Team &team, const Global<float> &parts, const Chunk (&sums)[CHUNKS]) {
    if (!parts) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * team.width;
    if (CHUNKS > 1 || blockDim.y == 1) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                if (i < team.count(k)) parts.set(begin + team.column(k) + i, sums[k].at[i]);
        return;
    }
    const Shared<float> all = static_shared<float, THREADS * CHUNKS * CHUNK>();
    const int padded = team.lanes * CHUNK;
    sync_block();  // what lay there before has been read
#pragma unroll
    for (int i = 0; i < CHUNK; i++) all.set(static_cast<int>(threadIdx.y) * padded + team.column(0) + i, sums[0].at[i]);
    sync_block();
    for (int c = static_cast<int>(threadIdx.y) * team.lanes + static_cast<int>(threadIdx.x); c < team.width; c += team.lanes * static_cast<int>(blockDim.y)) {
        float total = 0.0f;
        for (int y = 0; y < static_cast<int>(blockDim.y); y++) total += all.get(y * padded + c);
        parts.set(begin + c, total);
    }
}

__device__ __forceinline__ int thread_of_block() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }

// Whole rows in registers, and the sums of their columns beside them. DTYPE: of all but the weight. DROPOUT: there may be dropout.
template <bool VECTOR, int DTYPE, bool DROPOUT, int CHUNKS>
__global__ void __launch_bounds__(THREADS) norm_backward_kernel(const __grid_constant__ Backward p) {
    const Team team(p.width);
    const uint64_t seed = DROPOUT && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
    Chunk weight_sum[CHUNKS] = {}, bias_sum[CHUNKS] = {};
    // The factors of a thread's columns lie in shared memory: registers belong to the sums.
    const Shared<float> factors = static_shared<float, THREADS * CHUNKS * CHUNK>();
    const auto factor_at = [&](int k, int i) { return ((k * CHUNK + i) / 4 * THREADS + thread_of_block()) * 4 + i % 4; };
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        const Chunk factor = load_factor<VECTOR>(p, team.column(k), team.count(k));
#pragma unroll
        for (int i = 0; i < CHUNK; i++) factors.set(factor_at(k, i), factor.at[i]);
    }
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
    constexpr bool AHEAD = CHUNKS == 1 || (DTYPE != ANY_DTYPE && !DROPOUT);  // whether registers allow the next row
    const int64_t step = p.parts * blockDim.y;
    int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    Row<CHUNKS> now = load_row<VECTOR, DTYPE, CHUNKS>(p, team, row);
    // All teams of a block go on while its first one has a row.
    for (int buffer = 0; row - threadIdx.y < p.rows; row += step, buffer ^= 1) {
        Row<CHUNKS> next;
        if constexpr (AHEAD) next = load_row<VECTOR, DTYPE, CHUNKS>(p, team, row + step);
        float sums[2] = {0.0f, 0.0f};
        Terms kept;  // of one chunk registers hold them; those of several are made twice
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const Terms terms = make_terms<VECTOR, DTYPE>(p, now.grad_y[k], now.z[k], team.count(k), now.mean, now.rstd);
            if constexpr (CHUNKS == 1) kept = terms;
            add_products(terms, factor_of(k), sums);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                weight_sum[k].at[i] += terms.grad_y.at[i] * terms.n.at[i];
                bias_sum[k].at[i] += terms.grad_y.at[i];
            }
        }
        team_sums(team, sums, buffer);
        make_means(p, sums);
        if (row < p.rows)
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) {
                const Terms terms = CHUNKS == 1 ? kept : make_terms<VECTOR, DTYPE>(p, now.grad_y[k], now.z[k], team.count(k), now.mean, now.rstd);
                const RawChunk grad_z = CHUNKS == 1 ? now.grad_z[0] : load_grad_z<VECTOR, DTYPE>(p, team, row, k);
                store_gradients<VECTOR, DTYPE, DROPOUT>(p, terms, factor_of(k), grad_z, seed, row, team.column(k), team.count(k), sums, now.rstd);
            }
        if constexpr (!AHEAD) next = load_row<VECTOR, DTYPE, CHUNKS>(p, team, row + step);
        now = next;
    }
    store_sums(team, p.weight_parts, weight_sum);
    store_sums(team, p.bias_parts, bias_sum);
}

// A block per row of more than SUMS_WIDTH columns; what lies behind WIDE_CHUNKS chunks is read twice.
template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) norm_backward_wide_kernel(const __grid_constant__ Backward p) {
    const Team team(p.width);
    const int64_t row = blockIdx.x;
    const uint64_t seed = p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
    const Row<WIDE_CHUNKS> held = load_row<VECTOR, ANY_DTYPE, WIDE_CHUNKS>(p, team, row);
    const int rounds = team.rounds();
    float sums[2] = {0.0f, 0.0f};
    const auto terms_of = [&](const RawChunk &grad_y, const RawChunk &z, int k) {
        return make_terms<VECTOR, ANY_DTYPE>(p, grad_y, z, team.count(k), held.mean, held.rstd);
    };
    const auto reload = [&](int k) {
        const int64_t at = row * p.width + team.column(k);
        return terms_of(load_raw<VECTOR>(p.grad_y, at, team.count(k)), load_raw<VECTOR>(p.z, at, team.count(k)), k);
    };
    const auto store = [&](const Terms &terms, int k) {
        const Chunk factor = load_factor<VECTOR>(p, team.column(k), team.count(k));
        const RawChunk grad_z = load_grad_z<VECTOR, ANY_DTYPE>(p, team, row, k);
        store_gradients<VECTOR, ANY_DTYPE, true>(p, terms, factor, grad_z, seed, row, team.column(k), team.count(k), sums, held.rstd);
    };
#pragma unroll
    for (int k = 0; k < WIDE_CHUNKS; k++)
        add_products(terms_of(held.grad_y[k], held.z[k], k), load_factor<VECTOR>(p, team.column(k), team.count(k)), sums);
    for (int k = WIDE_CHUNKS; k < rounds; k++) add_products(reload(k), load_factor<VECTOR>(p, team.column(k), team.count(k)), sums);
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

// Threads that share a row: whole warps, enough for a chunk each where a block has as many.
int lanes_of(int64_t width) {
    const int64_t wanted = (width + CHUNK * WARP - 1) / (CHUNK * WARP) * WARP;
    return static_cast<int>(wanted < THREADS ? wanted : THREADS);
}

template <bool VECTOR, int DTYPE, bool DROPOUT>
cudaError_t launch_rows(const Backward &p, void *stream) {
    const int lanes = lanes_of(p.width);
    const Launch how = {"norm_backward", dim3(static_cast<unsigned>(p.parts)),
                        dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(THREADS / lanes)), 0, stream};
    if (p.width <= THREADS * CHUNK) return launch<THREADS>(how, norm_backward_kernel<VECTOR, DTYPE, DROPOUT, 1>, p);
    return launch<THREADS>(how, norm_backward_kernel<VECTOR, DTYPE, DROPOUT, 2>, p);
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
    return p.dropout ? launch_rows<true, DTYPE, true>(p, stream) : launch_rows<true, DTYPE, false>(p, stream);
}

cudaError_t launch_backward(const Backward &p, void *stream) {
    const bool vector = all_vectors(p.width, p.grad_y, p.grad_z, p.z, p.weight, p.grad_x, p.grad_residual);
    if (p.width > SUMS_WIDTH) return vector ? launch_wide<true>(p, stream) : launch_wide<false>(p, stream);
    if (!vector) return launch_rows<false, ANY_DTYPE, true>(p, stream);
    if (all_of(FASTATTN_BFLOAT16, p.grad_y, p.grad_z, p.z, p.grad_x, p.grad_residual)) return launch_known<FASTATTN_BFLOAT16>(p, stream);
    if (all_of(FASTATTN_FLOAT16, p.grad_y, p.grad_z, p.z, p.grad_x, p.grad_residual)) return launch_known<FASTATTN_FLOAT16>(p, stream);
    return launch_rows<true, ANY_DTYPE, true>(p, stream);
}

}  // namespace

extern "C" int64_t fastattn_cuda_norm_backward_parts(int64_t rows, int64_t width, int32_t multiprocessors) {
    const int lanes = lanes_of(width), beside = THREADS / lanes;
    // A block for each multiprocessor, or as many as there are groups of rows.
    const int64_t wanted = multiprocessors, groups = (rows + beside - 1) / beside;
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
                        call->offset};
    const cudaError_t error = launch_backward(p, call->stream);
    if (error != cudaSuccess || !(call->grad_weight || call->grad_bias)) return error;
    const Launch how = {"norm_column_sums", dim3(static_cast<unsigned>((call->width + COLUMNS - 1) / COLUMNS), 2), dim3(COLUMNS, PARTS_BESIDE), 0,
                        call->stream};
    return launch<COLUMNS * PARTS_BESIDE>(how, norm_column_sums_kernel, p);
}
