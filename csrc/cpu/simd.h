// Vectors of float32 for every instruction set from one source: GCC/Clang vector extensions, intrinsics only where they have no equivalent.
//
// kLanes is 16 (AVX-512), 8 (AVX2) or 4 (baseline x86-64, NEON). All arithmetic is float32 whatever the tensors hold.
// exp2 and erfc were fitted for this file (least squares on Chebyshev nodes, reweighted to equal ripple) and are accurate to a few
// float32 rounding units; tests/backends/test_cpu_math.py measures that against float64.
#pragma once
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

FASTATTN_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// 32 vector registers, with AVX-512 and on AArch64, whose widest cores need 16 sums under way; else 16.
#if defined(__AVX512F__) || !defined(__SSE2__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vhalf __attribute__((vector_size(kLanes * 2)));
#if defined(__aarch64__)
typedef __fp16 vfloat16 __attribute__((vector_size(kLanes * 2)));
#endif

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

FASTATTN_INLINE vfloat broadcast(float value) { return value - vfloat{}; }
FASTATTN_INLINE vint broadcast_int(int32_t value) { return value - vint{}; }
FASTATTN_INLINE vfloat zero() { return vfloat{}; }

FASTATTN_INLINE vint lane_index() {
    vint index;
    for (int lane = 0; lane < kLanes; lane++) index[lane] = lane;
    return index;
}

FASTATTN_INLINE vfloat load(const float *p) {
    vfloat v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
// Keeps GCC from loading the same operand once for every product it is part of.
FASTATTN_INLINE vfloat in_register(vfloat v) {
#if defined(__x86_64__) && !defined(FASTATTN_EMULATE)
    __asm__("" : "+v"(v));
#endif
    return v;
}
FASTATTN_INLINE void store(float *p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
FASTATTN_INLINE void add_to(float *p, vfloat v) { store(p, load(p) + v); }
FASTATTN_INLINE vint load_int(const int32_t *p) {
    vint v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

FASTATTN_INLINE vint bits(vfloat v) { return (vint)v; }
FASTATTN_INLINE vfloat from_bits(vint v) { return (vfloat)v; }
FASTATTN_INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return from_bits((mask & bits(yes)) | (~mask & bits(no))); }

FASTATTN_INLINE vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select((vint)(a > b), a, b);
#endif
}
FASTATTN_INLINE vfloat abs(vfloat v) { return from_bits(bits(v) & 0x7fffffff); }

FASTATTN_INLINE float sum(vfloat v) {
    float total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += v[lane];
    return total;
}

// Whether the sign of any lane is set.
FASTATTN_INLINE bool any(vint mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    int32_t seen = 0;
    for (int lane = 0; lane < kLanes; lane++) seen |= mask[lane];
    return seen < 0;
#endif
}

// ---- Partial vectors: the first n lanes, 0 <= n <= kLanes; the other lanes read 0 and are not written. -----------------------------
// Without a call to memcpy wherever the instruction set allows it: in the loop of a kernel a call, even one that is never made, costs every
// accumulator its register.
FASTATTN_INLINE vint first_lanes(int n) { return (vint)(lane_index() < n); }

FASTATTN_INLINE vfloat load_part(const float *p, int n) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (vfloat)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
#else
    vfloat v = zero();
    for (int lane = 0; lane < kLanes; lane++)
        if (lane < n) v[lane] = p[lane];
    return v;
#endif
}
FASTATTN_INLINE void store_part(float *p, vfloat v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
#else
    for (int lane = 0; lane < kLanes; lane++)
        if (lane < n) p[lane] = v[lane];
#endif
}

