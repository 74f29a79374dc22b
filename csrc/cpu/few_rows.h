// Products with few rows of A, as in generation, whose time is that of reading B once: B is read where it lies, in either layout and any dtype.
#pragma once
#include "operands.h"

FASTATTN_NAMESPACE_BEGIN

// A product of m rows of A with B(k, n); `is_rounded`: of float32 that is multiplied in bfloat16.
struct FewRows {
    int64_t m, n, k;
    Operand b;
    bool is_rounded;

    // Whether reading B where it lies is faster than packing it, or, where it is kept packed, than that.
    bool are_few(bool is_packed) const { return m <= (is_packed ? most_beside_packed() : most()); }

    // How sums() reads A: as the tensor that it is, as float32, as bfloat16, or for the matrix unit as words of pairs along k, in rows or those of all
    // rows side by side.
    enum class Left { tensor, floats, halves, row_words, lane_words };
    Left left() const;
    bool uses_matrix_unit() const { return left() == Left::row_words || left() == Left::lane_words; }
    // Of A in that form: floats of all, 0 for the tensor, and elements from one row, or word, to the next.
    int64_t left_floats() const;
    int64_t left_stride() const;
    void convert(Rows a, float *target) const;

    // Columns whose sums are made at a time, a multiple of the vector.
    int64_t panel() const;

    // sums(r, c - columns.begin) = sum_k A(r, k) B(k, c) for at most a panel of columns, the first a multiple of kLanes. `sums` has room for a panel of
    // m rows, ld apart, and for what is needed beside it, `scratch_floats` in all where ld is a panel. The calling thread has set up its matrix unit
    // where it is used.
    int64_t scratch_floats() const;
    void sums(const void *a, int64_t lda, Range columns, float *sums, int64_t ld) const;

  private:
    int64_t most() const;
    int64_t most_of_dtype() const;
    int64_t most_of_features() const;
    int64_t most_beside_packed() const;
};

FASTATTN_NAMESPACE_END
