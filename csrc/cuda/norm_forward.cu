// norm forward: LayerNorm and RMSNorm over rows, with dropout and residual in front.
//
// Contract   z = dropout(x) + residual, y = (z - mean) rstd (offset + weight) + bias; mean is 0 for RMS. Rows contiguous, width 1 to 65,536,
//            fewer than 2^31 rows, any mixture of float32, bfloat16 and float16. z is stored where there is dropout or a residual.
// Numerics   float32, one rounding per output; z is rounded to its dtype before its statistics are taken; the variance is that of centred
//            values, about the mean of the row or of each thread's share, which are then merged. Every sum has an order that the width fixes:
//            bitwise repeatable.
// Algorithm  A warp per row up to 1,024 columns, beyond that a block, so that a row lies in registers, as it lies in memory, between its one
//            read and its one write: up to 20,480 columns; what lies behind is read again, from cache.
// Measured   H100 80GB HBM3, bf16, share of a large copy's 2.40 TB/s, L2 flushed before each call (LayerNorm / RMSNorm at 4,096 x 4,096; first
//            kernels-before.json, then kernels.json in bench/results/nvidia-h100-80gb-hbm3-2026-11-26):
//            0.60 / 0.68  rows as float32 in registers: 120 of them, 16 warps per multiprocessor
//            0.79 / 0.91  rows as they lie in memory: 60 registers, 32 warps. LayerNorm's second exchange costs what lacks; with a residual, and
//                         at 8,192 columns, both are above 1 (part of it comes from the L2 cache). Triton's forward: 0.91 / 0.97
//            The copy of that run was a graph's memcpy; by a kernel such a chip was seen to copy 3.0 TB/s, of which these shares are 0.64 / 0.74.
//            H200, us at 4,096 x 4,096 (2026-11-27, nvidia-h200-2026-11-27; a large copy, at 4.28 TB/s, would take 15.7):
//            32.6 / 27.9  with one exchange where all threads have as many elements (team_moments); Triton's 26.3 / 23.8, F.layer_norm's 34.0
//            42.7 / 33.1  dtypes known when compiled, one chunk to a thread and three blocks of 512: given up. What a thread does once, exchanges and
//                         addresses, is then done for 8 elements instead of 32, and instructions are what this kernel waits for
//            not timed    dtypes known when compiled, four chunks to a thread: 2,088 instructions instead of 2,720
#include <cmath>

#include "device_guard.cuh"
#include "norm.cuh"

namespace {

constexpr int NARROW = 256, WIDE = 512;  // threads of a block
constexpr int NARROW_CHUNKS = 4, WIDE_CHUNKS = 5;

struct Forward {
    Elements x, residual, weight, bias, z, y;
    Global<float> mean, rstd;
    Dropout dropout;
    int64_t rows;
    int width;
    float eps, offset;
    int z_dtype;
    bool is_rms;
};

// z of one chunk from what was loaded; also stored where it is not x.
template <bool VECTOR, int DTYPE, bool DROPOUT>
__device__ __forceinline__ RawChunk make_z(const Forward &p, uint64_t seed, int64_t row, int column, int count, const RawChunk &raw_x,
                                           const RawChunk &raw_residual) {
    if (!p.z) return raw_x;
    Chunk z = widen<DTYPE>(raw_x, p.x.dtype());
    if (DROPOUT && p.dropout) drop(z, p.dropout, seed, row, column);
    if (p.residual) {
        const Chunk residual = widen<DTYPE>(raw_residual, p.residual.dtype());
#pragma unroll
        for (int i = 0; i < CHUNK; i++) z.at[i] += residual.at[i];
    }
    const RawChunk rounded = narrow<DTYPE>(z, p.z_dtype);
    store_raw<VECTOR, DTYPE>(p.z, row * p.width + column, count, rounded);
    return rounded;
}

__device__ __forceinline__ float sum_of(const Chunk &z) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) total += z.at[i];
    return total;
}

template <bool VECTOR>
__device__ __forceinline__ float squares_about(const Chunk &z, float mean, int count) {
    float total = 0.0f;
    if (count <= 0) return total;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) total += VECTOR || i < count ? (z.at[i] - mean) * (z.at[i] - mean) : 0.0f;
    return total;
}

