// What the norms' forward and backward share: teams of threads that own a row, and their sums.
#pragma once
#include <primitives/launch.cuh>
#include <primitives/threads.cuh>

#include "elements.cuh"
#include "library.h"
#include "philox.cuh"
#include "shared_limits.h"

constexpr int MAX_WARPS = 16;  // of a block
constexpr int64_t MAX_WIDTH = 65536;

// blockDim.x threads, whole warps, share a row; blockDim.y rows run side by side. Thread x has chunks x, x + blockDim.x, ... EACH: how many chunks,
// where all threads have as many and nothing need ask what lies outside; else 0.
template <int EACH>
struct Team {
    int width;
    int lanes;  // threads of the row

    __device__ explicit Team(int width_) : width(width_), lanes(static_cast<int>(blockDim.x)) {}
    __device__ __forceinline__ int column(int k) const { return (k * lanes + static_cast<int>(threadIdx.x)) * CHUNK; }
    // Where a thread's chunk k of a row begins in memory.
    __device__ __forceinline__ int64_t place(int64_t row, int k) const { return row * width + column(0) + static_cast<int64_t>(k) * (lanes * CHUNK); }
    // Elements of a thread's chunk k that lie in the row; at most 0 where none does.
    __device__ __forceinline__ int count(int k) const {
        if constexpr (EACH > 0) return CHUNK;
        return width - column(k) < CHUNK ? width - column(k) : CHUNK;
    }
    // How many chunks the busiest thread has: the same for all, since threads exchange values.
    __device__ __forceinline__ int rounds() const { return EACH > 0 ? EACH : (width + lanes * CHUNK - 1) / (lanes * CHUNK); }
    __device__ __forceinline__ int warps() const { return lanes / WARP; }
    __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / WARP; }
    // What a warp has of the row: only its last chunks may be less than whole.
    __device__ __forceinline__ float elements_of(int warp) const {
        if constexpr (EACH > 0) return EACH * WARP * CHUNK;
        const int before = rounds() - 1, whole = WARP * CHUNK, last = width - (before * lanes + warp * WARP) * CHUNK;
        return static_cast<float>(before * whole + (last < 0 ? 0 : last < whole ? last : whole));
    }
};

// f(step) for the steps 16, 8, ... of a butterfly over a whole warp.
template <typename F>
__device__ __forceinline__ void over_warp(F &&f) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) f(step);
}

// The same over as many neighbours as hold the values of `count` warps, a power of two of them.
template <typename F>
__device__ __forceinline__ void over_warps(int count, F &&f) {
#pragma unroll
    for (int step = MAX_WARPS / 2; step > 0; step /= 2)
        if (step < count) f(step);
}

// Whose value this thread brings into over_warps: thread 0 that of warp 0, and so on, and again from 0.
__device__ __forceinline__ int warp_of_lane(int count) {
    int neighbours = MAX_WARPS;
#pragma unroll
    for (int half = MAX_WARPS / 2; half > 0; half /= 2)
        if (half >= count) neighbours = half;
    return static_cast<int>(threadIdx.x) % WARP & (neighbours - 1);
}

// Brings each warp's values, which all its threads have, to the threads of the row's others as over_warps wants them; 0 where there is no warp. Calls
// in a row alternate between the buffers 0 and 1, so that one barrier suffices: whoever writes into a buffer again has passed the barrier behind its
// last reads. All threads of a row call this together, and wait for no other row's; a block has at most 15 rows of more than one warp.
template <int EACH, int N>
__device__ __forceinline__ void exchange(const Team<EACH> &team, float (&values)[N], int buffer) {
    static_assert(2 * N * MAX_WARPS * sizeof(float) <= STATIC_BYTES_BESIDE_DYNAMIC);
    const Shared<float> parts = static_shared<float, 2 * N * MAX_WARPS>();
    const int first = static_cast<int>(threadIdx.y) * team.warps();
    const auto place = [&](int n, int of) { return (buffer * N + n) * MAX_WARPS + first + of; };
    if (static_cast<int>(threadIdx.x) % WARP == 0)
#pragma unroll
        for (int n = 0; n < N; n++) parts.set(place(n, team.warp()), values[n]);
    sync_named(1 + static_cast<int>(threadIdx.y), team.lanes);
    const int from = warp_of_lane(team.warps());
#pragma unroll
    for (int n = 0; n < N; n++) values[n] = from < team.warps() ? parts.get(place(n, from)) : 0.0f;
}

