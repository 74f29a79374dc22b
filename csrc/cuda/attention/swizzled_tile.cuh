// Tiles of rows in shared memory as wgmma reads them: panels of 64 columns, a row of 128 bytes in each, its chunks exchanged by the row.
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