// What a column's y takes from outside its row: y = n weight + bias.
struct Affine {
    Chunk weight, bias;
};

template <bool VECTOR, int PARAMS>
__device__ __forceinline__ Affine load_affine(const Forward &p, int column, int count) {
    Affine affine = {};
    if (p.weight) affine.weight = load_chunk<VECTOR, PARAMS>(p.weight, column, count);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) affine.weight.at[i] = p.weight ? p.offset + affine.weight.at[i] : 1.0f;
    if (p.bias) affine.bias = load_chunk<VECTOR, PARAMS>(p.bias, column, count);
    return affine;
}

template <bool VECTOR, int DTYPE>
__device__ __forceinline__ void store_y(const Forward &p, int64_t row, int column, int count, const Chunk &z, const Affine &affine, float mean, float rstd) {
    if (count <= 0) return;
    Chunk y;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) y.at[i] = (z.at[i] - mean) * rstd * affine.weight.at[i] + affine.bias.at[i];
    store_chunk<VECTOR, DTYPE>(p.y, row * p.width + column, count, y);
}

// Blocks that a multiprocessor should hold: halves whose dtype is known take few registers, and the more warps the more bytes are under way.
template <int DTYPE, bool DROPOUT, int THREADS>
constexpr int blocks_beside() {
    if (THREADS != NARROW) return 1;
    return DTYPE != ANY_DTYPE && !DROPOUT ? 4 : 2;
}

// DTYPE: of x, residual, z and y. PARAMS: of weight and bias. DROPOUT: there may be dropout.
template <bool VECTOR, int DTYPE, int PARAMS, bool DROPOUT, int THREADS, int CHUNKS>
__global__ void __launch_bounds__(THREADS, blocks_beside<DTYPE, DROPOUT, THREADS>()) norm_forward_kernel(const __grid_constant__ Forward p) {
    const Team team(p.width);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;  // a row of one warp: the others of its block wait for nobody
    const uint64_t seed = DROPOUT && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
    const int rounds = team.rounds();
    RawChunk z[CHUNKS];
    constexpr int AT_ONCE = DTYPE != ANY_DTYPE || THREADS == NARROW ? CHUNKS : 1;  // loads under way together: as many as registers allow
    float total[1] = {0.0f};
#pragma unroll
    for (int first = 0; first < CHUNKS; first += AT_ONCE) {
        RawChunk residual[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int64_t at = row * p.width + team.column(first + k);
            z[first + k] = load_raw<VECTOR, DTYPE>(p.x, at, team.count(first + k));
            residual[k] = load_if<VECTOR, DTYPE>(p.residual, at, team.count(first + k));
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            RawChunk &own = z[first + k];
            if (first + k < rounds) own = make_z<VECTOR, DTYPE, DROPOUT>(p, seed, row, team.column(first + k), team.count(first + k), own, residual[k]);
            total[0] += sum_of(widen<DTYPE>(own, p.z_dtype));
        }
    }
    for (int k = CHUNKS; k < rounds; k++) {
        const int64_t at = row * p.width + team.column(k);
        const RawChunk x = load_raw<VECTOR, DTYPE>(p.x, at, team.count(k)), residual = load_if<VECTOR, DTYPE>(p.residual, at, team.count(k));
        total[0] += sum_of(widen<DTYPE>(make_z<VECTOR, DTYPE, DROPOUT>(p, seed, row, team.column(k), team.count(k), x, residual), p.z_dtype));
    }
    // z of a chunk that registers do not hold, as this thread stored or read it before.
    const auto reload = [&](int k) { return load_chunk<VECTOR>(p.z ? p.z : p.x, row * p.width + team.column(k), team.count(k)); };
    // About the mean of the row or, where one exchange will do, about the mean of what this thread has.
    const bool merged = !p.is_rms && team.is_even();
    const int own = merged ? rounds * CHUNK : p.width;
    float mean = 0.0f;
    if (!p.is_rms) {
        if (!merged) team_sums(team, total, 0);
        mean = total[0] / static_cast<float>(own);
    }
    float squares[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) squares[0] += squares_about<VECTOR>(widen<DTYPE>(z[k], p.z_dtype), mean, team.count(k));
    for (int k = CHUNKS; k < rounds; k++) squares[0] += squares_about<VECTOR>(reload(k), mean, team.count(k));
    if (merged) team_moments(team, mean, squares[0], static_cast<float>(own));
    else team_sums(team, squares, 1);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(p.width) + p.eps);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        const Affine affine = load_affine<VECTOR, PARAMS>(p, team.column(k), team.count(k));
        store_y<VECTOR, DTYPE>(p, row, team.column(k), team.count(k), widen<DTYPE>(z[k], p.z_dtype), affine, mean, rstd);
    }
    for (int k = CHUNKS; k < rounds; k++)
        store_y<VECTOR, DTYPE>(p, row, team.column(k), team.count(k), reload(k), load_affine<VECTOR, PARAMS>(p, team.column(k), team.count(k)), mean, rstd);
    if (threadIdx.x == 0) {
        if (p.mean) p.mean.set(row, mean);
        if (p.rstd) p.rstd.set(row, rstd);
    }
}