FASTATTN_INLINE vhalf load_part(const uint16_t *p, int n) {
#if defined(__AVX512F__)
    return (vhalf)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    const int last = n - 1;
    vhalf h = (vhalf)_mm_maskload_epi32((const int *)p, _mm_cmpgt_epi32(_mm_set1_epi32(n / 2), _mm_setr_epi32(0, 1, 2, 3)));
    if (n & 1) h |= (vhalf)(vhalf{0, 1, 2, 3, 4, 5, 6, 7} == (uint16_t)last) & p[last];
    return h;
#else
    vhalf h = {};
    for (int lane = 0; lane < kLanes; lane++)
        if (lane < n) h[lane] = p[lane];
    return h;
#endif
}
FASTATTN_INLINE void store_part(uint16_t *p, vhalf h, int n) {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h);
#else
    for (int lane = 0; lane < kLanes; lane++)
        if (lane < n) p[lane] = h[lane];
#endif
}

// ---- bfloat16 and float16, to nearest even, subnormals kept --------------------------------------------------------------------------
// GCC makes five instructions and more of these conversions, which take one or two.
FASTATTN_INLINE vuint widen(vhalf h) {
#if defined(__AVX512F__)
    return (vuint)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, (__m256i)h);
#elif defined(__AVX2__)
    return (vuint)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, vuint);
#endif
}

// With their sign.
FASTATTN_INLINE vint widen_signed(vhalf h) {
#if defined(__AVX512F__)
    return (vint)_mm512_maskz_cvtepi16_epi32((__mmask16)-1, (__m256i)h);
#elif defined(__AVX2__)
    return (vint)_mm256_cvtepi16_epi32((__m128i)h);
#else
    typedef int16_t vshort __attribute__((vector_size(kLanes * 2)));
    return __builtin_convertvector((vshort)h, vint);
#endif
}

// The low halves of lanes below 2^16.
FASTATTN_INLINE vhalf low_halves(vuint v) {
#if defined(__AVX512F__)
    return (vhalf)_mm512_maskz_cvtepi32_epi16((__mmask16)-1, (__m512i)v);
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(v, vhalf);
#endif
}

FASTATTN_INLINE vfloat from_bfloat16(vhalf h) { return (vfloat)(widen(h) << 16); }

FASTATTN_INLINE vhalf round_to_bfloat16(vfloat v) {
    const vuint b = (vuint)v;
    const vuint rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const vuint quiet_nan = (b >> 16) | 0x40u;
    const vuint is_nan = (vuint)(v != v);
    return low_halves((is_nan & quiet_nan) | (~is_nan & rounded));
}

FASTATTN_INLINE vhalf to_bfloat16(vfloat v) {
#if defined(__AVX512BF16__)
    constexpr int kSubnormal = 0x20;  // which the instruction would make 0
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kSubnormal) == 0, 1)) return (vhalf)_mm512_cvtneps_pbh((__m512)v);
#endif
    return round_to_bfloat16(v);
}

FASTATTN_INLINE vfloat from_float16(vhalf h) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_cvtph_ps((__mmask16)-1, (__m256i)h);
#elif defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return __builtin_convertvector((vfloat16)h, vfloat);
#else
    // The exponent of float16 moved into that of float32 is off by 2^112, which one product mends (subnormals included).
    const vuint wide = widen(h);
    const vuint magnitude = (wide & 0x7fffu) << 13;
    vuint result = (vuint)((vfloat)magnitude * broadcast(0x1p112f));
    result |= (vuint)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return (vfloat)(result | ((wide & 0x8000u) << 16));
#endif
}

