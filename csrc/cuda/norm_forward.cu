// norm forward: LayerNorm and RMSNorm over rows, with dropout and residual in front.
//
// Contract   z = dropout(x) + residual, y = (z - mean) rstd (offset + weight) + bias; mean is 0 for RMS. Rows contiguous, width 1 to 65,536,
//            fewer than 2^31 rows, any mixture of float32, bfloat16 and float16. z is stored where there is dropout or a residual.
// Numerics   float32, one rounding per output; z is rounded to its dtype before its statistics are taken; the variance is that of centred
//            values, about the means of warps, which are then merged. Every sum has an order that the width fixes:
//            bitwise repeatable.
// Algorithm  A warp per row up to 1,024 columns, beyond that a block, so that a row lies in registers, as it lies in memory, between its one
//            read and its one write: up to 20,480 columns; what lies behind is read again, from cache. Squares are taken about the mean of a warp
//            and merged, so that the warps of a row meet once.
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
//            not timed    whole chunks of whole warps have kernels of their own, in which nothing asks for bounds or dtypes and weight and bias are on
//                         their way while the row is summed: at 4,096 columns about 690 instructions of a thread on its way through LayerNorm's
//                         machine code for sm_90 instead of about 1,500, 12 us of issue instead of 26 (528 schedulers at 1.76 GHz)
#include <cmath>

#include "device_guard.cuh"
#include "norm.cuh"

namespace {

constexpr int NARROW = 256, WIDE = 512;  // threads of a block
constexpr int NARROW_CHUNKS = 4, WIDE_CHUNKS = 5;

// How a row lies in the registers of its threads.
enum class Fit {
    EXACT,   // CHUNKS chunks to every thread
    HELD,    // CHUNKS chunks at most
    BEYOND,  // chunks behind the first CHUNKS are read again
};
constexpr int threads_of(Fit fit) { return fit == Fit::BEYOND ? WIDE : NARROW; }

struct Forward {
    Elements x, residual, weight, bias, z, y;
    Global<float> mean, rstd;
    Dropout dropout;
    int64_t rows;
    int width;
    float per_width, eps;
    float without_weight;  // the factor of n beside the weight: the offset, or 1 where there is no weight
    int z_dtype;
    bool is_rms;
};

// z of a thread's chunk k from what was loaded, also stored.
template <bool VECTOR, int DTYPE, bool DROPOUT, int EACH>
__device__ __forceinline__ RawChunk make_z(const Forward &p, const Team<EACH> &team, uint64_t seed, int64_t row, int k, const RawChunk &raw_x,
                                           const RawChunk &raw_residual) {
    Chunk z = widen<DTYPE>(raw_x, p.x.dtype());
    if (DROPOUT && p.dropout) drop(z, p.dropout, seed, row, team.column(k));
    if (p.residual) {
        const Chunk residual = widen<DTYPE>(raw_residual, p.residual.dtype());
#pragma unroll
        for (int i = 0; i < CHUNK; i++) z.at[i] += residual.at[i];
    }
    const RawChunk rounded = narrow<DTYPE>(z, p.z_dtype);
    store_raw<VECTOR, DTYPE>(p.z, team.place(row, k), team.count(k), rounded);
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

// What the y of a thread's chunks takes from outside their row, as loaded: y = n (without_weight + weight) + bias.
template <int CHUNKS>
struct Affine {
    RawChunk weight[CHUNKS], bias[CHUNKS];
};

// Of chunks first, first + 1, ...
template <bool VECTOR, int PARAMS, int CHUNKS, int EACH>
__device__ __forceinline__ Affine<CHUNKS> load_affine(const Forward &p, const Team<EACH> &team, int first) {
    Affine<CHUNKS> affine = {};
    if (p.weight)
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) affine.weight[k] = load_raw<VECTOR, PARAMS>(p.weight, team.column(first + k), team.count(first + k));
    if (p.bias)
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) affine.bias[k] = load_raw<VECTOR, PARAMS>(p.bias, team.column(first + k), team.count(first + k));
    return affine;
}

template <bool VECTOR, int DTYPE, int PARAMS, int EACH>
__device__ __forceinline__ void store_y(const Forward &p, const Team<EACH> &team, int64_t row, int k, const Chunk &z, const RawChunk &raw_weight,
                                        const RawChunk &raw_bias, float mean, float rstd) {
    const int count = team.count(k);
    if (count <= 0) return;
    const Chunk weight = widen<PARAMS>(raw_weight, p.weight.dtype()), bias = widen<PARAMS>(raw_bias, p.bias.dtype());
    Chunk y;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) y.at[i] = (z.at[i] - mean) * rstd * (p.without_weight + weight.at[i]) + bias.at[i];
    store_chunk<VECTOR, DTYPE>(p.y, team.place(row, k), count, y);
}

