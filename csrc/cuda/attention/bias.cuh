// What is added to scores: elements of a dense bias, and biases of distance alone. Kernels read both alike.
#pragma once
#include <cfloat>
#include <cmath>

#include "params.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.69314718055994531f;

// a + b, finite where a and `given`, of which b was made, are: only -inf hides.
__device__ __forceinline__ float sum_of(float a, float b, float given) {
    const float sum = a + b;
    if (!(fabsf(sum) > FLT_MAX) || fabsf(a) > FLT_MAX || fabsf(given) > FLT_MAX) return sum;
    return sum < 0.0f ? -FLT_MAX : FLT_MAX;
}

// Element `at` of a dense bias.
__device__ __forceinline__ float bias_element(const Elements &bias, int64_t at) {
    if (bias.dtype() == FASTATTN_FLOAT32) return bias.floats().get(at);
    const uint32_t bits = bias.halves().get(at);
    float value, unused;
    if (bias.dtype() == FASTATTN_BFLOAT16)
        unpack_pair<bfloat16>(bits, value, unused);
    else
        unpack_pair<float16>(bits, value, unused);
    return value;
}

// The bias of head h of batch entry b at `distance`.
__device__ __forceinline__ float distance_bias(const DistanceParams &d, int b, int h, int distance) {
    float bias = 0.0f;
    if (d.table) bias = d.table.get(h * d.table_stride + clamp(distance - d.table_first, 0, static_cast<int>(d.table_size) - 1));
    if (d.slopes) {
        const float slope = d.slopes.get(b * d.slopes_stride + h);
        bias = sum_of(bias, -slope * fabsf(static_cast<float>(distance)), slope);
    }
    return bias;
}
