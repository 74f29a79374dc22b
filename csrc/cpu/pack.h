// Moving blocks between tensors (any dtype, any row stride) and the float32 scratch the micro-kernel reads.
#pragma once
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

// A block of rows of a tensor: element (r, c) at data[r * stride + c].
struct Rows {
    const void *data;
    int32_t dtype;
    int64_t stride;

    const void *at(int64_t row, int64_t column) const { return offset(data, dtype, row * stride + column); }
};

// target(c, r) = scale * source(r, c) for r < rows <= vectors * kLanes, c < columns; lanes past `rows` read 0.
static inline void pack_transposed(Rows source, int64_t rows, int64_t columns, float scale, float *target, int64_t ld, int64_t vectors) {
    with_dtype(source.dtype, [&]<int dtype>() {
        for (int64_t first = 0; first < vectors * kLanes; first += kLanes)
            for (int64_t c = 0; c < columns; c += kLanes) {
                const int width = lanes_left(c, columns);
                vfloat block[kLanes];
                if (first + kLanes <= rows && width == kLanes) {
#pragma GCC unroll 16
                    for (int r = 0; r < kLanes; r++) {
                        // Many rows are read side by side, too many for the hardware to see: fetch the next ones meanwhile.
                        __builtin_prefetch(source.at(first + kLanes + r, c));
                        block[r] = load_any(source.at(first + r, c), dtype, kLanes) * scale;
                    }
                    transpose(block);
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; i++) store(target + (c + i) * ld + first, block[i]);
                    continue;
                }
                for (int r = 0; r < kLanes; r++)
                    block[r] = first + r < rows ? load_any(source.at(first + r, c), dtype, width) * scale : zero();
                transpose(block);
                for (int i = 0; i < width; i++) store(target + (c + i) * ld + first, block[i]);
            }
    });
}

// The way back: target(r, c) = scale(r) * source(c, r), r < rows.
static inline void unpack_transposed(const float *source, int64_t ld, int64_t rows, int64_t columns, const float *scale, void *target,
                                     int32_t target_dtype, int64_t stride) {
    with_dtype(target_dtype, [&]<int dtype>() {
        for (int64_t first = 0; first < rows; first += kLanes)
            for (int64_t c = 0; c < columns; c += kLanes) {
                const int width = lanes_left(c, columns);
                vfloat block[kLanes];
                for (int i = 0; i < kLanes; i++) block[i] = i < width ? load(source + (c + i) * ld + first) : zero();
                transpose(block);
                for (int r = 0; r < kLanes && first + r < rows; r++)
                    store_any(offset(target, dtype, (first + r) * stride + c), dtype, block[r] * scale[first + r], width);
            }
    });
}

// target(r, c) = scale * source(r, c); columns up to `ld` (whole vectors) read 0.
static inline void pack_rows(Rows source, int64_t rows, int64_t columns, float scale, float *target, int64_t ld) {
    with_dtype(source.dtype, [&]<int dtype>() {
        for (int64_t r = 0; r < rows; r++) {
            int64_t c = 0;
            for (; c < columns; c += kLanes) store(target + r * ld + c, load_any(source.at(r, c), dtype, lanes_left(c, columns)) * scale);
            for (; c < ld; c += kLanes) store(target + r * ld + c, zero());
        }
    });
}

static inline void unpack_rows(const float *source, int64_t ld, int64_t rows, int64_t columns, float scale, void *target, int32_t target_dtype,
                               int64_t stride) {
    with_dtype(target_dtype, [&]<int dtype>() {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c += kLanes)
                store_any(offset(target, dtype, r * stride + c), dtype, load(source + r * ld + c) * scale, lanes_left(c, columns));
    });
}

