// Operands of the bfloat16 units: 32-bit words that hold two bfloat16 of consecutive k, low half first.
//
// A bfloat16 tensor is one part. A float16 tensor, of 11 bits of significand, is two, x = x0 + x1 exactly, of which three products give x y to 2^-17.
// A float32 tensor is three, x = x0 + x1 + x2 exactly: x0 is x rounded to bfloat16, x1 what is left of it
// rounded, x2 the rest (24 bits of significand are 3 times 8). The six products x_i y_j with i + j <= 2 then give x y to 2^-23, about what one
// float32 product gives, from a unit that is an order of magnitude faster (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations", ARITH 2019). Infinity and NaN do not split: the packing functions report
// them and the caller takes the plain float32 path.
#pragma once
#include "micro.h"
#include "pack.h"

FASTATTN_NAMESPACE_BEGIN

#if defined(__AVX512BF16__)

template <int parts>
struct Words {
    vfloat part[parts];
};

// Where packed words go, in blocks of 16 x 16: word (i, j) of part p. Rows of one matrix are {ld, 16 ld, 16}; AMX wants every block on its own,
// so that it is read as one stream.
struct WordsTarget {
    float *data;
    int64_t stride, block_down, block_across, part_stride;

    float *block(int part, int64_t i, int64_t j) const { return data + part * part_stride + i / 16 * block_down + j / 16 * block_across; }
    float *row(int part, int64_t i, int64_t j) const { return block(part, i, j) + i % 16 * stride; }
};

// Two vectors as bfloat16 in natural order, and back.
FASTATTN_INLINE vfloat narrow_two(vfloat first, vfloat second) { return (vfloat)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
FASTATTN_INLINE void widen_two(vfloat words, vfloat &first, vfloat &second) {
    vhalf halves[2];
    __builtin_memcpy(halves, &words, sizeof halves);
    first = from_bfloat16(halves[0]);
    second = from_bfloat16(halves[1]);
}

// The first `count` of 2 kLanes halves; the others read 0.
FASTATTN_INLINE vfloat load_words(const void *p, int count) {
    if (count < 2 * kLanes) return (vfloat)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), p);
    vfloat words;
    __builtin_memcpy(&words, p, sizeof words);
    return words;
}

// Words of two rows of halves, the first in the low ones: columns 0 to 3, 8 to 11, 16 to 19 and 24 to 27, and the others.
FASTATTN_INLINE void interleave(vfloat first, vfloat second, vfloat &low, vfloat &high) {
    low = (vfloat)_mm512_unpacklo_epi16((__m512i)first, (__m512i)second);
    high = (vfloat)_mm512_unpackhi_epi16((__m512i)first, (__m512i)second);
}
// What was summed in that order of columns.
static inline void put_in_order(float *sums, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
        const vfloat low = load(sums + c), high = load(sums + c + kLanes);
        const vfloat even = halves<false, 4>(low, high), odd = halves<true, 4>(low, high);
        store(sums + c, halves<false, 8>(even, odd));
        store(sums + c + kLanes, halves<true, 8>(even, odd));
    }
}

// Floats to words of two neighbours each, in the place of the floats; zeros up to `room` floats' words.
static inline void narrow_in_place(float *floats, int64_t count, int64_t room) {
    for (int64_t c = 0; c < room; c += 2 * kLanes) {
        const vfloat first = c < count ? load(floats + c) : zero(), second = c + kLanes < count ? load(floats + c + kLanes) : zero();
        store(floats + c / 2, narrow_two(first, second));
    }
}

// Words of two rows of floats, rounded: the first in the low halves.
FASTATTN_INLINE vfloat row_pair(vfloat first, vfloat second) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    Halves order;
    for (int i = 0; i < 2 * kLanes; i++) order[i] = (uint16_t)(i / 2 + i % 2 * kLanes);
    return (vfloat)_mm512_maskz_permutexvar_epi16((__mmask32)-1, (__m512i)order, (__m512i)narrow_two(first, second));
}