FASTATTN_INLINE vhalf to_float16(vfloat v) {
#if defined(__AVX512F__)
    return (vhalf)_mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (vhalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (vhalf)__builtin_convertvector(v, vfloat16);
#else
    const vuint b = (vuint)v;
    const vuint magnitude = b & 0x7fffffffu;
    const vuint normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 lets the float adder round a subnormal result at the right bit.
    const vuint subnormal = (vuint)((vfloat)magnitude + broadcast(0.5f)) - 0x3f000000u;
    const vuint is_small = (vuint)(magnitude < (113u << 23));
    const vuint is_large = (vuint)(magnitude >= 0x477ff000u);
    const vuint is_nan = (vuint)(magnitude > 0x7f800000u);
    vuint result = (is_small & subnormal) | (~is_small & normal);
    result = (is_large & 0x7c00u) | (~is_large & result);
    result = (is_nan & 0x7e00u) | (~is_nan & result);
    return low_halves(result | ((b >> 16) & 0x8000u));
#endif
}

FASTATTN_INLINE int64_t size_of(int32_t dtype) { return dtype == FASTATTN_FLOAT32 ? 4 : 2; }

FASTATTN_INLINE const void *offset(const void *base, int32_t dtype, int64_t elements) {
    return (const char *)base + elements * size_of(dtype);
}
FASTATTN_INLINE void *offset(void *base, int32_t dtype, int64_t elements) { return (char *)base + elements * size_of(dtype); }

// Loads and stores of n <= kLanes elements at p in any of the three dtypes.
FASTATTN_INLINE vfloat load_any(const void *p, int32_t dtype, int n) {
    if (dtype == FASTATTN_FLOAT32) return n == kLanes ? load((const float *)p) : load_part((const float *)p, n);
    vhalf h;
    if (n == kLanes) __builtin_memcpy(&h, p, sizeof h);
    else h = load_part((const uint16_t *)p, n);
    return dtype == FASTATTN_BFLOAT16 ? from_bfloat16(h) : from_float16(h);
}
FASTATTN_INLINE void store_any(void *p, int32_t dtype, vfloat v, int n) {
    if (dtype == FASTATTN_FLOAT32) {
        if (n == kLanes) store((float *)p, v);
        else store_part((float *)p, v, n);
        return;
    }
    const vhalf h = dtype == FASTATTN_BFLOAT16 ? to_bfloat16(v) : to_float16(v);
    if (n == kLanes) __builtin_memcpy(p, &h, sizeof h);
    else store_part((uint16_t *)p, h, n);
}

// Calls f.template operator()<dtype>() so that loops over rows do not ask for the dtype at every vector.
template <class F>
FASTATTN_INLINE void with_dtype(int32_t dtype, F &&f) {
    if (dtype == FASTATTN_FLOAT32) f.template operator()<FASTATTN_FLOAT32>();
    else if (dtype == FASTATTN_BFLOAT16) f.template operator()<FASTATTN_BFLOAT16>();
    else f.template operator()<FASTATTN_FLOAT16>();
}

FASTATTN_INLINE float load_scalar(const void *p, int32_t dtype) {
    return dtype == FASTATTN_FLOAT32 ? *(const float *)p : load_any(p, dtype, 1)[0];
}

// f(c, kLanes) for whole vectors of [0, end) and f(c, n) for the rest, so that only the last one asks how many lanes it has.
template <class F>
FASTATTN_INLINE void over_columns(int64_t end, F &&f) {
    int64_t c = 0;
    for (; c + kLanes <= end; c += kLanes) f(c, kLanes);
    if (c < end) f(c, (int)(end - c));
}

FASTATTN_INLINE int lanes_left(int64_t from, int64_t end) { return end - from < kLanes ? (int)(end - from) : kLanes; }
FASTATTN_INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
FASTATTN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- Functions -----------------------------------------------------------------------------------------------------------------------

constexpr float kRounder = 0x1.8p23f;  // adding it rounds a float to an integer, which then sits in the low bits

// p 2^n for whole n and p near 1; 0 where n < -126.
FASTATTN_INLINE vfloat times_power(vfloat p, vfloat n) {
#if defined(__AVX512F__)
    // scalef would make subnormal numbers, whose making and later use is slow: those lanes are zeroed.
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (vfloat)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    const vuint exponent = (vuint)bits(n + kRounder) << 23;  // of what is dropped it may wrap around
    return from_bits(~(vint)(n < -126.0f) & (vint)((vuint)bits(p) + exponent));
#endif
}

// 2^(n + f) for whole n and f in [-0.5, 0.5]; 0 where n < -126.
FASTATTN_INLINE vfloat exp2_parts(vfloat n, vfloat f) {
    vfloat p = broadcast(1.54474774e-04f);
    p = p * f + 1.34003364e-03f;
    p = p * f + 9.61801077e-03f;
    p = p * f + 5.55032755e-02f;
    p = p * f + 2.40226513e-01f;
    p = p * f + 6.93147206e-01f;
    p = p * f + 1.0f;
    return times_power(p, n);
}

FASTATTN_INLINE vfloat round(vfloat x) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_roundscale_ps((__mmask16)-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (x + kRounder) - kRounder;
#endif
}

// 2^x for x < 128; 0 below -126 and for -inf; NaN stays NaN.
FASTATTN_INLINE vfloat exp2(vfloat x) {
    const vfloat n = round(x);
    return exp2_parts(n, x - n);
}

// The same to 2^-23, a term and an instruction shorter, for what is rounded to bfloat16 next.
FASTATTN_INLINE vfloat exp2_of_term(vfloat x) {
    const vfloat n = (x + kRounder) - kRounder, f = x - n;
    vfloat p = broadcast(1.3264727e-03f);
    p = p * f + 9.6715130e-03f;
    p = p * f + 5.5507336e-02f;
    p = p * f + 2.4022242e-01f;
    p = p * f + 6.9314700e-01f;
    p = p * f + 1.0f;
    return times_power(p, n);
}

// e^x for x <= 88; 0 below -87. ln 2 is taken off in two parts, the first of which has few enough bits to be exact.
FASTATTN_INLINE vfloat exp(vfloat x) {
    const vfloat n = round(x * kLog2e);
    const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return exp2_parts(n, r * kLog2e);
}

// ln x for x >= 2^-126; infinity and NaN stay what they are. x = 2^k (1 + f) with 1 + f in [2/3, 4/3): ln (1 + f) = 2 artanh(f / (2 + f)), the
// series of which is fdlibm's polynomial in s^2; k ln 2 is added in two parts.
FASTATTN_INLINE vfloat log(vfloat x) {
    const vint k = (bits(x) - 0x3f2aaaab) >> 23;
    const vfloat f = from_bits(bits(x) - (k << 23)) - 1.0f, n = __builtin_convertvector(k, vfloat);
    const vfloat s = f / (f + 2.0f), z = s * s, half = 0.5f * f * f;
    vfloat p = broadcast(0.24279078841f);
    p = p * z + 0.28498786688f;
    p = p * z + 0.40000972152f;
    p = p * z + 0.66666662693f;
    const vfloat small = s * (half + z * p) + n * 9.0580006145e-06f;
    return select((vint)(x < __builtin_inff()), n * 6.9313812256e-01f - (half - small - f), x);
}

// erfc(z) for z >= 0: exp(-z^2) t P(t) with t = 1 / (1 + 0.4 z); 0 from z = 9.1 on, before the product gets subnormal and slow.
FASTATTN_INLINE vfloat erfc_positive(vfloat z) {
    const vfloat t = 1.0f / (1.0f + 0.4f * z);
    vfloat p = broadcast(-0.03059663437306881f);
    p = p * t + 0.20348195731639862f;
    p = p * t - 0.5117383599281311f;
    p = p * t + 0.564775824546814f;
    p = p * t - 0.2988843619823456f;
    p = p * t + 0.2799170911312103f;
    p = p * t + 0.12694266438484192f;
    p = p * t + 0.21551117300987244f;
    p = p * t + 0.22488000988960266f;
    p = p * t + 0.2257106602191925f;
    return select((vint)(z < 9.1f), exp2(z * z * -kLog2e) * (t * p), zero());
}

// The logistic function and what it lacks to 1, each to full relative accuracy: e^-|x| neither overflows nor cancels.
struct Sigmoid {
    vfloat value, complement;
};
FASTATTN_INLINE Sigmoid sigmoid(vfloat x) {
    const vfloat e = exp(-abs(x));
    const vfloat larger_part = 1.0f / (1.0f + e), smaller_part = e * larger_part;
    const vint negative = (vint)(x < 0.0f);
    return {select(negative, smaller_part, larger_part), select(negative, larger_part, smaller_part)};
}

FASTATTN_INLINE vfloat tanh(vfloat x) {
    const vfloat a = abs(x);
    const vfloat s = x * x;
    vfloat p = broadcast(-5.67240936e-03f);
    p = p * s + 2.06031351e-02f;
    p = p * s - 5.37252275e-02f;
    p = p * s + 1.33311857e-01f;
    p = p * s - 3.33332634e-01f;
    const vfloat near_zero = a + a * (s * p);
    const vfloat far = 1.0f - 2.0f / (exp(2.0f * select((vint)(a > 20.0f), broadcast(20.0f), a)) + 1.0f);  // 1 from 10 on; NaN stays
    const vfloat magnitude = select((vint)(a < 0.625f), near_zero, far);
    return from_bits(bits(magnitude) | (bits(x) & (int32_t)0x80000000));
}

// ---- Whole blocks of kLanes x kLanes: log2(kLanes) rounds over pairs of rows ------------------------------------------------------------

// Lanes (l without bit `distance`) of a and of b side by side, or with `upper` the lanes with that bit. In intrinsics where the compiler would
// shuffle by an index vector, which takes three instructions or more.
template <bool upper, int distance>
FASTATTN_INLINE vfloat halves(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    vint index;
    for (int lane = 0; lane < kLanes; lane++) index[lane] = (upper ? lane | distance : lane & ~distance) + (lane & distance ? kLanes : 0);
    return (vfloat)_mm512_permutex2var_ps((__m512)a, (__m512i)index, (__m512)b);
#elif defined(__AVX2__)
    const __m256 x = (__m256)a, y = (__m256)b;
    if constexpr (distance == 1) return (vfloat)(upper ? _mm256_blend_ps(_mm256_movehdup_ps(x), y, 0xaa) : _mm256_blend_ps(x, _mm256_moveldup_ps(y), 0xaa));
    else if constexpr (distance == 2) return (vfloat)(upper ? _mm256_shuffle_ps(x, y, 0xee) : _mm256_shuffle_ps(x, y, 0x44));
    else return (vfloat)(upper ? _mm256_permute2f128_ps(x, y, 0x31) : _mm256_permute2f128_ps(x, y, 0x20));
#elif defined(__SSE2__)
    const __m128 x = (__m128)a, y = (__m128)b;
    if constexpr (distance == 2) return (vfloat)(upper ? _mm_movehl_ps(y, x) : _mm_movelh_ps(x, y));
    const __m128 mixed = upper ? _mm_shuffle_ps(x, y, 0xdd) : _mm_shuffle_ps(x, y, 0x88);
    return (vfloat)_mm_shuffle_ps(mixed, mixed, 0xd8);
#else
    vfloat result;
    for (int lane = 0; lane < kLanes; lane++) {
        const int from = upper ? lane | distance : lane & ~distance;
        result[lane] = (lane & distance) ? b[from] : a[from];
    }
    return result;
#endif
}

// row[i][j] <-> row[j][i]
template <int distance = 1>
FASTATTN_INLINE void transpose(vfloat (&row)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
        if (i & distance) continue;
        const vfloat a = row[i], b = row[i + distance];
        row[i] = halves<false, distance>(a, b);
        row[i + distance] = halves<true, distance>(a, b);
    }
    if constexpr (2 * distance < kLanes) transpose<2 * distance>(row);
}

// Lane i of the result is the sum of row[i].
template <int distance = 1>
FASTATTN_INLINE vfloat sums(vfloat (&row)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * distance)
        row[i] = halves<false, distance>(row[i], row[i + distance]) + halves<true, distance>(row[i], row[i + distance]);
    if constexpr (2 * distance < kLanes) return sums<2 * distance>(row);
    else return row[0];
}

FASTATTN_NAMESPACE_END
