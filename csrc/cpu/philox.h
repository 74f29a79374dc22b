// kLanes Philox calls at once; what they mean is in common/philox.h.
#pragma once
#include "../common/philox.h"
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

struct PhiloxWords {
    vuint word[4];
};

FASTATTN_INLINE void multiply_wide(vuint a, uint32_t b, vuint &high, vuint &low) {
    typedef uint64_t vwide __attribute__((vector_size(kLanes * 8)));
    const vwide product = __builtin_convertvector(a, vwide) * (uint64_t)b;
    high = __builtin_convertvector(product >> 32, vuint);
    low = a * b;
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

// Factors of one row: keep[j] for j < columns, `keep` padded to whole groups of 32 * kLanes / 4 columns.
static inline void keep_row(const fastattn_dropout &dropout, int64_t row, int64_t columns, float *keep) {
    for (int64_t group = 0; group * 8 < columns; group += kLanes) {  // a lane is one call, four calls are 32 columns
        const PhiloxWords words = philox((uint32_t)row - vuint{}, (vuint)lane_index() + (uint32_t)group, 0, dropout.seed);
        for (int w = 0; w < 4; w++)
            for (int half = 0; half < 2; half++) {
                const vfloat factor = keep_factor(words, w, half, dropout);
                for (int lane = 0; lane < kLanes; lane++)
                    keep[(group + lane) / 4 * 32 + 8 * w + (group + lane) % 4 * 2 + half] = factor[lane];
            }
    }
}
constexpr int64_t kKeepPadding = 8 * kLanes > 32 ? 8 * kLanes : 32;

FASTATTN_NAMESPACE_END
