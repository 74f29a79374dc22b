// norm: LayerNorm and RMSNorm over rows, forward and backward, with dropout and residual in front.
//
// Contract   z = dropout(x) + residual, y = (z - mean) rstd (offset + weight) + bias; mean is 0 for RMS. Rows contiguous, width 1 to 65,536,
//            fewer than 2^31 rows, any mixture of float32, bfloat16 and float16. z is stored where there is dropout or a residual.
//            With n = (z - mean) rstd and g = grad_y (offset + weight), and without mean(g) for RMS:
//            dz = rstd (g - mean(g) - n mean(g n)) + grad_z, grad_x = dropout'(dz), grad_residual = dz,
//            grad_weight = sum over rows of grad_y n, grad_bias = sum over rows of grad_y; both as partial sums that the caller adds up.
// Numerics   float32, one rounding per output; z is rounded to its dtype before its statistics are taken; the variance is that of the centred
//            values. Every sum has an order that width and `parts` fix: bitwise repeatable.
// Algorithm  A warp per row up to some width, beyond that a block of up to 16 warps, so that a row lies in registers between its one read and
//            its one write: up to 20,480 columns forward, 12,288 backward; what lies behind is read again, from cache. Backward walkers
//            (a warp or a block) take every parts-th row and keep their columns' weight gradients in registers up to 8,192 columns; for wider
//            rows a second kernel makes those sums.
// Measured   not yet: compiled for sm_80 and sm_90 and run in the emulation, never on a GPU.
#include <cmath>

#include <primitives/launch.cuh>
#include <primitives/threads.cuh>

#include "device_guard.cuh"
#include "elements.cuh"
#include "library.h"
#include "philox.cuh"

namespace {

constexpr int MAX_WARPS = 16;
// Threads of a block: 256 may use 255 registers each, 512 have 128.
constexpr int NARROW = 256, WIDE = 512;
constexpr int FORWARD_NARROW_CHUNKS = 4, FORWARD_WIDE_CHUNKS = 5, BACKWARD_CHUNKS = 2, BACKWARD_SUMS_CHUNKS = 4, BACKWARD_WIDE_CHUNKS = 3;
constexpr int64_t MAX_WIDTH = 65536;
constexpr int64_t SUMS_WIDTH = NARROW * BACKWARD_SUMS_CHUNKS * CHUNK;

// --- Rows and who works on them -----------------------------------------------------------------------------------------------------------

// blockDim.x threads share a row; blockDim.y rows run side by side, and more than one only where a warp has a whole row.
struct Team {
    int width;
    int lanes;  // threads of the row

    __device__ explicit Team(int width_) : width(width_), lanes(static_cast<int>(blockDim.x)) {}
    __device__ __forceinline__ int column(int k) const { return (k * lanes + static_cast<int>(threadIdx.x)) * CHUNK; }
    __device__ __forceinline__ int count(int k) const { return width - column(k) < CHUNK ? width - column(k) : CHUNK; }
    // How many chunks the busiest thread has: the same for all, since threads exchange values.
    __device__ __forceinline__ int rounds() const { return (width + lanes * CHUNK - 1) / (lanes * CHUNK); }
    __device__ __forceinline__ int64_t number() const { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
};

// Two sums at once over the threads of a row; every thread gets both.
__device__ __forceinline__ void team_sums(const Team &team, float &a, float &b) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        a += shuffle_xor(a, step);
        b += shuffle_xor(b, step);
    }
    if (team.lanes == WARP) return;
    const Shared<float> parts = static_shared<float, 2 * MAX_WARPS>();
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    sync_block();  // the sums before these have been read
    if (lane == 0) {
        parts.set(warp, a);
        parts.set(MAX_WARPS + warp, b);
    }
    sync_block();
    const bool exists = lane < team.lanes / WARP;
    a = exists ? parts.get(lane) : 0.0f;
    b = exists ? parts.get(MAX_WARPS + lane) : 0.0f;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        a += shuffle_xor(a, step);
        b += shuffle_xor(b, step);
    }
}

__device__ __forceinline__ float team_sum(const Team &team, float a) {
    float none = 0.0f;
    team_sums(team, a, none);
    return a;
}

template <bool VECTOR>
__device__ __forceinline__ RawChunk load_if(const Elements &from, int64_t at, int count) {
    return from ? load_raw<VECTOR>(from, at, count) : RawChunk{};
}

