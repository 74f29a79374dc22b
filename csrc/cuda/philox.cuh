// The dropout of every backend on the device; which bits decide about which element: common/philox.h.
#pragma once
#include <primitives/memory.cuh>
#include <primitives/numeric.cuh>
#include <primitives/threads.cuh>

#include "../common/philox.h"
#include "library.h"

struct Random {
    uint32_t word[4];
};

__device__ __forceinline__ Random philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32), c3 = 0;
#pragma unroll
    for (int round = 0; round < FASTATTN_PHILOX_ROUNDS; round++) {
        const uint32_t high0 = multiply_high(FASTATTN_PHILOX_MULTIPLIER_0, c0), low0 = FASTATTN_PHILOX_MULTIPLIER_0 * c0;
        const uint32_t high1 = multiply_high(FASTATTN_PHILOX_MULTIPLIER_1, c2), low1 = FASTATTN_PHILOX_MULTIPLIER_1 * c2;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += FASTATTN_PHILOX_WEYL_0;
        key1 += FASTATTN_PHILOX_WEYL_1;
    }
    return {{c0, c1, c2, c3}};
}

// What a kernel needs of a dropout; threshold 0 is none.
struct Dropout {
    Global<const int64_t> seed;
    uint32_t threshold;
    float keep_scale;

    Dropout() = default;
    Dropout(const fastattn_cuda_dropout &from)
        : seed(from.seed, from.threshold ? 1 : 0), threshold(from.threshold), keep_scale(from.keep_scale) {}
    __host__ __device__ explicit operator bool() const { return threshold != 0; }
};

// The factors (0 or keep_scale) of eight columns from `column` on, a multiple of 8, of a row: four calls, each for one pair of columns.
__device__ __forceinline__ void keep_factors_alone(const Dropout &dropout, uint64_t seed, uint32_t row, int64_t column, float (&factor)[8]) {
    const int own = static_cast<int>(column % 32) / 8;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        const Random drawn = philox(seed, row, static_cast<uint32_t>(4 * (column / 32) + pair), 0);
        const uint32_t word = own == 0 ? drawn.word[0] : own == 1 ? drawn.word[1] : own == 2 ? drawn.word[2] : drawn.word[3];
        factor[2 * pair] = (word & 0xFFFF) >= dropout.threshold ? dropout.keep_scale : 0.0f;
        factor[2 * pair + 1] = (word >> 16) >= dropout.threshold ? dropout.keep_scale : 0.0f;
    }
}

// The same with a quarter of the calls, where a warp has neighbouring columns of one row. Four neighbouring lanes have neighbouring columns,
// the first a multiple of 32: each draws one pair's call for all four, and they exchange words. The whole warp takes part.
__device__ __forceinline__ void keep_factors(const Dropout &dropout, uint64_t seed, uint32_t row, int column, float (&factor)[8]) {
    const int lane = static_cast<int>(threadIdx.x) % WARP, own = lane % 4;
    const Random drawn = philox(seed, row, static_cast<uint32_t>(4 * (column / 32) + own), 0);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const int pair = (own + step) % 4;  // whose call this lane reads; its own word of it decides about columns 2 pair, 2 pair + 1
        const int reader = (own + 4 - step) % 4;
        const uint32_t offered = reader == 0 ? drawn.word[0] : reader == 1 ? drawn.word[1] : reader == 2 ? drawn.word[2] : drawn.word[3];
        const uint32_t word = shuffle(offered, lane - own + pair);
        const float low = (word & 0xFFFF) >= dropout.threshold ? dropout.keep_scale : 0.0f;
        const float high = (word >> 16) >= dropout.threshold ? dropout.keep_scale : 0.0f;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            if (p != pair) continue;
            factor[2 * p] = low;
            factor[2 * p + 1] = high;
        }
    }
}
