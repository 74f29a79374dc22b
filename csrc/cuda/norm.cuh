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
};

// Sums of N values over the threads of a row; every thread gets them. Calls in a row alternate between the buffers 0 and 1, so that one barrier
// suffices: whoever writes into a buffer again has passed the barrier behind its last reads. All threads of a block call this together unless
// a row has one warp.
template <int N>
__device__ __forceinline__ void team_sums(const Team &team, float (&values)[N], int buffer) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
#pragma unroll
        for (float &value : values) value += shuffle_xor(value, step);
    if (team.lanes == WARP) return;
    const Shared<float> parts = static_shared<float, 2 * N * MAX_WARPS>();
    const int warps = team.lanes / WARP, first = static_cast<int>(threadIdx.y) * warps;
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    const auto place = [&](int n, int of) { return (buffer * N + n) * MAX_WARPS + first + of; };
    if (lane == 0)
#pragma unroll
        for (int n = 0; n < N; n++) parts.set(place(n, warp), values[n]);
    sync_block();
#pragma unroll
    for (int n = 0; n < N; n++) values[n] = lane < warps ? parts.get(place(n, lane)) : 0.0f;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
#pragma unroll
        for (float &value : values) value += shuffle_xor(value, step);
}

template <bool VECTOR, bool HALVES>
__device__ __forceinline__ RawChunk load_if(const Elements &from, int64_t at, int count) {
    return from ? load_raw<VECTOR, HALVES>(from, at, count) : RawChunk{};
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

template <typename... Tensors>
bool all_halves(const Tensors &...tensors) {
    return ((!tensors || tensors.dtype() != FASTATTN_FLOAT32) && ...);
}

inline bool takes(int64_t rows, int64_t width) { return rows > 0 && rows < (int64_t(1) << 31) && width >= 1 && width <= MAX_WIDTH; }