// g = value (offset + weight)
template <bool VECTOR>
__device__ __forceinline__ void scale_by_weight(Chunk &value, const Elements &weight, float offset, int column, int count) {
    if (!weight) return;
    const Chunk w = load_chunk<VECTOR>(weight, column, count);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) value.at[i] *= offset + w.at[i];
}

__device__ __forceinline__ void drop(Chunk &value, const Dropout &dropout, uint64_t seed, int64_t row, int column) {
    float factor[CHUNK];
    keep_factors(dropout, seed, static_cast<uint32_t>(row), column, factor);
    // A dropped element is 0 whatever it was: NaN and infinity do not pass.
#pragma unroll
    for (int i = 0; i < CHUNK; i++) value.at[i] = factor[i] == 0.0f ? 0.0f : value.at[i] * factor[i];
}

// --- Forward ------------------------------------------------------------------------------------------------------------------------------

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

// z of one chunk, rounded as z is, from what was loaded; also stored where z is wanted.
template <bool VECTOR>
__device__ __forceinline__ Chunk make_z(const Forward &p, uint64_t seed, int64_t row, int column, int count, const RawChunk &raw_x,
                                        const RawChunk &raw_residual) {
    Chunk z = widen(raw_x, p.x.dtype());
    if (p.dropout) drop(z, p.dropout, seed, row, column);
    if (p.residual) {
        const Chunk residual = widen(raw_residual, p.residual.dtype());
#pragma unroll
        for (int i = 0; i < CHUNK; i++) z.at[i] += residual.at[i];
    }
    if (!p.z) return z;
    const RawChunk rounded = narrow(z, p.z_dtype);
    store_raw<VECTOR>(p.z, row * p.width + column, count, rounded);
    return widen(rounded, p.z_dtype);
}

__device__ __forceinline__ float sum_of(const Chunk &z) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) total += z.at[i];
    return total;
}

__device__ __forceinline__ float squares_about(const Chunk &z, float mean, int count) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) total += i < count ? (z.at[i] - mean) * (z.at[i] - mean) : 0.0f;
    return total;
}

template <bool VECTOR>
__device__ __forceinline__ void store_y(const Forward &p, int64_t row, int column, int count, const Chunk &z, float mean, float rstd) {
    if (count <= 0) return;
    Chunk y;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) y.at[i] = (z.at[i] - mean) * rstd;
    scale_by_weight<VECTOR>(y, p.weight, p.offset, column, count);
    if (p.bias) {
        const Chunk bias = load_chunk<VECTOR>(p.bias, column, count);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) y.at[i] += bias.at[i];
    }
    store_chunk<VECTOR>(p.y, row * p.width + column, count, y);
}

// z of a chunk that registers do not hold, as this thread stored or read it before.
template <bool VECTOR>
__device__ __forceinline__ Chunk reload_z(const Forward &p, int64_t row, int column, int count) {
    return load_chunk<VECTOR>(p.z ? p.z : p.x, row * p.width + column, count);
}

template <bool VECTOR, int THREADS, int CHUNKS>
__global__ void __launch_bounds__(THREADS) norm_forward_kernel(Forward p) {
    const Team team(p.width);
    const int64_t row = team.number();
    if (row >= p.rows) return;
    const uint64_t seed = p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
    constexpr int AT_ONCE = THREADS == NARROW ? CHUNKS : 1;  // loads under way together: as many as registers allow
    const int rounds = team.rounds();
    Chunk z[CHUNKS];
    float total = 0.0f;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += AT_ONCE) {
        RawChunk x[AT_ONCE], residual[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int64_t at = row * p.width + team.column(first + k);
            x[k] = load_raw<VECTOR>(p.x, at, team.count(first + k));
            residual[k] = load_if<VECTOR>(p.residual, at, team.count(first + k));
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            z[first + k] = {};
            if (first + k < rounds)
                z[first + k] = make_z<VECTOR>(p, seed, row, team.column(first + k), team.count(first + k), x[k], residual[k]);
            total += sum_of(z[first + k]);
        }
    }
    for (int k = CHUNKS; k < rounds; k++) {
        const int64_t at = row * p.width + team.column(k);
        const RawChunk x = load_raw<VECTOR>(p.x, at, team.count(k)), residual = load_if<VECTOR>(p.residual, at, team.count(k));
        total += sum_of(make_z<VECTOR>(p, seed, row, team.column(k), team.count(k), x, residual));
    }
    const float mean = p.is_rms ? 0.0f : team_sum(team, total) / static_cast<float>(p.width);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) squares += squares_about(z[k], mean, team.count(k));
    for (int k = CHUNKS; k < rounds; k++)
        squares += squares_about(reload_z<VECTOR>(p, row, team.column(k), team.count(k)), mean, team.count(k));
    const float rstd = 1.0f / sqrtf(team_sum(team, squares) / static_cast<float>(p.width) + p.eps);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) store_y<VECTOR>(p, row, team.column(k), team.count(k), z[k], mean, rstd);
    for (int k = CHUNKS; k < rounds; k++)
        store_y<VECTOR>(p, row, team.column(k), team.count(k), reload_z<VECTOR>(p, row, team.column(k), team.count(k)), mean, rstd);
    if (threadIdx.x == 0) {
        if (p.mean) p.mean.set(row, mean);
        p.rstd.set(row, rstd);
    }
}

