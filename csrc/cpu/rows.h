// Kernels that walk rows and also sum over them (gradients of norm weights and of biases).
//
// The rows are cut into chunks by their number alone, each chunk sums into a row of its own, and the chunks are added in order: the result
// does not depend on the thread count.
#pragma once
#include "pack.h"

FASTATTN_NAMESPACE_BEGIN

struct RowChunks {
    int64_t rows, count;
    explicit RowChunks(int64_t total) : rows(total), count(larger(1, smaller(64, total / 16))) {}
    int64_t begin(int64_t chunk) const { return rows * chunk / count; }
};

// `sums` sets of column sums over the chunks, zeroed.
class ColumnSums {
  public:
    ColumnSums(int64_t sums, int64_t chunks, int64_t columns)
        : chunks_(chunks), width_(round_up(columns, 16)), scratch_(sums * chunks * width_), data_(scratch_.take(sums * chunks * width_)) {
        if (!failed()) memset(data_, 0, (size_t)(sums * chunks * width_) * 4);
    }
    bool failed() const { return scratch_.failed(); }
    float *row(int64_t sum, int64_t chunk) const { return data_ + (sum * chunks_ + chunk) * width_; }

    void write(int64_t sum, int64_t columns, float *target) const {
        for (int64_t c = 0; c < columns; c += kLanes) {
            vfloat total = zero();
            for (int64_t chunk = 0; chunk < chunks_; chunk++) total += load(row(sum, chunk) + c);
            store_part(target + c, total, lanes_left(c, columns));
        }
    }

  private:
    int64_t chunks_, width_;
    Scratch scratch_;
    float *data_;
};

FASTATTN_NAMESPACE_END