// ---- Pairs of bfloat16: a word holds elements 2i (low half) and 2i + 1 of one row or column; an odd last one is paired with 0 ------------
// Words of up to kLanes pairs of one contiguous row of `columns` elements.
FASTATTN_INLINE vfloat load_pairs(const uint16_t *row, int64_t columns) {
    if (columns >= 2 * kLanes) return load((const float *)row);
    vuint words = {};
    if (columns > 0) __builtin_memcpy(&words, row, (size_t)columns * 2);
    return (vfloat)words;
}

// target(pair of c, r): pack_transposed on words; pairs up to `depth` read 0.
static inline void pack_pairs_transposed(Rows source, int64_t rows, int64_t columns, float *target, int64_t ld, int64_t vectors, int64_t depth) {
    for (int64_t first = 0; first < vectors * kLanes; first += kLanes) {
        const int64_t valid = larger(0, smaller(kLanes, rows - first));
        for (int64_t word = 0; word < depth; word += kLanes) {
            vfloat block[kLanes];
            for (int r = 0; r < kLanes; r++)
                block[r] = r < valid ? load_pairs((const uint16_t *)source.at(first + r, 2 * word), columns - 2 * word) : zero();
            transpose(block);
            for (int64_t i = 0; i < smaller(kLanes, depth - word); i++) store(target + (word + i) * ld + first, block[i]);
        }
    }
}

// Words (r, r + 1) of up to kLanes columns, 0 past the end.
FASTATTN_INLINE vfloat row_pairs(Rows source, int64_t rows, int64_t columns, int64_t r, int64_t c) {
    const auto half = [&](int64_t row) {
        vhalf h = {};
        if (row < rows) __builtin_memcpy(&h, source.at(row, c), (size_t)lanes_left(c, columns) * 2);
        return __builtin_convertvector(h, vuint);
    };
    return (vfloat)(half(r) | half(r + 1) << 16);
}

// target(pair of r, c): two rows interleaved; columns up to whole vectors and pairs up to `depth` read 0.
static inline void pack_pairs_of_rows(Rows source, int64_t rows, int64_t columns, float *target, int64_t ld, int64_t depth) {
    for (int64_t pair = 0; pair < depth; pair++)
        for (int64_t c = 0; c < columns; c += kLanes) store(target + pair * ld + c, row_pairs(source, rows, columns, 2 * pair, c));
}

// target(r, pair of c): rows copied so that each starts on a word and is filled up with 0.
static inline void pack_pairs_in_rows(Rows source, int64_t rows, int64_t columns, float *target, int64_t ld) {
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *row = (uint16_t *)(target + r * ld);
        memcpy(row, source.at(r, 0), (size_t)columns * 2);
        memset(row + columns, 0, (size_t)(2 * ld - columns) * 2);
    }
}

// target(c, pair of r): the columns as rows, filled up with 0.
static inline void pack_pairs_of_columns(Rows source, int64_t rows, int64_t columns, float *target, int64_t ld) {
    for (int64_t c = 0; c < columns; c += kLanes)
        for (int64_t word = 0; word < ld; word += kLanes) {
            vfloat block[kLanes];
            for (int64_t i = 0; i < kLanes; i++) block[i] = row_pairs(source, rows, columns, 2 * (word + i), c);
            transpose(block);
            for (int64_t i = 0; i < lanes_left(c, columns); i++) store(target + (c + i) * ld + word, block[i]);
        }
}

// ---- Scratch: one cache-aligned allocation a thread, cut into pieces ------------------------------------------------------------------
class Scratch {
  public:
    explicit Scratch(int64_t floats) : base_((float *)aligned_alloc(64, (size_t)round_up(floats * 4 + 64, 64))), next_(base_) {}
    ~Scratch() { free(base_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    bool failed() const { return base_ == nullptr; }
    static int64_t padded(int64_t floats) { return round_up(floats, 16); }
    float *take(int64_t floats) {
        float *piece = next_;
        next_ += padded(floats);
        return piece;
    }

  private:
    float *base_, *next_;
};

FASTATTN_NAMESPACE_END
