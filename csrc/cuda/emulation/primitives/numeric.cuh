// The emulation of primitives/numeric.cuh: half types by rounding float32 to nearest even.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cuda_runtime.h"

struct float16 {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

inline float to_float(float x) { return x; }
inline float to_float(float16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
T from_float(float x) {
    if constexpr (__is_same(T, float)) {
        return x;
    } else if constexpr (__is_same(T, float16)) {
        return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
    } else {
        const uint32_t bits = float_bits(x);
        if (x != x) return {0x7FFF};
        return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
    }
}

template <typename T>
uint32_t pack_pair(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
void unpack_pair(uint32_t pair, float &low, float &high) {
    low = to_float(T{static_cast<uint16_t>(pair)});
    high = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

inline float reciprocal_sqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

// Subnormal arguments and results are 0, as ex2.approx.ftz has them.
inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
