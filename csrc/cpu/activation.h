// The six activations and their derivatives on vectors; formulas beside the enum in common/problem.h.
#pragma once
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

constexpr float kInvSqrt2 = 0.70710678118654752440f;
constexpr float kInvSqrt2Pi = 0.39894228040143267794f;
constexpr float kSqrt2OverPi = 0.79788456080286535588f;
constexpr float kTanhCubic = 0.044715f;
constexpr float kQuickGelu = 1.702f;

FASTATTN_INLINE vfloat normal_cdf(vfloat x) {
    const vfloat tail = 0.5f * erfc_positive(abs(x) * kInvSqrt2);  // of the smaller side: no cancellation for negative x
    return select((vint)(x < 0.0f), tail, 1.0f - tail);
}

template <int activation>
FASTATTN_INLINE vfloat activate(vfloat x) {
    if constexpr (activation == FASTATTN_ACT_RELU) return select((vint)(x < 0.0f), zero(), x);  // NaN stays NaN
    if constexpr (activation == FASTATTN_ACT_GELU) return x * normal_cdf(x);
    // 0.5 (1 + tanh u) is sigmoid(2 u) exactly.
    if constexpr (activation == FASTATTN_ACT_GELU_TANH) return x * sigmoid(x * (2 * kSqrt2OverPi) * (1.0f + kTanhCubic * x * x)).value;
    if constexpr (activation == FASTATTN_ACT_SILU) return x * sigmoid(x).value;
    if constexpr (activation == FASTATTN_ACT_QUICK_GELU) return x * sigmoid(kQuickGelu * x).value;
    if constexpr (activation == FASTATTN_ACT_RELU2) {
        const vfloat positive = select((vint)(x < 0.0f), zero(), x);
        return positive * positive;
    }
    return x;
}

template <int activation>
FASTATTN_INLINE vfloat activate_derivative(vfloat x) {
    if constexpr (activation == FASTATTN_ACT_RELU) return select((vint)(x > 0.0f), broadcast(1.0f), zero());
    if constexpr (activation == FASTATTN_ACT_GELU) return normal_cdf(x) + x * kInvSqrt2Pi * exp2(x * x * (-0.5f * kLog2e));
    if constexpr (activation == FASTATTN_ACT_GELU_TANH) {
        const Sigmoid s = sigmoid(x * (2 * kSqrt2OverPi) * (1.0f + kTanhCubic * x * x));
        return s.value + x * s.value * s.complement * (2 * kSqrt2OverPi) * (1.0f + 3 * kTanhCubic * x * x);
    }
    if constexpr (activation == FASTATTN_ACT_SILU) {
        const Sigmoid s = sigmoid(x);
        return s.value + x * s.value * s.complement;
    }
    if constexpr (activation == FASTATTN_ACT_QUICK_GELU) {
        const Sigmoid s = sigmoid(kQuickGelu * x);
        return s.value + kQuickGelu * x * s.value * s.complement;
    }
    if constexpr (activation == FASTATTN_ACT_RELU2) return 2.0f * select((vint)(x < 0.0f), zero(), x);
    return broadcast(1.0f);
}

// Calls f.template operator()<activation>() for the activation known only at run time.
template <class F>
FASTATTN_INLINE void with_activation(int32_t activation, F &&f) {
    switch (activation) {
        case FASTATTN_ACT_RELU: return f.template operator()<FASTATTN_ACT_RELU>();
        case FASTATTN_ACT_GELU: return f.template operator()<FASTATTN_ACT_GELU>();
        case FASTATTN_ACT_GELU_TANH: return f.template operator()<FASTATTN_ACT_GELU_TANH>();
        case FASTATTN_ACT_SILU: return f.template operator()<FASTATTN_ACT_SILU>();
        case FASTATTN_ACT_QUICK_GELU: return f.template operator()<FASTATTN_ACT_QUICK_GELU>();
        case FASTATTN_ACT_RELU2: return f.template operator()<FASTATTN_ACT_RELU2>();
        default: return f.template operator()<FASTATTN_ACT_NONE>();
    }
}

FASTATTN_NAMESPACE_END