// --- Backward -----------------------------------------------------------------------------------------------------------------------------

struct Backward {
    Elements grad_y, grad_z, z, weight, grad_x, grad_residual, weight_parts, bias_parts;
    Global<const float> mean, rstd;
    Dropout dropout;
    int64_t rows, parts;
    int width;
    float offset;
};

// What one chunk contributes: grad_y and n, both 0 outside the row.
struct Terms {
    Chunk grad_y, n;
};

__device__ __forceinline__ Terms make_terms(const Backward &p, const RawChunk &raw_grad, const RawChunk &raw_z, int count, float mean, float rstd) {
    Terms terms = {widen(raw_grad, p.grad_y.dtype()), widen(raw_z, p.z.dtype())};
#pragma unroll
    for (int i = 0; i < CHUNK; i++) terms.n.at[i] = i < count ? (terms.n.at[i] - mean) * rstd : 0.0f;
    return terms;
}

template <bool VECTOR>
__device__ __forceinline__ void add_products(const Backward &p, const Terms &terms, int column, int count, float &g_sum, float &gn_sum) {
    Chunk g = terms.grad_y;
    scale_by_weight<VECTOR>(g, p.weight, p.offset, column, count);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        g_sum += g.at[i];
        gn_sum += g.at[i] * terms.n.at[i];
    }
}

template <bool VECTOR>
__device__ __forceinline__ void store_gradients(const Backward &p, const Terms &terms, uint64_t seed, int64_t row, int column, int count,
                                                float g_mean, float gn_mean, float rstd) {
    const int64_t at = row * p.width + column;
    Chunk dz = terms.grad_y;
    scale_by_weight<VECTOR>(dz, p.weight, p.offset, column, count);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) dz.at[i] = rstd * (dz.at[i] - g_mean - terms.n.at[i] * gn_mean);
    if (p.grad_z) {
        const Chunk grad_z = load_chunk<VECTOR>(p.grad_z, at, count);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) dz.at[i] += grad_z.at[i];
    }
    if (p.grad_residual) store_chunk<VECTOR>(p.grad_residual, at, count, dz);
    if (p.dropout) drop(dz, p.dropout, seed, row, column);
    store_chunk<VECTOR>(p.grad_x, at, count, dz);
}

