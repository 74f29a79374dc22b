// Products with few rows of A, as in generation, whose time is that of reading B once: B is read where it lies, in either layout and any dtype.
#pragma once
#include "operands.h"

FASTATTN_NAMESPACE_BEGIN

// The most rows of A for which that is faster than packing B.
int64_t most_few_rows(const Operand &b);

// The most rows of A for which it is faster than a B of k rows that was packed before.
int64_t most_few_rows_beside_packed(const Operand &b, int64_t k);

// Columns whose sums few_rows_sums() makes at a time, a multiple of kTileWidth.
int64_t few_rows_panel(const Operand &b);

// Whether few_rows_sums() reads A as the bfloat16 it is: pairs of it are multiplied by pairs of B.
bool few_rows_of_pairs(const Operand &b);

// sums(r, c - columns.begin) = sum_k A(r, k) B(k, c) for rows of A, float32 unless few_rows_of_pairs(), and at most a panel of columns, the first a multiple of kTileWidth.
// Two panels of m rows, ld apart, have room in `sums`; the second is overwritten.
void few_rows_sums(int64_t m, int64_t k, const void *a, int64_t lda, const Operand &b, Range columns, float *sums, int64_t ld);

FASTATTN_NAMESPACE_END