// Blocks that a multiprocessor should hold: halves whose dtype is known take few registers, and the more warps the more bytes are under way.
template <int DTYPE, bool DROPOUT, Fit FIT>
constexpr int blocks_beside() {
    if (FIT == Fit::BEYOND) return 1;
    if (FIT == Fit::EXACT && DTYPE != FASTATTN_FLOAT32) return 3;
    return DTYPE != ANY_DTYPE && DTYPE != FASTATTN_FLOAT32 && !DROPOUT ? 4 : 2;
}

// DTYPE: of x, residual, z and y. PARAMS: of weight and bias. DROPOUT: there may be dropout.
template <bool VECTOR, int DTYPE, int PARAMS, bool DROPOUT, Fit FIT, int CHUNKS>
__global__ void __launch_bounds__(threads_of(FIT), blocks_beside<DTYPE, DROPOUT, FIT>()) norm_forward_kernel(const __grid_constant__ Forward p) {
    const Team<FIT == Fit::EXACT ? CHUNKS : 0> team(p.width);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;  // a row of one warp: the others of its block wait for nobody
    const uint64_t seed = DROPOUT && p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
    RawChunk z[CHUNKS];
    constexpr bool FEW = DTYPE == FASTATTN_BFLOAT16 || DTYPE == FASTATTN_FLOAT16;  // registers to a chunk
    constexpr int AT_ONCE = FEW || FIT != Fit::BEYOND ? CHUNKS : 1;                // loads under way together: as many as registers allow
    float total = 0.0f;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += AT_ONCE) {
        RawChunk residual[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) z[first + k] = load_raw<VECTOR, DTYPE>(p.x, team.place(row, first + k), team.count(first + k));
        if (p.residual)
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                residual[k] = load_raw<VECTOR, DTYPE>(p.residual, team.place(row, first + k), team.count(first + k));
        if (p.z)
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                z[first + k] = make_z<VECTOR, DTYPE, DROPOUT>(p, team, seed, row, first + k, z[first + k], residual[k]);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) total += sum_of(widen<DTYPE>(z[first + k], p.z_dtype));
    }
    // Where registers are few to a chunk, what y takes besides is on its way while the row is summed.
    constexpr bool EARLY = FIT == Fit::EXACT && FEW;
    Affine<EARLY ? CHUNKS : 1> affine;
    if constexpr (EARLY) affine = load_affine<VECTOR, PARAMS, CHUNKS>(p, team, 0);
    const int rounds = FIT == Fit::BEYOND ? team.rounds() : CHUNKS;
    for (int k = CHUNKS; k < rounds; k++) {
        const int64_t at = team.place(row, k);
        const RawChunk x = load_raw<VECTOR, DTYPE>(p.x, at, team.count(k)), residual = load_if<VECTOR, DTYPE>(p.residual, at, team.count(k));
        total += sum_of(widen<DTYPE>(p.z ? make_z<VECTOR, DTYPE, DROPOUT>(p, team, seed, row, k, x, residual) : x, p.z_dtype));
    }
    // z of a chunk that registers do not hold, as this thread stored or read it before.
    const auto reload = [&](int k) { return load_chunk<VECTOR>(p.z ? p.z : p.x, team.place(row, k), team.count(k)); };
    const Moments moments = team_moments(team, !p.is_rms, p.per_width, total, [&](float mean) {
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) squares += squares_about<VECTOR>(widen<DTYPE>(z[k], p.z_dtype), mean, team.count(k));
        for (int k = CHUNKS; k < rounds; k++) squares += squares_about<VECTOR>(reload(k), mean, team.count(k));
        return squares;
    });
    const float rstd = reciprocal_sqrt(moments.squares * p.per_width + p.eps);
    const auto finish = [&](int k, const Chunk &chunk, const RawChunk &weight, const RawChunk &bias) {
        store_y<VECTOR, DTYPE, PARAMS>(p, team, row, k, chunk, weight, bias, moments.mean, rstd);
    };
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        if constexpr (!EARLY) affine = load_affine<VECTOR, PARAMS, 1>(p, team, k);
        finish(k, widen<DTYPE>(z[k], p.z_dtype), affine.weight[EARLY ? k : 0], affine.bias[EARLY ? k : 0]);
    }
    for (int k = CHUNKS; k < rounds; k++) {
        const auto its = load_affine<VECTOR, PARAMS, 1>(p, team, k);
        finish(k, reload(k), its.weight[0], its.bias[0]);
    }
    if (threadIdx.x == 0) {
        if (p.mean) p.mean.set(row, moments.mean);
        if (p.rstd) p.rstd.set(row, rstd);
    }
}

