// The AVX-512, AVX512-BF16 and AMX instructions of the CPU kernels for a processor with AVX2, in plain C++: for tests only.
//
// Included ahead of a kernel source (-include), which is compiled with -mavx2 -mfma -mf16c. It declares the instruction set that
// FASTATTN_EMULATE names (1: AVX-512; 2: AVX512-BF16 as well; 3: AMX as well) and puts a function of its own in the place of every intrinsic
// that csrc/cpu calls; one that is missing here does not compile. Vectors of 64 bytes are GCC's own and need no instructions of that width.
//
// Each function follows the operation in Intel's Architectures Software Developer's Manual, volume 2, subnormal numbers and NaN
// included. Memory behind lanes that a mask leaves out is not touched. What the compiler makes of the real intrinsics is not covered.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulation {
namespace {

#define EMULATED static inline __attribute__((always_inline))

template <class Lane, class Pointer>
EMULATED Lane read(Pointer p, int64_t index) {
    Lane lane;
    memcpy(&lane, (const char *)p + index * (int64_t)sizeof lane, sizeof lane);
    return lane;
}

// ---- AVX-512 F, BW, DQ, VL ---------------------------------------------------------------------------------------------------------------

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int32_t Words __attribute__((vector_size(64)));

struct Two {
    __m256 low, high;
};
EMULATED Two two(__m512 v) {
    Two parts;
    memcpy(&parts, &v, sizeof parts);
    return parts;
}
EMULATED __m512 join(__m256 low, __m256 high) {
    const Two parts = {low, high};
    __m512 v;
    memcpy(&v, &parts, sizeof v);
    return v;
}

EMULATED __m512 keep(__mmask16 mask, __m512 v) {
    for (int lane = 0; lane < 16; lane++) v[lane] = mask >> lane & 1 ? v[lane] : 0.0f;
    return v;
}

EMULATED __m512 set1_ps(float value) { return join(_mm256_set1_ps(value), _mm256_set1_ps(value)); }
EMULATED __m512i set1_epi32(int32_t value) { return (__m512i)(value - Words{}); }

EMULATED __m512 maskz_max_ps(__mmask16 mask, __m512 a, __m512 b) {
    const Two x = two(a), y = two(b);
    return keep(mask, join(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)));
}

EMULATED __mmask16 movepi32_mask(__m512i v) {
    const Two parts = two((__m512)v);
    return (__mmask16)(_mm256_movemask_ps(parts.low) | _mm256_movemask_ps(parts.high) << 8);
}

EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void *p) {
    __m512 v = {};
    for (int lane = 0; lane < 16; lane++)
        if (mask >> lane & 1) v[lane] = read<float>(p, lane);
    return v;
}
EMULATED void mask_storeu_ps(void *p, __mmask16 mask, __m512 v) {
    for (int lane = 0; lane < 16; lane++) {
        const float value = v[lane];
        if (mask >> lane & 1) memcpy((char *)p + 4 * lane, &value, sizeof value);
    }
}

EMULATED __m256i maskz_loadu_16_halves(__mmask16 mask, const void *p) {
    Halves v = {};
    for (int lane = 0; lane < 16; lane++)
        if (mask >> lane & 1) v[lane] = read<uint16_t>(p, lane);
    return (__m256i)v;
}
EMULATED void mask_storeu_epi16(void *p, __mmask16 mask, __m256i v) {
    for (int lane = 0; lane < 16; lane++) {
        const uint16_t value = ((Halves)v)[lane];
        if (mask >> lane & 1) memcpy((char *)p + 2 * lane, &value, sizeof value);
    }
}

EMULATED __m512 maskz_cvtph_ps(__mmask16 mask, __m256i v) {
    return keep(mask, join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))));
}
template <int rounding>
EMULATED __m256i maskz_cvtps_ph(__mmask16 mask, __m512 v) {
    const Two parts = two(v);
    Halves result = (Halves)_mm256_set_m128i(_mm256_cvtps_ph(parts.high, rounding), _mm256_cvtps_ph(parts.low, rounding));
    for (int lane = 0; lane < 16; lane++) result[lane] = mask >> lane & 1 ? result[lane] : 0;
    return (__m256i)result;
}

