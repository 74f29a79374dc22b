// What is added to scores, in forward, backward and decoding, whichever way their tiles lie.
#pragma once
#include <cfloat>
#include <cmath>

#include <primitives/threads.cuh>

#include "params.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.69314718055994531f;

// a + b, finite where a and `given`, of which b was made, are: only -inf hides.
__device__ __forceinline__ float sum_of(float a, float b, float given) {
    const float sum = a + b;
    if (!(fabsf(sum) > FLT_MAX) || fabsf(a) > FLT_MAX || fabsf(given) > FLT_MAX) return sum;
    return sum < 0.0f ? -FLT_MAX : FLT_MAX;
}

// The dense bias of a query and a key that exist, in a call of attention or of decoding.
template <typename Params>
__device__ __forceinline__ float dense_bias(const Params &p, int b, int h, int query, int key) {
    const int64_t at = b * p.bias_stride[0] + h * p.bias_stride[1] + query * p.bias_stride[2] + key * p.bias_stride[3];
    if (p.bias.dtype() == FASTATTN_FLOAT32) return p.bias.floats().get(at);
    const uint32_t bits = p.bias.halves().get(at);
    float value, unused;
    if (p.bias.dtype() == FASTATTN_BFLOAT16)
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

// The biases of COUNT distances from `first` on, by THREADS threads of a block.
template <int COUNT, int THREADS>
__device__ __forceinline__ void fill_distance_biases(const Shared<float> &biases, const DistanceParams &d, int b, int h, int first) {
    for (int i = static_cast<int>(threadIdx.x); i < COUNT; i += THREADS) biases.set(i, distance_bias(d, b, h, first + i));
}

// 1 - tanh^2 of two scores, what softcap does to their gradients, in one register: rounded to 2^-11 of themselves, down to 2^-29, below which
// float32 has no more than noise of it.
constexpr float SLOPE_SCALE = 32768.0f;
__device__ __forceinline__ uint32_t pack_slopes(float low_tanh, float high_tanh) {
    return pack_pair<float16>(SLOPE_SCALE * (1.0f - low_tanh * low_tanh), SLOPE_SCALE * (1.0f - high_tanh * high_tanh));
}
__device__ __forceinline__ void bend_gradients(float &low, float &high, uint32_t slopes) {
    float low_slope, high_slope;
    unpack_pair<float16>(slopes, low_slope, high_slope);
    low *= low_slope / SLOPE_SCALE, high *= high_slope / SLOPE_SCALE;
}
