// Tiles of rows in shared memory as wgmma reads them: panels of 64 columns, a row of 128 bytes in each, its chunks exchanged by the row. And their
// products, as products.cuh has them for mma.sync, but that they are only issued here: commit and wait are the caller's.
#pragma once
#include <primitives/wgmma.cuh>

// ROWS rows of DIM elements; PANEL_ROWS: of the tile that these are a part of.
template <typename T, int ROWS, int DIM, int PANEL_ROWS = ROWS>
struct SwizzledTile {
    static_assert(DIM % 64 == 0 && ROWS % 8 == 0);
    static constexpr int HEIGHT = ROWS, SIZE = PANEL_ROWS * DIM, CHUNKS = DIM / 8;
    static constexpr int PANEL_BYTES = PANEL_ROWS * 128;

    Shared<T> data;

    static __device__ __forceinline__ int at(int row, int column) {
        const unsigned c = static_cast<unsigned>(column), r = static_cast<unsigned>(row);
        return static_cast<int>(c / 64 * (PANEL_ROWS * 64) + r * 64 + (c % 64 ^ r % 8 * 8));
    }

    // Rows [first, first + COUNT), where first is a multiple of 8.
    template <int COUNT>
    __device__ __forceinline__ SwizzledTile<T, COUNT, DIM, PANEL_ROWS> rows(int first) const {
        return {data.from(first * 64)};
    }
    // Columns [column, column + 16) of the rows from `row` on, an operand by rows.
    __device__ __forceinline__ SwizzledMatrix columns(int row, int column) const {
        return {data, column / 64 * (PANEL_ROWS * 64) + row * 64 + column % 64, PANEL_BYTES};
    }
    // Rows [row, row + 16) and all columns, a right operand of as many rows.
    __device__ __forceinline__ SwizzledMatrix right_operand(int row) const { return {data, row * 64, PANEL_BYTES}; }
};

// c = left right^T, for 64 rows of `left` from `row` on and all of `right`.
template <typename T, int N, int ROWS, int RIGHT_ROWS, int DIM>
__device__ __forceinline__ void issue_transposed(float (&c)[N][4], const SwizzledTile<T, ROWS, DIM> &left, int row,
                                                 const SwizzledTile<T, RIGHT_ROWS, DIM> &right) {
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < DIM; d += 16) wgmma_transposed<T>(c, left.columns(row, d), right.columns(0, d), d > 0);
}

// c += left right, where right has 16 DEPTH rows.
template <typename T, int N, int DEPTH, int DIM>
__device__ __forceinline__ void issue_sums(float (&c)[N][4], const uint32_t (&left)[DEPTH][4], const SwizzledTile<T, 16 * DEPTH, DIM> &right) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH; k++) wgmma<T>(c, left[k], right.right_operand(16 * k));
}