// SUMS: rows fit the registers, and the walker keeps the sums of its columns beside them.
template <bool VECTOR, int THREADS, int CHUNKS, bool SUMS>
__global__ void __launch_bounds__(THREADS) norm_backward_kernel(Backward p) {
    const Team team(p.width);
    const int64_t walker = team.number();
    if (walker >= p.parts) return;
    const uint64_t seed = p.dropout ? static_cast<uint64_t>(p.dropout.seed.get(0)) : 0;
    const int rounds = team.rounds();
    const float per_width = 1.0f / static_cast<float>(p.width);
    Chunk weight_sum[SUMS ? CHUNKS : 1] = {}, bias_sum[SUMS ? CHUNKS : 1] = {};
    for (int64_t row = walker; row < p.rows; row += p.parts) {
        const float mean = p.mean ? p.mean.get(row) : 0.0f, rstd = p.rstd.get(row);
        RawChunk grad_y[CHUNKS], z[CHUNKS];
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const int64_t at = row * p.width + team.column(k);
            grad_y[k] = load_raw<VECTOR>(p.grad_y, at, team.count(k));
            z[k] = load_raw<VECTOR>(p.z, at, team.count(k));
        }
        float g_mean = 0.0f, gn_mean = 0.0f;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const Terms terms = make_terms(p, grad_y[k], z[k], team.count(k), mean, rstd);
            add_products<VECTOR>(p, terms, team.column(k), team.count(k), g_mean, gn_mean);
            if constexpr (SUMS) {
#pragma unroll
                for (int i = 0; i < CHUNK; i++) {
                    weight_sum[k].at[i] += terms.grad_y.at[i] * terms.n.at[i];
                    bias_sum[k].at[i] += terms.grad_y.at[i];
                }
            }
        }
        for (int k = CHUNKS; !SUMS && k < rounds; k++) {
            const int64_t at = row * p.width + team.column(k);
            const Terms terms = make_terms(p, load_raw<VECTOR>(p.grad_y, at, team.count(k)), load_raw<VECTOR>(p.z, at, team.count(k)),
                                           team.count(k), mean, rstd);
            add_products<VECTOR>(p, terms, team.column(k), team.count(k), g_mean, gn_mean);
        }
        team_sums(team, g_mean, gn_mean);
        g_mean = p.mean ? g_mean * per_width : 0.0f;
        gn_mean *= per_width;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            if (k >= rounds) continue;
            const Terms terms = make_terms(p, grad_y[k], z[k], team.count(k), mean, rstd);
            store_gradients<VECTOR>(p, terms, seed, row, team.column(k), team.count(k), g_mean, gn_mean, rstd);
        }
        for (int k = CHUNKS; !SUMS && k < rounds; k++) {
            const int64_t at = row * p.width + team.column(k);
            const Terms terms = make_terms(p, load_raw<VECTOR>(p.grad_y, at, team.count(k)), load_raw<VECTOR>(p.z, at, team.count(k)),
                                           team.count(k), mean, rstd);
            store_gradients<VECTOR>(p, terms, seed, row, team.column(k), team.count(k), g_mean, gn_mean, rstd);
        }
    }
    if constexpr (SUMS) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const int64_t at = walker * p.width + team.column(k);
            if (p.weight_parts) store_chunk<VECTOR>(p.weight_parts, at, team.count(k), weight_sum[k]);
            if (p.bias_parts) store_chunk<VECTOR>(p.bias_parts, at, team.count(k), bias_sum[k]);
        }
    }
}

// Row blockIdx.y of the partial sums, for rows too wide for the kernel above: a thread owns eight columns.
template <bool VECTOR>
__global__ void __launch_bounds__(NARROW) norm_column_sums_kernel(Backward p) {
    const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * CHUNK;
    const int count = p.width - column < CHUNK ? p.width - column : CHUNK;
    if (count <= 0) return;
    Chunk weight_sum = {}, bias_sum = {};
    for (int64_t row = blockIdx.y; row < p.rows; row += p.parts) {
        const int64_t at = row * p.width + column;
        const Terms terms = make_terms(p, load_raw<VECTOR>(p.grad_y, at, count), load_raw<VECTOR>(p.z, at, count), count,
                                       p.mean ? p.mean.get(row) : 0.0f, p.rstd.get(row));
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            weight_sum.at[i] += terms.grad_y.at[i] * terms.n.at[i];
            bias_sum.at[i] += terms.grad_y.at[i];
        }
    }
    const int64_t at = static_cast<int64_t>(blockIdx.y) * p.width + column;
    if (p.weight_parts) store_chunk<VECTOR>(p.weight_parts, at, count, weight_sum);
    if (p.bias_parts) store_chunk<VECTOR>(p.bias_parts, at, count, bias_sum);
}

// --- Launches -----------------------------------------------------------------------------------------------------------------------------

// Threads that share a row, so that each has `chunks` chunks of it: a power of two of warps.
int team_size(int64_t width, int chunks, int most) {
    int threads = WARP;
    while (threads < most && static_cast<int64_t>(threads) * chunks * CHUNK < width) threads *= 2;
    return threads;
}

// A block of at least 256 threads: as many one-warp rows as fit, or a row of more warps.
Launch rows_of_teams(const char *name, int threads, int64_t rows, void *stream) {
    const int beside = threads == WARP ? NARROW / WARP : 1;
    return {name, dim3(static_cast<unsigned>((rows + beside - 1) / beside)), dim3(static_cast<unsigned>(threads), static_cast<unsigned>(beside)), 0,
            stream};
}

template <typename... Tensors>
bool all_vectors(int64_t width, const Tensors &...tensors) {
    return width % CHUNK == 0 && (tensors.aligned() && ...);
}