EMULATED __m512i keep_words(__mmask16 mask, Words v) { return (__m512i)keep(mask, (__m512)v); }
EMULATED __m512i maskz_cvtepu16_epi32(__mmask16 mask, __m256i v) {
    Words result;
    for (int lane = 0; lane < 16; lane++) result[lane] = ((Halves)v)[lane];
    return keep_words(mask, result);
}
EMULATED __m512i maskz_cvtepi16_epi32(__mmask16 mask, __m256i v) {
    Words result;
    for (int lane = 0; lane < 16; lane++) result[lane] = (int16_t)((Halves)v)[lane];
    return keep_words(mask, result);
}
EMULATED __m256i maskz_cvtepi32_epi16(__mmask16 mask, __m512i v) {
    Halves result;
    for (int lane = 0; lane < 16; lane++) result[lane] = mask >> lane & 1 ? (uint16_t)((Words)v)[lane] : 0;
    return (__m256i)result;
}

EMULATED __m512i maskz_mul_epu32(__mmask8 mask, __m512i a, __m512i b) {
    typedef uint64_t Pairs __attribute__((vector_size(64)));
    Pairs result;
    for (int lane = 0; lane < 8; lane++) result[lane] = mask >> lane & 1 ? (uint64_t)(uint32_t)((Words)a)[2 * lane] * (uint32_t)((Words)b)[2 * lane] : 0;
    return (__m512i)result;
}

template <int predicate>
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
    const Two x = two(a), y = two(b);
    return (__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, predicate)) | _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, predicate)) << 8);
}

// a 2^floor(b), rounded once: float64 holds every such product that float32 does. Powers are clamped to what decides the result.
EMULATED __m512 maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
    for (int lane = 0; lane < 16; lane++) {
        const float power = b[lane] < -600.0f ? -600.0f : b[lane] > 600.0f ? 600.0f : b[lane];
        a[lane] = power != power ? power : (float)__builtin_ldexp(a[lane], (int)__builtin_floorf(power));
    }
    return keep(mask, a);
}

// Bits 4 to 7 of the control are the fraction bits to keep; here whole numbers alone.
template <int control>
EMULATED __m512 maskz_roundscale_ps(__mmask16 mask, __m512 v) {
    static_assert(control >> 4 == 0, "emulated for whole numbers");
    const Two parts = two(v);
    return keep(mask, join(_mm256_round_ps(parts.low, control & 15), _mm256_round_ps(parts.high, control & 15)));
}

EMULATED __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    __m512 result;
    for (int lane = 0; lane < 16; lane++) {
        const int from = ((Words)index)[lane];
        result[lane] = from & 16 ? b[from & 15] : a[from & 15];
    }
    return result;
}

EMULATED __m512i maskz_loadu_epi16(__mmask32 mask, const void *p) {
    __m512i v = {};
    for (int lane = 0; lane < 32; lane++) {
        const uint16_t half = mask >> lane & 1 ? read<uint16_t>(p, lane) : 0;
        memcpy((char *)&v + lane * 2, &half, sizeof half);
    }
    return v;
}

// In every 128 bits the four halves from `first` on, of a and of b by turns.
template <int first>
EMULATED __m512i unpack_epi16(__m512i a, __m512i b) {
    __m512i result;
    for (int lane = 0; lane < 32; lane++) {
        const uint16_t half = read<uint16_t>(lane & 1 ? &b : &a, lane / 8 * 8 + first + lane % 8 / 2);
        memcpy((char *)&result + lane * 2, &half, sizeof half);
    }
    return result;
}

EMULATED __m512i maskz_permutexvar_epi16(__mmask32 mask, __m512i index, __m512i v) {
    __m512i result = {};
    for (int lane = 0; lane < 32; lane++) {
        const uint16_t half = mask >> lane & 1 ? read<uint16_t>(&v, read<uint16_t>(&index, lane) & 31) : 0;
        memcpy((char *)&result + lane * 2, &half, sizeof half);
    }
    return result;
}

EMULATED __m512i loadu_si512(const void *p) {
    __m512i v;
    memcpy(&v, p, sizeof v);
    return v;
}
EMULATED uint64_t test_epi8_mask(__m512i a, __m512i b) {
    typedef uint8_t Bytes __attribute__((vector_size(64)));
    uint64_t mask = 0;
    for (int lane = 0; lane < 64; lane++) mask |= (uint64_t)((((Bytes)a)[lane] & ((Bytes)b)[lane]) != 0) << lane;
    return mask;
}

// ---- AVX512-BF16: subnormal inputs count as 0, subnormal results become 0, whatever MXCSR says -------------------------------------------

