// kLanes Philox calls at once; what they mean is in common/philox.h.
//
// Ladder, ms: LayerNorm of 2,048 x 768 float32 with residual and dropout; attention of (1, 8, 512, 64), forward and backward, with dropout (without
// 16.5), one core of an Intel Xeon (Emerald Rapids, VM, in use by others too), least of 30, 2026-11-29:
//   6.4, 22.3  products of all lanes widened to 64 bits
//   3.3, 19.6  even and odd lanes apart, one instruction each
#pragma once
#include "../common/philox.h"
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

struct PhiloxWords {
    vuint word[4];
};

typedef uint64_t vpairs __attribute__((vector_size(kLanes * 4)));  // lanes 2 i and 2 i + 1

// Lanes 0, 2, 4 ... times b. GCC makes many instructions of the plain form.
FASTATTN_INLINE vpairs multiply_even(vuint a, uint32_t b) {
#if defined(__AVX512F__)
    return (vpairs)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)a, _mm512_set1_epi32((int)b));
#elif defined(__AVX2__)
    return (vpairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)b));
#else
    return ((vpairs)a & 0xffffffffu) * (uint64_t)b;
#endif
}

FASTATTN_INLINE void multiply_wide(vuint a, uint32_t b, vuint &high, vuint &low) {
    constexpr uint64_t kLow = 0xffffffffu;
    const vpairs even = multiply_even(a, b), odd = multiply_even((vuint)((vpairs)a >> 32), b);
    high = (vuint)((even >> 32) | (odd & ~kLow));
    low = (vuint)((even & kLow) | (odd << 32));
}

FASTATTN_INLINE PhiloxWords philox(vuint row, vuint column_group, uint32_t head, uint64_t seed) {
    vuint c0 = row, c1 = column_group, c2 = head - vuint{}, c3 = {};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < FASTATTN_PHILOX_ROUNDS; round++) {
        vuint high0, low0, high1, low1;
        multiply_wide(c0, FASTATTN_PHILOX_MULTIPLIER_0, high0, low0);
        multiply_wide(c2, FASTATTN_PHILOX_MULTIPLIER_1, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c2 = high0 ^ c3 ^ k1;
        c1 = low1;
        c3 = low0;
        k0 += FASTATTN_PHILOX_WEYL_0;
        k1 += FASTATTN_PHILOX_WEYL_1;
    }
    return {{c0, c1, c2, c3}};
}

// keep_scale where column 8 w + 2 c + half of the group is kept, else 0; lanes are calls.
FASTATTN_INLINE vfloat keep_factor(const PhiloxWords &words, int w, int half, const fastattn_dropout &dropout) {
    const vuint lane = half ? words.word[w] >> 16 : words.word[w] & 0xffffu;
    return select((vint)(lane >= dropout.threshold), broadcast(dropout.keep_scale), zero());
}

// ---- Rows of a matrix, as norms and hidden layers drop them: keep masks of 16 bits, all ones where the element is kept ----------------

// Every four lanes hold the calls of 32 columns: as 16-bit lanes in memory, word w of the four is columns 8 w to 8 w + 7. Writes 8 kLanes masks.
FASTATTN_INLINE void kept_columns(const PhiloxWords &words, const fastattn_dropout &dropout, int16_t *keep) {
    typedef uint16_t vlanes __attribute__((vector_size(kLanes * 4)));
    for (int w = 0; w < 4; w++) {
        const vlanes kept = (vlanes)((vlanes)words.word[w] >= (uint16_t)dropout.threshold);
        for (int quad = 0; quad < kLanes / 4; quad++) __builtin_memcpy(keep + 32 * quad + 8 * w, (const char *)&kept + 16 * quad, 16);
    }
}

// Masks of one row: keep[j] for j < columns, `keep` padded to a multiple of kKeepPadding.
constexpr int64_t kKeepPadding = 8 * kLanes;
static inline void keep_row(const fastattn_dropout &dropout, int64_t row, int64_t columns, int16_t *keep) {
    for (int64_t group = 0; group * 8 < columns; group += kLanes)
        kept_columns(philox((uint32_t)row - vuint{}, (vuint)lane_index() + (uint32_t)group, 0, dropout.seed), dropout, keep + group * 8);
}

// Masks of kKeepStrip columns from `column`, a multiple of 32, for several rows: keep[(r - row) * kKeepStrip + j - column]; two rows more fit.
constexpr int64_t kKeepStrip = 64;
static inline void keep_strip(const fastattn_dropout &dropout, int64_t row, int64_t rows, int64_t column, int16_t *keep) {
    const vuint lanes = (vuint)lane_index();
    for (int64_t call = 0; call < 8 * rows; call += kLanes) {
        const vuint index = lanes + (uint32_t)call;
        kept_columns(philox((index >> 3) + (uint32_t)row, (index & 7u) + (uint32_t)(column / 8), 0, dropout.seed), dropout, keep + call * 8);
    }
}

// kLanes elements after dropout; a dropped one is 0 whatever it was: NaN and infinity do not pass.
FASTATTN_INLINE vfloat drop(vfloat v, const fastattn_dropout &dropout, const int16_t *keep) {
    vhalf kept;
    __builtin_memcpy(&kept, keep, sizeof kept);
    return from_bits(widen_signed(kept) & bits(v * dropout.keep_scale));
}

FASTATTN_NAMESPACE_END