// Sums of N values over the threads of a row; every thread gets them. Together, as exchange(), unless a row has one warp.
template <int EACH, int N>
__device__ __forceinline__ void team_sums(const Team<EACH> &team, float (&values)[N], int buffer) {
    const auto add = [&](int step) {
#pragma unroll
        for (float &value : values) value += shuffle_xor(value, step);
    };
    over_warp(add);
    if (team.warps() == 1) return;
    exchange(team, values, buffer);
    over_warps(team.warps(), add);
}

// The mean of a row (0 where not `centred`) and its sum of squares about it.
struct Moments {
    float mean, squares;
};

// From each thread's sum, the reciprocal of the width and, by squares_about(mean), its squares. A warp takes its squares about its own mean; those
// about the row's are then sum_w squares_w + elements_w (mean_w - mean)^2 (Chan, Golub and LeVeque 1979): one exchange where two sums take two.
// Together, as exchange(), unless a row has one warp.
template <int EACH, typename F>
__device__ __forceinline__ Moments team_moments(const Team<EACH> &team, bool centred, float per_width, float total, F &&squares_about) {
    float mean = 0.0f;
    if (centred) {
        over_warp([&](int step) { total += shuffle_xor(total, step); });
        mean = total * (1.0f / team.elements_of(team.warp()));
    }
    float squares = squares_about(mean);
    over_warp([&](int step) { squares += shuffle_xor(squares, step); });
    if (team.warps() == 1) return {mean, squares};
    float all[2] = {mean, squares};
    exchange(team, all, 0);
    if (centred) {
        const int from = warp_of_lane(team.warps());
        const float elements = from < team.warps() ? team.elements_of(from) : 0.0f, its_mean = all[0];
        mean = its_mean * elements;
        over_warps(team.warps(), [&](int step) { mean += shuffle_xor(mean, step); });
        mean *= per_width;
        all[1] += elements * (its_mean - mean) * (its_mean - mean);
    }
    over_warps(team.warps(), [&](int step) { all[1] += shuffle_xor(all[1], step); });
    return {mean, all[1]};
}

template <bool VECTOR, int DTYPE>
__device__ __forceinline__ RawChunk load_if(const Elements &from, int64_t at, int count) {
    return from ? load_raw<VECTOR, DTYPE>(from, at, count) : RawChunk{};
}

__device__ __forceinline__ void drop(Chunk &value, const Dropout &dropout, uint64_t seed, int64_t row, int column) {
    float factor[CHUNK];
    keep_factors(dropout, seed, static_cast<uint32_t>(row), column, factor);
    // A dropped element is 0 whatever it was: NaN and infinity do not pass.
#pragma unroll
    for (int i = 0; i < CHUNK; i++) value.at[i] = factor[i] == 0.0f ? 0.0f : value.at[i] * factor[i];
}

template <typename... Tensors>
bool all_vectors(int64_t width, const Tensors &...tensors) {
    return width % CHUNK == 0 && (tensors.aligned() && ...);
}

// Whether all that are there have this dtype.
template <typename... Tensors>
bool all_of(int dtype, const Tensors &...tensors) {
    return ((!tensors || tensors.dtype() == dtype) && ...);
}

inline bool takes(int64_t rows, int64_t width) { return rows > 0 && rows < (int64_t(1) << 31) && width >= 1 && width <= MAX_WIDTH; }