EMULATED uint32_t word_of(float value) { return read<uint32_t>(&value, 0); }
EMULATED float float_of(uint32_t word) { return read<float>(&word, 0); }
EMULATED float flushed(float value) { return (word_of(value) & 0x7f800000u) == 0 ? float_of(word_of(value) & 0x80000000u) : value; }

EMULATED uint16_t bfloat16_of(float value) {
    const uint32_t word = word_of(flushed(value));
    if (value != value) return (uint16_t)(word >> 16 | 0x40u);
    return (uint16_t)((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// Of the classes only that of subnormal numbers.
EMULATED __mmask16 fpclass_ps_mask(__m512 v, int classes) {
    if (classes != 0x20) abort();
    __mmask16 mask = 0;
    for (int lane = 0; lane < 16; lane++) mask |= (__mmask16)(v[lane] != 0.0f && word_of(flushed(v[lane])) != word_of(v[lane])) << lane;
    return mask;
}

EMULATED __m256bh cvtneps_pbh(__m512 v) {
    Halves result;
    for (int lane = 0; lane < 16; lane++) result[lane] = bfloat16_of(v[lane]);
    return (__m256bh)result;
}
// The second operand's lanes come first.
EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
    uint16_t result[32];
    for (int lane = 0; lane < 16; lane++) result[lane] = bfloat16_of(low[lane]), result[16 + lane] = bfloat16_of(high[lane]);
    __m512bh v;
    memcpy(&v, result, sizeof v);
    return v;
}

EMULATED float lower(uint32_t pair) { return flushed(float_of(pair << 16)); }
EMULATED float upper(uint32_t pair) { return flushed(float_of(pair & 0xffff0000u)); }
EMULATED float multiply_add(float a, float b, float c) { return flushed(__builtin_fmaf(a, b, flushed(c))); }

// The odd elements first, each product added with one rounding.
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    for (int lane = 0; lane < 16; lane++) {
        const uint32_t x = read<uint32_t>(&a, lane), y = read<uint32_t>(&b, lane);
        sum[lane] = multiply_add(lower(x), lower(y), multiply_add(upper(x), upper(y), sum[lane]));
    }
    return sum;
}

// ---- AMX: eight tiles a thread, shaped by the last configuration; within one source, as in csrc/cpu ------------------------------------

struct Tiles {
    bool configured;
    uint16_t row_bytes[8];
    uint8_t rows[8];
    uint32_t words[8][16][16];
};
thread_local Tiles tiles;

[[noreturn]] inline void stop(const char *instruction, const char *reason) {
    fprintf(stderr, "emulation: %s: %s\n", instruction, reason);
    abort();
}

inline void demand_tile(int tile, const char *instruction) {
    if (!tiles.configured) stop(instruction, "this thread has no tile configuration");
    if (tiles.rows[tile] == 0 || tiles.row_bytes[tile] == 0) stop(instruction, "the configuration leaves this tile empty");
}

inline void tile_loadconfig(const void *memory) {
    if (read<uint8_t>(memory, 0) != 1) stop("ldtilecfg", "the palette is not 1");
    for (int i = 1; i < 16; i++)
        if (read<uint8_t>(memory, i)) stop("ldtilecfg", "start row or reserved bytes are not 0");
    tiles = {};
    for (int tile = 0; tile < 16; tile++) {
        const uint16_t row_bytes = read<uint16_t>(memory, 8 + tile);
        const uint8_t rows = read<uint8_t>(memory, 48 + tile);
        if (row_bytes > 64 || row_bytes % 4 || rows > 16 || (row_bytes == 0) != (rows == 0)) stop("ldtilecfg", "no shape that a tile can have");
        if (tile >= 8 && rows) stop("ldtilecfg", "there are eight tiles");
        if (tile < 8) tiles.row_bytes[tile] = row_bytes, tiles.rows[tile] = rows;
    }
    tiles.configured = true;
}
inline void tile_release() { tiles = {}; }

inline void tile_zero(int tile) {
    demand_tile(tile, "tilezero");
    memset(tiles.words[tile], 0, sizeof tiles.words[tile]);
}
inline void tile_loadd(int tile, const void *base, int64_t stride) {
    demand_tile(tile, "tileloadd");
    memset(tiles.words[tile], 0, sizeof tiles.words[tile]);
    for (int row = 0; row < tiles.rows[tile]; row++) memcpy(tiles.words[tile][row], (const char *)base + row * stride, tiles.row_bytes[tile]);
}
inline void tile_stored(int tile, void *base, int64_t stride) {
    demand_tile(tile, "tilestored");
    for (int row = 0; row < tiles.rows[tile]; row++) memcpy((char *)base + row * stride, tiles.words[tile][row], tiles.row_bytes[tile]);
}

// Even and odd elements are summed apart; their sum is added to the tile once.
inline void tile_dpbf16ps(int target, int left, int right) {
    demand_tile(target, "tdpbf16ps"), demand_tile(left, "tdpbf16ps"), demand_tile(right, "tdpbf16ps");
    const int rows = tiles.rows[target], columns = tiles.row_bytes[target] / 4, depth = tiles.row_bytes[left] / 4;
    if (tiles.rows[left] != rows || tiles.row_bytes[right] / 4 != columns || tiles.rows[right] != depth) stop("tdpbf16ps", "the shapes do not agree");
    for (int row = 0; row < rows; row++) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < depth; k++) {
            const uint32_t x = tiles.words[left][row][k];
            for (int column = 0; column < columns; column++) {
                const uint32_t y = tiles.words[right][k][column];
                even[column] = multiply_add(lower(x), lower(y), even[column]);
                odd[column] = multiply_add(upper(x), upper(y), odd[column]);
            }
        }
        for (int column = 0; column < columns; column++)
            tiles.words[target][row][column] = word_of(flushed(flushed(float_of(tiles.words[target][row][column])) + flushed(even[column] + odd[column])));
    }
}

