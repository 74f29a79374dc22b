// Which queries of a tile see which keys of a block: one 64-bit word per query (lane), bit r of which says that it sees key begin + r.
//
// Every form of a lowered mask gives such words with a few integer operations and AND joins the forms. A word of zeros in every lane is an empty
// tile, ones in every lane a full one, and the OR of the lanes names the keys that nobody sees.
#pragma once
#include "sequences.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int64_t kKeyBlock = 64;
// Bits 0 to n - 1; all of them from n = 64 on, none below 1.
FASTATTN_INLINE uint64_t bits_below(int64_t n) {
    const int64_t clamped = larger(0, smaller(n, 64));
    return clamped == 64 ? ~(uint64_t)0 : ((uint64_t)1 << (clamped & 63)) - 1;
}
FASTATTN_INLINE uint64_t bits_between(int64_t low, int64_t high) { return bits_below(high) & ~bits_below(low); }

FASTATTN_INLINE uint64_t bits_of(vint mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return (uint64_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
    return (uint64_t)_mm_movemask_ps((__m128)mask);
#else
    uint64_t result = 0;
    for (int lane = 0; lane < kLanes; lane++) result |= (uint64_t)(mask[lane] & 1) << lane;
    return result;
#endif
}

// Bit r: byte r is not 0; 64 bytes.
FASTATTN_INLINE uint64_t bits_of_bytes(const uint8_t *bytes) {
#if defined(__AVX512BW__)
    const __m512i all = _mm512_loadu_si512(bytes);
    return _mm512_test_epi8_mask(all, all);
#elif defined(__SSE2__)
    uint64_t zeros = 0;
    for (int part = 0; part < 4; part++) {
        const __m128i some = _mm_loadu_si128((const __m128i *)bytes + part);
        zeros |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(some, _mm_setzero_si128())) << (16 * part);
    }
    return ~zeros;
#else
    uint64_t result = 0;
    for (int r = 0; r < 64; r++) result |= (uint64_t)(bytes[r] != 0) << r;
    return result;
#endif
}

// Bit r: element r of `count` <= 64 bools, `stride` apart, is true. No byte past the last is read.
static inline uint64_t word_of_bools(const uint8_t *source, int64_t stride, int64_t count) {
    if (stride == 0) return source[0] ? bits_below(count) : 0;
    if (stride == 1 && count == 64) return bits_of_bytes(source);
    alignas(64) uint8_t bytes[64] = {};
    if (stride == 1) memcpy(bytes, source, (size_t)count);
    else
        for (int64_t r = 0; r < count; r++) bytes[r] = source[r * stride];
    return bits_of_bytes(bytes);
}

// Bit r: element r of `count` <= 64 numbers is not -inf.
static inline uint64_t word_of_finite(const void *source, int32_t dtype, int64_t stride, int64_t count) {
    uint64_t word = 0;
    if (stride == 1) {
        for (int64_t r = 0; r < count; r += kLanes) {
            const vint seen = (vint)(load_any(offset(source, dtype, r), dtype, lanes_left(r, count)) != -kInf);
            word |= bits_of(seen) << r;
        }
        return word & bits_below(count);
    }
    if (stride == 0) return load_scalar(source, dtype) != -kInf ? bits_below(count) : 0;
    for (int64_t r = 0; r < count; r++) word |= (uint64_t)(load_scalar(offset(source, dtype, r * stride), dtype) != -kInf) << r;
    return word;
}

// The words of one block.
class LaneWords {
  public:
    explicit LaneWords(int64_t lanes) : lanes_(lanes) {}

    // Every lane sees `common`.
    void set(uint64_t common) {
        common_ = common;
        differ_ = false;
    }

    // AND with word(lane).
    template <class F>
    void keep(F &&word) {
        if (!differ_)
            for (int64_t lane = 0; lane < lanes_; lane++) word_[lane] = common_;
        differ_ = true;
        for (int64_t lane = 0; lane < lanes_; lane++) word_[lane] &= word(lane);
    }

    // Keys that some lane sees, and keys that every lane sees.
    void reduce(uint64_t &some, uint64_t &every) const {
        some = every = common_;
        if (!differ_) return;
        some = 0;
        for (int64_t lane = 0; lane < lanes_; lane++) some |= word_[lane], every &= word_[lane];
    }

    // Leaves off the first keys of the block.
    void skip(int64_t keys) {
        common_ >>= keys;
        for (int64_t lane = 0; differ_ && lane < lanes_; lane++) word_[lane] >>= keys;
    }

    // scores(key, lane) = -inf where hidden, for `count` keys.
    void hide(float *scores, int64_t count) const {
        for (int64_t v = 0; v < lanes_; v += kLanes)
            for (int64_t half = 0; half * 32 < count; half++) {
                int32_t words[kLanes];
                for (int lane = 0; lane < kLanes; lane++) words[lane] = (int32_t)((differ_ ? word_[v + lane] : common_) >> (32 * half));
                const vint seen = load_int(words);
                float *target = scores + half * 32 * lanes_ + v;
                const int rows = (int)smaller(32, count - half * 32);
                for (int row = 0; row < rows; row++, target += lanes_)
                    store(target, select((seen << (31 - row)) >> 31, load(target), broadcast(-kInf)));
            }
    }

  private:
    int64_t lanes_;
    uint64_t common_ = 0;
    bool differ_ = false;
    alignas(64) uint64_t word_[kMaxLanes];
};

FASTATTN_NAMESPACE_END
