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
            over_columns(columns, [&](int64_t c, int lanes) { store(target + r * ld + c, load_any(source.at(r, c), dtype, lanes) * scale); });
            for (int64_t c = round_up(columns, kLanes); c < ld; c += kLanes) store(target + r * ld + c, zero());
        }
    });
}

// Rows of halves as they are; `ld` floats to a row, of which those past the columns read 0.
static inline void copy_rows(Rows source, int64_t rows, int64_t columns, float *target, int64_t ld) {
    memset(target, 0, (size_t)(rows * ld) * 4);
    for (int64_t r = 0; r < rows; r++) memcpy(target + r * ld, source.at(r, 0), (size_t)(columns * size_of(source.dtype)));
}

static inline void unpack_rows(const float *source, int64_t ld, int64_t rows, int64_t columns, float scale, void *target, int32_t target_dtype,
                               int64_t stride) {
    with_dtype(target_dtype, [&]<int dtype>() {
        for (int64_t r = 0; r < rows; r++)
            over_columns(columns, [&](int64_t c, int lanes) {
                store_any(offset(target, dtype, r * stride + c), dtype, load(source + r * ld + c) * scale, lanes);
            });
    });
}

// ---- Scratch: one cache-aligned allocation, cut into pieces -----------------------------------------------------------------------------
class Pieces {
  public:
    explicit Pieces(float *memory) : next_(memory) {}

    static int64_t padded(int64_t floats) { return round_up(floats, 16); }
    float *take(int64_t floats) {
        float *piece = next_;
        next_ += padded(floats);
        return piece;
    }

  private:
    float *next_;
};

class Scratch : public Pieces {
  public:
    explicit Scratch(int64_t floats) : Scratch((float *)aligned_alloc(64, (size_t)round_up(floats * 4 + 64, 64))) {}
    ~Scratch() { free(base_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    bool failed() const { return base_ == nullptr; }

  private:
    explicit Scratch(float *base) : Pieces(base), base_(base) {}
    float *base_;
};

FASTATTN_NAMESPACE_END
