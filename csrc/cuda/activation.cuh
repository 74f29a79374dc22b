// The six activations and their derivatives in float32; formulas beside the enum in common/problem.h.
#pragma once
#include <cmath>

#include <primitives/numeric.cuh>

#include "../common/problem.h"

struct Sigmoid {
    float value, complement;  // complement = 1 - value without cancellation
};

__device__ __forceinline__ Sigmoid sigmoid(float x) {
    // exp(-|x|) never overflows; the larger of the two is 1 / (1 + e), the smaller e / (1 + e).
    const float e = expf(-fabsf(x)), larger = 1.0f / (1.0f + e), smaller = e * larger;
    return x < 0.0f ? Sigmoid{smaller, larger} : Sigmoid{larger, smaller};
}

// 2 sqrt(2/pi) (x + 0.044715 x^3): the sigmoid of this is 0.5 (1 + tanh(half of it)), without cancellation for negative x.
__device__ __forceinline__ float tanh_argument(float x) { return 1.5957691216057308f * x * (1.0f + 0.044715f * x * x); }

// Comparisons that NaN fails leave it in place, which fmaxf would not.
template <int ACTIVATION>
__device__ __forceinline__ float activate(float x) {
    if constexpr (ACTIVATION == FASTATTN_ACT_RELU) return x < 0.0f ? 0.0f : x;
    if constexpr (ACTIVATION == FASTATTN_ACT_GELU) return 0.5f * x * erfcf(-0.70710678118654752f * x);
    if constexpr (ACTIVATION == FASTATTN_ACT_GELU_TANH) return x * sigmoid(tanh_argument(x)).value;
    if constexpr (ACTIVATION == FASTATTN_ACT_SILU) return x * sigmoid(x).value;
    if constexpr (ACTIVATION == FASTATTN_ACT_QUICK_GELU) return x * sigmoid(1.702f * x).value;
    if constexpr (ACTIVATION == FASTATTN_ACT_RELU2) return x < 0.0f ? 0.0f : x * x;
    return x;
}

template <int ACTIVATION>
__device__ __forceinline__ float activate_derivative(float x) {
    if constexpr (ACTIVATION == FASTATTN_ACT_RELU) return x > 0.0f ? 1.0f : 0.0f;
    if constexpr (ACTIVATION == FASTATTN_ACT_GELU)
        return 0.5f * erfcf(-0.70710678118654752f * x) + 0.39894228040143268f * x * expf(-0.5f * x * x);
    if constexpr (ACTIVATION == FASTATTN_ACT_GELU_TANH) {
        const Sigmoid s = sigmoid(tanh_argument(x));
        return s.value + x * s.value * s.complement * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    }
    if constexpr (ACTIVATION == FASTATTN_ACT_SILU) {
        const Sigmoid s = sigmoid(x);
        return s.value + x * s.value * s.complement;
    }
    if constexpr (ACTIVATION == FASTATTN_ACT_QUICK_GELU) {
        const Sigmoid s = sigmoid(1.702f * x);
        return s.value + 1.702f * x * s.value * s.complement;
    }
    if constexpr (ACTIVATION == FASTATTN_ACT_RELU2) return x < 0.0f ? 0.0f : 2.0f * x;
    return 1.0f;
}

template <int ACTIVATION>
struct ActivationCode {
    static constexpr int value = ACTIVATION;
};

// Calls f(ActivationCode<activation>()): all threads branch alike, once for many elements.
template <typename F>
__device__ __forceinline__ void with_activation(int activation, F &&f) {
    switch (activation) {
        case FASTATTN_ACT_RELU: return f(ActivationCode<FASTATTN_ACT_RELU>());
        case FASTATTN_ACT_GELU: return f(ActivationCode<FASTATTN_ACT_GELU>());
        case FASTATTN_ACT_GELU_TANH: return f(ActivationCode<FASTATTN_ACT_GELU_TANH>());
        case FASTATTN_ACT_SILU: return f(ActivationCode<FASTATTN_ACT_SILU>());
        case FASTATTN_ACT_QUICK_GELU: return f(ActivationCode<FASTATTN_ACT_QUICK_GELU>());
        case FASTATTN_ACT_RELU2: return f(ActivationCode<FASTATTN_ACT_RELU2>());
        default: return f(ActivationCode<FASTATTN_ACT_NONE>());
    }
}
