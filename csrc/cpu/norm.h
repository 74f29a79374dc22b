// Rows of LayerNorm and RMSNorm that lie in float32 scratch.
#pragma once
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

// Mean of (row - shift), or of its square. Four sums at a time: shorter chains, and less rounding.
static inline float mean_of(const float *row, int64_t width, float shift, bool squared) {
    vfloat total[4] = {};
    int64_t c = 0;
    const auto term = [&](vfloat v) { return squared ? (v - shift) * (v - shift) : v; };
    for (; c + 4 * kLanes <= width; c += 4 * kLanes)
        for (int i = 0; i < 4; i++) total[i] += term(load(row + c + i * kLanes));
    for (; c + kLanes <= width; c += kLanes) total[0] += term(load(row + c));
    float result = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; c < width; c++) result += squared ? (row[c] - shift) * (row[c] - shift) : row[c];
    return result / (float)width;
}

static inline float rstd_of(const float *row, int64_t width, float mean, float eps) { return 1.0f / __builtin_sqrtf(mean_of(row, width, mean, true) + eps); }

// What follows the normalisation: y = h (added + weight) + bias; weight and bias may be null.
struct Affine {
    const void *weight, *bias;
    int32_t weight_dtype, bias_dtype;
    float added;  // to the weight

    vfloat scale(int64_t c, int lanes) const {
        return weight ? load_any(offset(weight, weight_dtype, c), weight_dtype, lanes) + added : broadcast(1.0f);
    }
    vfloat shift(int64_t c, int lanes) const { return bias ? load_any(offset(bias, bias_dtype, c), bias_dtype, lanes) : zero(); }
};

static inline void write_normal(const float *row, int64_t width, float mean, float rstd, const Affine &affine, void *y, int32_t dtype) {
    for (int64_t c = 0; c < width; c += kLanes) {
        const int lanes = lanes_left(c, width);
        store_any(offset(y, dtype, c), dtype, (load(row + c) - mean) * rstd * affine.scale(c, lanes) + affine.shift(c, lanes), lanes);
    }
}

FASTATTN_NAMESPACE_END