#undef EMULATED

}  // namespace
}  // namespace emulation

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if FASTATTN_EMULATE >= 2
#define __AVX512BF16__ 1
#endif
#if FASTATTN_EMULATE >= 3
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#endif

// Some of the headers' own are macros, some functions; a macro takes the place of both.
#undef _mm512_maskz_cvtps_ph
#undef _mm512_cmp_ps_mask
#undef _mm512_maskz_roundscale_ps
#undef _mm512_fpclass_ps_mask
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define __builtin_cpu_is(name) true  // float32 that may be rounded is, as on an AMD
#define _mm512_set1_ps emulation::set1_ps
#define _mm512_set1_epi32 emulation::set1_epi32
#define _mm512_maskz_max_ps emulation::maskz_max_ps
#define _mm512_movepi32_mask emulation::movepi32_mask
#define _mm512_maskz_loadu_ps emulation::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulation::mask_storeu_ps
#define _mm256_maskz_loadu_epi16 emulation::maskz_loadu_16_halves
#define _mm512_maskz_loadu_epi16 emulation::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulation::mask_storeu_epi16
#define _mm512_maskz_cvtepu16_epi32 emulation::maskz_cvtepu16_epi32
#define _mm512_maskz_cvtepi16_epi32 emulation::maskz_cvtepi16_epi32
#define _mm512_maskz_cvtepi32_epi16 emulation::maskz_cvtepi32_epi16
#define _mm512_maskz_mul_epu32 emulation::maskz_mul_epu32
#define _mm512_maskz_cvtph_ps emulation::maskz_cvtph_ps
#define _mm512_maskz_cvtps_ph(mask, v, rounding) emulation::maskz_cvtps_ph<rounding>(mask, v)
#define _mm512_cmp_ps_mask(a, b, predicate) emulation::cmp_ps_mask<predicate>(a, b)
#define _mm512_maskz_scalef_ps emulation::maskz_scalef_ps
#define _mm512_maskz_roundscale_ps(mask, v, control) emulation::maskz_roundscale_ps<control>(mask, v)
#define _mm512_permutex2var_ps emulation::permutex2var_ps
#define _mm512_maskz_permutexvar_epi16 emulation::maskz_permutexvar_epi16
#define _mm512_unpacklo_epi16 emulation::unpack_epi16<0>
#define _mm512_unpackhi_epi16 emulation::unpack_epi16<4>
#define _mm512_loadu_si512 emulation::loadu_si512
#define _mm512_test_epi8_mask emulation::test_epi8_mask
#define _mm512_fpclass_ps_mask emulation::fpclass_ps_mask
#define _mm512_cvtneps_pbh emulation::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulation::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulation::dpbf16_ps
#define _tile_loadconfig emulation::tile_loadconfig
#define _tile_release emulation::tile_release
#define _tile_zero emulation::tile_zero
#define _tile_loadd emulation::tile_loadd
#define _tile_stream_loadd emulation::tile_loadd
#define _tile_stored emulation::tile_stored
#define _tile_dpbf16ps emulation::tile_dpbf16ps
