// Tiles of rows in shared memory: ROWS rows of DIM elements, each row 16 bytes longer than its elements, so that the eight rows that ldmatrix
// reads at once lie in different banks.
#pragma once
#include <primitives/copy_async.cuh>
#include <primitives/mma.cuh>
#include <primitives/threads.cuh>

#include "params.cuh"

template <typename T, int ROWS, int DIM>
struct Tile {
    static constexpr int STRIDE = DIM + 8;
    static constexpr int SIZE = ROWS * STRIDE;
    static constexpr int CHUNKS = DIM / 8;

    Shared<T> data;

    // Fills the tile from rows first, first + 1, ... of one head, zeros where a row is not alive or its columns end. 16-byte copies are under way
    // when this returns, in the group that is open; single elements (where the tensor allows no 16 bytes) are there.
    template <int THREADS, typename Alive>
    __device__ __forceinline__ void load(const Strided<const T> &from, bool vectors, int64_t head_at, int first, int width, const Alive &alive) const {
        for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, column = i % CHUNKS * 8;
            const int left = width - column, valid = !alive(row) || left <= 0 ? 0 : left < 8 ? left : 8;
            const int64_t at = valid > 0 ? head_at + (first + row) * from.row + column : 0;
            if (vectors) {
                copy_async(data, row * STRIDE + column, from.data, at, valid);
            } else {
                Pack<uint16_t, 8> chunk = {};
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (j < valid) chunk.at[j] = from.data.template as<const uint16_t>().get(at + j);
                data.template as<uint16_t>().template store<8>(row * STRIDE + column, chunk);
            }
        }
    }

    // The A fragment of rows [row, row + 16), columns [column, column + 16).
    __device__ __forceinline__ void left_operand(uint32_t (&fragment)[4], int row, int column) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        load_matrices(fragment, data, (row + lane % 16) * STRIDE + column + lane / 16 * 8);
    }
    // The B fragments of the transpose, columns [row, row + 8) in the first two words and [row + 8, row + 16) in the others.
    __device__ __forceinline__ void right_transposed(uint32_t (&fragment)[4], int row, int column) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        load_matrices(fragment, data, (row + lane % 8 + lane / 16 * 8) * STRIDE + column + lane / 8 % 2 * 8);
    }
    // The B fragments of rows [row, row + 16): columns [column, column + 8) in the first two words and the next eight in the others.
    __device__ __forceinline__ void right_operand(uint32_t (&fragment)[4], int row, int column) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        load_matrices_transposed(fragment, data, (row + lane % 16) * STRIDE + column + lane / 16 * 8);
    }
};