// A row to a power of two of warps, at most THREADS threads; rows of one warp share a block.
template <bool VECTOR, int DTYPE, int PARAMS, bool DROPOUT, int THREADS, int CHUNKS>
cudaError_t launch_rows(const Forward &p, void *stream) {
    int lanes = WARP;
    while (lanes < THREADS && lanes * CHUNKS * CHUNK < p.width) lanes *= 2;
    const int beside = lanes == WARP ? THREADS / WARP : 1;
    const Launch how = {"norm_forward", dim3(static_cast<unsigned>((p.rows + beside - 1) / beside)),
                        dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(beside)), 0, stream};
    return launch<THREADS>(how, norm_forward_kernel<VECTOR, DTYPE, PARAMS, DROPOUT, THREADS, CHUNKS>, p);
}

template <bool VECTOR, int DTYPE, int PARAMS, bool DROPOUT>
cudaError_t launch_forward(const Forward &p, void *stream) {
    if (p.width <= NARROW * NARROW_CHUNKS * CHUNK) return launch_rows<VECTOR, DTYPE, PARAMS, DROPOUT, NARROW, NARROW_CHUNKS>(p, stream);
    return launch_rows<VECTOR, DTYPE, PARAMS, DROPOUT, WIDE, WIDE_CHUNKS>(p, stream);
}

template <int DTYPE>
cudaError_t launch_known(const Forward &p, void *stream) {
    if (p.dropout) return launch_forward<true, DTYPE, ANY_DTYPE, true>(p, stream);
    if (all_of(DTYPE, p.weight, p.bias)) return launch_forward<true, DTYPE, DTYPE, false>(p, stream);
    return launch_forward<true, DTYPE, ANY_DTYPE, false>(p, stream);
}

}  // namespace

extern "C" int fastattn_cuda_norm_forward(const fastattn_cuda_norm *call) {
    if (call->rows == 0) return cudaSuccess;
    if (!takes(call->rows, call->width)) return cudaErrorInvalidValue;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    const int64_t size = call->rows * call->width;
    const Forward p = {Elements(call->x, call->x_dtype, size),
                       Elements(call->residual, call->residual_dtype, size),
                       Elements(call->weight, call->weight_dtype, call->width),
                       Elements(call->bias, call->bias_dtype, call->width),
                       Elements(call->z, call->z_dtype, size),
                       Elements(call->y, call->x_dtype, size),
                       Global<float>(call->mean, call->rows),
                       Global<float>(call->rstd, call->rows),
                       Dropout(call->dropout),
                       call->rows,
                       static_cast<int>(call->width),
                       call->eps,
                       call->offset,
                       call->z ? call->z_dtype : call->x_dtype,
                       call->is_rms != 0};
    if (!all_vectors(call->width, p.x, p.residual, p.weight, p.bias, p.z, p.y)) return launch_forward<false, ANY_DTYPE, ANY_DTYPE, true>(p, call->stream);
    if (all_of(FASTATTN_BFLOAT16, p.x, p.residual, p.z, p.y)) return launch_known<FASTATTN_BFLOAT16>(p, call->stream);
    if (all_of(FASTATTN_FLOAT16, p.x, p.residual, p.z, p.y)) return launch_known<FASTATTN_FLOAT16>(p, call->stream);
    return launch_forward<true, ANY_DTYPE, ANY_DTYPE, true>(p, call->stream);
}
