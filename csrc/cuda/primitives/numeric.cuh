// Half types, their conversions and the few functions that have an instruction of their own. The emulation has the same names.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

using float16 = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (sizeof(T) == 4)
        return x;
    else if constexpr (__is_same(T, float16))
        return __float2half_rn(x);
    else
        return __float2bfloat16_rn(x);
}

// Two elements in a register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    if constexpr (__is_same(T, float16)) {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t &>(pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t &>(pair);
    }
}

template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float &low, float &high) {
    if constexpr (__is_same(T, float16)) {
        const float2 both = __half22float2(reinterpret_cast<const __half2 &>(pair));
        low = both.x;
        high = both.y;
    } else {
        low = __uint_as_float(pair << 16);
        high = __uint_as_float(pair & 0xFFFF0000u);
    }
}

__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

__device__ __forceinline__ float reciprocal_sqrt(float x) { return __frsqrt_rn(x); }  // correctly rounded

// 2^x, to 2 units in the last place; subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