template <bool VECTOR>
cudaError_t launch_forward(const Forward &p, void *stream) {
    if (p.width > NARROW * FORWARD_NARROW_CHUNKS * CHUNK)
        return launch<WIDE>(rows_of_teams("norm_forward", WIDE, p.rows, stream), norm_forward_kernel<VECTOR, WIDE, FORWARD_WIDE_CHUNKS>, p);
    const Launch how = rows_of_teams("norm_forward", team_size(p.width, FORWARD_NARROW_CHUNKS, NARROW), p.rows, stream);
    return launch<NARROW>(how, norm_forward_kernel<VECTOR, NARROW, FORWARD_NARROW_CHUNKS>, p);
}

template <bool VECTOR>
cudaError_t launch_backward(const Backward &p, void *stream) {
    if (p.width <= SUMS_WIDTH) {
        const Launch how = rows_of_teams("norm_backward", team_size(p.width, BACKWARD_CHUNKS, NARROW), p.parts, stream);
        if (p.width <= NARROW * BACKWARD_CHUNKS * CHUNK) return launch<NARROW>(how, norm_backward_kernel<VECTOR, NARROW, BACKWARD_CHUNKS, true>, p);
        return launch<NARROW>(how, norm_backward_kernel<VECTOR, NARROW, BACKWARD_SUMS_CHUNKS, true>, p);
    }
    Backward rows = p;
    rows.parts = p.rows;
    cudaError_t error =
        launch<WIDE>(rows_of_teams("norm_backward", WIDE, p.rows, stream), norm_backward_kernel<VECTOR, WIDE, BACKWARD_WIDE_CHUNKS, false>, rows);
    if (error != cudaSuccess || !(p.weight_parts || p.bias_parts)) return error;
    const auto columns = static_cast<unsigned>((p.width + NARROW * CHUNK - 1) / (NARROW * CHUNK));
    const Launch sums = {"norm_column_sums", dim3(columns, static_cast<unsigned>(p.parts)), dim3(NARROW), 0, stream};
    return launch<NARROW>(sums, norm_column_sums_kernel<VECTOR>, p);
}

bool takes(int64_t rows, int64_t width) { return rows > 0 && rows < (int64_t(1) << 31) && width >= 1 && width <= MAX_WIDTH; }

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
                       call->z_dtype,
                       call->is_rms != 0};
    const bool vector = all_vectors(call->width, p.x, p.residual, p.weight, p.bias, p.z, p.y);
    return vector ? launch_forward<true>(p, call->stream) : launch_forward<false>(p, call->stream);
}

extern "C" int64_t fastattn_cuda_norm_backward_parts(int64_t rows, int64_t width, int32_t multiprocessors) {
    // Two blocks for each multiprocessor; rows of a warp run eight to a block.
    int64_t wanted = 2 * int64_t(multiprocessors);
    if (team_size(width, BACKWARD_CHUNKS, NARROW) == WARP) wanted *= NARROW / WARP;
    return rows < wanted ? rows : wanted;
}

extern "C" int fastattn_cuda_norm_backward(const fastattn_cuda_norm_gradient *call) {
    if (call->rows == 0) return cudaSuccess;
    if (!takes(call->rows, call->width) || call->parts < 1 || call->parts > 65535) return cudaErrorInvalidValue;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    const int64_t size = call->rows * call->width;
    const Backward p = {Elements(call->grad_y, call->x_dtype, size),
                        Elements(call->grad_z, call->z_dtype, size),
                        Elements(call->z, call->z_dtype, size),
                        Elements(call->weight, call->weight_dtype, call->width),
                        Elements(call->grad_x, call->x_dtype, size),
                        Elements(call->grad_residual, call->z_dtype, size),
                        Elements(call->grad_weight_parts, FASTATTN_FLOAT32, call->parts * call->width),
                        Elements(call->grad_bias_parts, FASTATTN_FLOAT32, call->parts * call->width),
                        Global<const float>(call->mean, call->rows),
                        Global<const float>(call->rstd, call->rows),
                        Dropout(call->dropout),
                        call->rows,
                        call->parts,
                        static_cast<int>(call->width),
                        call->offset};
    const bool vector = all_vectors(call->width, p.grad_y, p.grad_z, p.z, p.weight, p.grad_x, p.grad_residual, p.weight_parts, p.bias_parts);
    return vector ? launch_backward<true>(p, call->stream) : launch_backward<false>(p, call->stream);
}