// Words of rows (r, r + 1) for up to kLanes columns; 0 past the end. `poison` turns NaN where a value or its first part is not finite. `whole`, here
// and below: nothing lies past the end, and all loads are of whole vectors.
template <int parts, bool whole = false>
FASTATTN_INLINE Words<parts> words_of_row_pair(Rows source, int64_t rows, int64_t columns, int64_t r, int64_t c, vfloat &poison) {
    Words<parts> result;
    const int width = whole ? kLanes : lanes_left(c, columns);
    if constexpr (parts == 1) {
        if (source.dtype == FASTATTN_FLOAT32) {
            const auto row = [&](int64_t i) { return whole || i < rows ? load_any(source.at(i, c), FASTATTN_FLOAT32, width) : zero(); };
            return {{row_pair(row(r), row(r + 1))}};
        }
        const auto row = [&](int64_t i) {
            vhalf h = {};
            if (whole) __builtin_memcpy(&h, source.at(i, c), sizeof h);
            else if (i < rows) __builtin_memcpy(&h, source.at(i, c), (size_t)width * 2);
            return widen(h);
        };
        result.part[0] = (vfloat)(row(r) | row(r + 1) << 16);
    } else {
        const int32_t dtype = parts == 3 ? FASTATTN_FLOAT32 : source.dtype;
        vfloat first = r < rows ? load_any(source.at(r, c), dtype, width) : zero();
        vfloat second = r + 1 < rows ? load_any(source.at(r + 1, c), dtype, width) : zero();
        for (int p = 0; p < parts; p++) {
            const vfloat words = result.part[p] = row_pair(first, second);
            first -= (vfloat)((vuint)words << 16);
            second -= (vfloat)((vuint)words & 0xffff0000u);
            if (p == 0) poison += (first + second) * 0.0f;
        }
    }
    return result;
}

// The words of 2 kLanes consecutive float32 of a row; of one part they are rounded.
template <int parts>
FASTATTN_INLINE Words<parts> words_of(vfloat first, vfloat second, vfloat &poison) {
    Words<parts> result;
    result.part[0] = narrow_two(first, second);
    for (int p = 1; p < parts; p++) {
        vfloat first_part, second_part;
        widen_two(result.part[p - 1], first_part, second_part);
        first -= first_part;
        second -= second_part;
        if (p == 1) poison += (first + second) * 0.0f;
        result.part[p] = narrow_two(first, second);
    }
    return result;
}

// kLanes words of one row, from element c on; 0 past the end. The source is bfloat16 or float32 for one part, float16 or float32 for two, float32 for
// three.
template <int parts, bool whole = false>
FASTATTN_INLINE Words<parts> words_of_row(Rows source, int64_t columns, int64_t r, int64_t c, vfloat &poison) {
    const int64_t count = whole ? 2 * kLanes : larger(0, smaller(2 * kLanes, columns - c));
    if (parts == 1 && source.dtype == FASTATTN_BFLOAT16) {
        vuint words = {};
        if (whole) __builtin_memcpy(&words, source.at(r, c), sizeof words);
        else __builtin_memcpy(&words, source.at(r, c), (size_t)count * 2);
        return {{(vfloat)words}};
    }
    const int32_t dtype = parts == 2 ? source.dtype : FASTATTN_FLOAT32;
    const vfloat first = load_any(source.at(r, c), dtype, (int)smaller(kLanes, count));
    const vfloat second = load_any(source.at(r, c + kLanes), dtype, (int)larger(0, count - kLanes));
    return words_of<parts>(first, second, poison);
}

// A whole block's columns as rows of a target; unrolled, so that registers hold the block all along.
FASTATTN_INLINE void store_transposed(vfloat (&block)[kLanes], float *start, int64_t stride) {
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) store(start + i * stride, block[i]);
}

// The four ways a matrix becomes words. `depth` words along k, zeros past the matrix. True when an element is not finite.