// A row to `lanes` threads, whole warps; rows of one warp share a block.
template <bool VECTOR, int DTYPE, int PARAMS, bool DROPOUT, Fit FIT, int CHUNKS>
cudaError_t launch_rows(const Forward &p, int lanes, void *stream) {
    const int beside = lanes == WARP ? threads_of(FIT) / WARP : 1;
    const Launch how = {"norm_forward", dim3(static_cast<unsigned>((p.rows + beside - 1) / beside)),
                        dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(beside)), 0, stream};
    return launch<threads_of(FIT)>(how, norm_forward_kernel<VECTOR, DTYPE, PARAMS, DROPOUT, FIT, CHUNKS>, p);
}

// Any width: a power of two of warps.
template <bool VECTOR, int DTYPE, int PARAMS, bool DROPOUT>
cudaError_t launch_any(const Forward &p, void *stream) {
    const bool held = p.width <= NARROW * NARROW_CHUNKS * CHUNK;
    const int threads = held ? NARROW : WIDE, chunks = held ? NARROW_CHUNKS : WIDE_CHUNKS;
    int lanes = WARP;
    while (lanes < threads && lanes * chunks * CHUNK < p.width) lanes *= 2;
    if (held) return launch_rows<VECTOR, DTYPE, PARAMS, DROPOUT, Fit::HELD, NARROW_CHUNKS>(p, lanes, stream);
    return launch_rows<VECTOR, DTYPE, PARAMS, DROPOUT, Fit::BEYOND, WIDE_CHUNKS>(p, lanes, stream);
}

// Chunks that each thread of whole warps has where these hold a row exactly, as many as divide it; 0 where none do.
int exact_chunks(int width) {
    for (int chunks = NARROW_CHUNKS; chunks > 0; chunks--)
        if (width % (WARP * CHUNK * chunks) == 0) return width <= NARROW * CHUNK * chunks ? chunks : 0;
    return 0;
}

// Every tensor of one dtype, and exact_chunks() a thread.
template <int DTYPE, int CHUNKS = NARROW_CHUNKS>
cudaError_t launch_exact(const Forward &p, int chunks, void *stream) {
    if constexpr (CHUNKS > 1)
        if (chunks < CHUNKS) return launch_exact<DTYPE, CHUNKS - 1>(p, chunks, stream);
    return launch_rows<true, DTYPE, DTYPE, false, Fit::EXACT, CHUNKS>(p, p.width / (CHUNK * CHUNKS), stream);
}

template <int DTYPE>
cudaError_t launch_known(const Forward &p, void *stream) {
    const int chunks = p.dropout || !all_of(DTYPE, p.weight, p.bias) ? 0 : exact_chunks(p.width);
    if (chunks > 0) return launch_exact<DTYPE>(p, chunks, stream);
    if constexpr (DTYPE == FASTATTN_FLOAT32) return launch_any<true, ANY_DTYPE, ANY_DTYPE, true>(p, stream);
    else return p.dropout ? launch_any<true, DTYPE, ANY_DTYPE, true>(p, stream) : launch_any<true, DTYPE, ANY_DTYPE, false>(p, stream);
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
                       1.0f / static_cast<float>(call->width),
                       call->eps,
                       call->weight ? call->offset : 1.0f,
                       call->z ? call->z_dtype : call->x_dtype,
                       call->is_rms != 0};
    if (!all_vectors(call->width, p.x, p.residual, p.weight, p.bias, p.z, p.y)) return launch_any<false, ANY_DTYPE, ANY_DTYPE, true>(p, call->stream);
    if (all_of(FASTATTN_BFLOAT16, p.x, p.residual, p.z, p.y)) return launch_known<FASTATTN_BFLOAT16>(p, call->stream);
    if (all_of(FASTATTN_FLOAT16, p.x, p.residual, p.z, p.y)) return launch_known<FASTATTN_FLOAT16>(p, call->stream);
    if (all_of(FASTATTN_FLOAT32, p.x, p.residual, p.z, p.y)) return launch_known<FASTATTN_FLOAT32>(p, call->stream);
    return launch_any<true, ANY_DTYPE, ANY_DTYPE, true>(p, call->stream);
}
