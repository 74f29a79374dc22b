// Rows of LayerNorm and RMSNorm that lie in float32 scratch.
#pragma once
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

// Mean of the row, or of (row - shift)^2. Four sums at a time: shorter chains, and less rounding.
template <bool squared>
static inline float mean_of(const float *row, int64_t width, float shift) {
    vfloat total[4] = {};
    const auto term = [&](vfloat v) { return squared ? (v - shift) * (v - shift) : v; };
    int64_t c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) total[i] += term(load(row + c + i * kLanes));
    for (; c + kLanes <= width; c += kLanes) total[0] += term(load(row + c));
    float result = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; c < width; c++) result += squared ? (row[c] - shift) * (row[c] - shift) : row[c];
    return result / (float)width;
}
static inline float mean_of(const float *row, int64_t width) { return mean_of<false>(row, width, 0.0f); }

static inline float rstd_of(const float *row, int64_t width, float mean, float eps) { return 1.0f / __builtin_sqrtf(mean_of<true>(row, width, mean) + eps); }

// What follows the normalisation: y = h (added + weight) + bias; weight and bias may be null.
struct Affine {
    const void *weight, *bias;
    int32_t weight_dtype, bias_dtype;
    float added;  // to the weight

    // Of a vector at column c, for loops that know the dtype.
    template <int dtype>
    vfloat scale(int64_t c, int lanes) const {
        return weight ? load_any(offset(weight, dtype, c), dtype, lanes) + added : broadcast(1.0f);
    }
    template <int dtype>
    vfloat shift(int64_t c, int lanes) const {
        return bias ? load_any(offset(bias, dtype, c), dtype, lanes) : zero();
    }
};

// Reads nothing past the row, which may be one of the caller's tensor.
static inline void write_normal(const float *row, int64_t width, float mean, float rstd, const Affine &affine, void *y, int32_t y_dtype) {
    const auto write = [&]<int dtype, int weight, int bias>() {
        over_columns(width, [&](int64_t c, int lanes) {
            const vfloat h = (load_any(row + c, FASTATTN_FLOAT32, lanes) - mean) * rstd;
            store_any(offset(y, dtype, c), dtype, h * affine.scale<weight>(c, lanes) + affine.shift<bias>(c, lanes), lanes);
        });
    };
    with_dtype(y_dtype, [&]<int dtype>() {
        with_dtype(affine.weight_dtype, [&]<int weight>() {
            with_dtype(affine.bias_dtype, [&]<int bias>() { write.template operator()<dtype, weight, bias>(); });
        });
    });
}

FASTATTN_NAMESPACE_END