// target(word of c, r), whole vectors of r.
template <int parts>
static bool pack_words_transposed(Rows source, int64_t rows, int64_t columns, WordsTarget target, int64_t depth) {
    vfloat poison = zero();
    for (int64_t first = 0; first < rows; first += kLanes)
        for (int64_t word = 0; word < depth; word += kLanes) {
            vfloat block[parts][kLanes];
            if constexpr (parts == 1)  // a block that registers hold
                if (first + kLanes <= rows && 2 * (word + kLanes) <= columns) {
#pragma GCC unroll 16
                    for (int r = 0; r < kLanes; r++) {
                        __builtin_prefetch(source.at(first + kLanes + r, 2 * word));
                        block[0][r] = words_of_row<1, true>(source, columns, first + r, 2 * word, poison).part[0];
                    }
                    store_transposed(block[0], target.block(0, word, first), target.stride);
                    continue;
                }
            for (int64_t r = 0; r < kLanes; r++) {
                Words<parts> words = {};
                if (first + r < rows) {
                    __builtin_prefetch(source.at(first + kLanes + r, 2 * word));
                    words = words_of_row<parts>(source, columns, first + r, 2 * word, poison);
                }
                for (int p = 0; p < parts; p++) block[p][r] = words.part[p];
            }
            for (int p = 0; p < parts; p++) {
                transpose(block[p]);
                float *start = target.block(p, word, first);
                for (int64_t i = 0; i < smaller(kLanes, depth - word); i++) store(start + i * target.stride, block[p][i]);
            }
        }
    return any((vint)(poison != poison));
}

// target(word of r, c) for one word of r, whole vectors of c.
template <int parts>
FASTATTN_INLINE vfloat pack_row_pair(Rows source, int64_t rows, int64_t columns, int64_t word, WordsTarget target) {
    vfloat poison = zero();
    for (int64_t c = 0; c < columns; c += kLanes) {
        const bool whole = 2 * word + 2 <= rows && c + kLanes <= columns;
        const Words<parts> words = whole ? words_of_row_pair<parts, true>(source, rows, columns, 2 * word, c, poison)
                                         : words_of_row_pair<parts>(source, rows, columns, 2 * word, c, poison);
        for (int p = 0; p < parts; p++) store(target.row(p, word, c), words.part[p]);
    }
    return poison;
}

template <int parts>
static bool pack_words_of_row_pairs(Rows source, int64_t rows, int64_t columns, WordsTarget target, int64_t depth) {
    vfloat poison = zero();
    for (int64_t word = 0; word < depth; word++) poison += pack_row_pair<parts>(source, rows, columns, word, target);
    return any((vint)(poison != poison));
}

// target(r, word of c).
template <int parts>
static bool pack_words_in_rows(Rows source, int64_t rows, int64_t columns, WordsTarget target, int64_t depth) {
    vfloat poison = zero();
    // A block of the target at a time, so that its lines are written one after the other.
    for (int64_t first = 0; first < rows; first += 16)
        for (int64_t word = 0; word < depth; word += kLanes)
            for (int64_t r = first; r < smaller(first + 16, rows); r++) {
                const Words<parts> words = 2 * (word + kLanes) <= columns ? words_of_row<parts, true>(source, columns, r, 2 * word, poison)
                                                                          : words_of_row<parts>(source, columns, r, 2 * word, poison);
                for (int p = 0; p < parts; p++) store(target.row(p, r, word), words.part[p]);
            }
    return any((vint)(poison != poison));
}

// target(c, word of r).
template <int parts>
static bool pack_words_of_columns(Rows source, int64_t rows, int64_t columns, WordsTarget target, int64_t depth) {
    vfloat poison = zero();
    for (int64_t c = 0; c < columns; c += kLanes)
        for (int64_t word = 0; word < depth; word += kLanes) {
            vfloat block[parts][kLanes];
            if constexpr (parts == 1)
                if (c + kLanes <= columns && 2 * (word + kLanes) <= rows) {
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; i++)
                        block[0][i] = words_of_row_pair<1, true>(source, rows, columns, 2 * (word + i), c, poison).part[0];
                    store_transposed(block[0], target.block(0, c, word), target.stride);
                    continue;
                }
            for (int64_t i = 0; i < kLanes; i++) {
                const Words<parts> words = words_of_row_pair<parts>(source, rows, columns, 2 * (word + i), c, poison);
                for (int p = 0; p < parts; p++) block[p][i] = words.part[p];
            }
            for (int p = 0; p < parts; p++) {
                transpose(block[p]);
                float *start = target.block(p, c, word);
                for (int64_t i = 0; i < lanes_left(c, columns); i++) store(start + i * target.stride, block[p][i]);
            }
        }
    return any((vint)(poison != poison));
}

#else

// Never called.
static inline void put_in_order(float *, int64_t) {}
static inline void narrow_in_place(float *, int64_t, int64_t) {}

#endif

FASTATTN_NAMESPACE_END
