// What the norms' forward and backward share: teams of threads that own a row, and their sums.
#pragma once
#include <primitives/launch.cuh>
#include <primitives/threads.cuh>

#include "elements.cuh"
#include "library.h"
#include "philox.cuh"

constexpr int MAX_WARPS = 16;  // of a block
constexpr int64_t MAX_WIDTH = 65536;

// blockDim.x threads, whole warps, share a row; blockDim.y rows run side by side. Thread x has chunks x, x + blockDim.x, ...
struct Team {
    int width;
    int lanes;  // threads of the row

    __device__ explicit Team(int width_) : width(width_), lanes(static_cast<int>(blockDim.x)) {}
    __device__ __forceinline__ int column(int k) const { return (k * lanes + static_cast<int>(threadIdx.x)) * CHUNK; }
    __device__ __forceinline__ int count(int k) const { return width - column(k) < CHUNK ? width - column(k) : CHUNK; }
    // How many chunks the busiest thread has: the same for all, since threads exchange values.
    __device__ __forceinline__ int rounds() const { return (width + lanes * CHUNK - 1) / (lanes * CHUNK); }
    __device__ __forceinline__ bool is_even() const { return width % (lanes * CHUNK) == 0; }  // all threads have as many elements
    __device__ __forceinline__ int warps() const { return lanes / WARP; }
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

// Brings each warp's values, which all its threads have, to the threads of the others as over_warps wants them; 0 where there is no warp. Calls in a
// row alternate between the buffers 0 and 1, so that one barrier suffices: whoever writes into a buffer again has passed the barrier behind its
// last reads. All threads of a block call this together.
template <int N>
__device__ __forceinline__ void exchange(const Team &team, float (&values)[N], int buffer) {
    const Shared<float> parts = static_shared<float, 2 * N * MAX_WARPS>();
    const int first = static_cast<int>(threadIdx.y) * team.warps(), warp = static_cast<int>(threadIdx.x) / WARP;
    const auto place = [&](int n, int of) { return (buffer * N + n) * MAX_WARPS + first + of; };
    if (static_cast<int>(threadIdx.x) % WARP == 0)
#pragma unroll
        for (int n = 0; n < N; n++) parts.set(place(n, warp), values[n]);
    sync_block();
    const int from = warp_of_lane(team.warps());
#pragma unroll
    for (int n = 0; n < N; n++) values[n] = from < team.warps() ? parts.get(place(n, from)) : 0.0f;
}

// Sums of N values over the threads of a row; every thread gets them. Together, as exchange(), unless a row has one warp.
template <int N>
__device__ __forceinline__ void team_sums(const Team &team, float (&values)[N], int buffer) {
    const auto add = [&](int step) {
#pragma unroll
        for (float &value : values) value += shuffle_xor(value, step);
    };
    over_warp(add);
    if (team.warps() == 1) return;
    exchange(team, values, buffer);
    over_warps(team.warps(), add);
}

// From each thread's mean and sum of squares about it, of `count` elements each, those of the row, in one exchange where sums take two (Chan, Golub
// and LeVeque 1979: the squares about a common mean are the squares about both means and count / 2 (difference of the means)^2). For a power of
// two of warps; together unless a row has one warp.
__device__ __forceinline__ void team_moments(const Team &team, float &mean, float &squares, float count) {
    float both[2] = {mean, squares};
    const auto merge = [&](int step) {
        const float other = shuffle_xor(both[0], step), apart = other - both[0];
        both[1] = both[1] + shuffle_xor(both[1], step) + apart * apart * (0.5f * count);
        both[0] = 0.5f * (both[0] + other);
        count *= 2.0f;
    };
    over_warp(merge);
    if (team.warps() > 1) {
        exchange(team, both, 0);
        over_warps(team.warps(), merge);
    }
    mean = both[0];
    squares = both[1];
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
