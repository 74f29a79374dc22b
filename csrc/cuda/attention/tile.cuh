// Tiles of rows in shared memory: ROWS rows of DIM elements, laid out so that the eight rows that ldmatrix reads at once lie in different banks.
#pragma once
#include <primitives/copy_async.cuh>
#include <primitives/mma.cuh>
#include <primitives/threads.cuh>

#include "params.cuh"

template <typename T, int ROWS, int DIM>
struct Tile {
    // By rows that are 16 bytes longer than their elements, which costs no instruction; or, where that would be more than the 99 KiB that a block
    // has on some devices (8.6, 8.9, 12.0), by an order of the chunks of 16 bytes that differs from row to row.
    static constexpr bool REORDERED = DIM == 256;
    static constexpr int STRIDE = REORDERED ? DIM : DIM + 8;
    static constexpr int HEIGHT = ROWS, SIZE = ROWS * STRIDE;
    static constexpr int CHUNKS = DIM / 8;

    Shared<T> data;

    static __device__ __forceinline__ int at(int row, int column) {
        const unsigned c = static_cast<unsigned>(column), r = static_cast<unsigned>(row);
        return row * STRIDE + static_cast<int>(REORDERED ? c / 64 * 64 + (c % 64 ^ r % 8 * 8) : c);
    }

    // The A fragment of rows [row, row + 16), columns [column, column + 16).
    __device__ __forceinline__ void left_operand(uint32_t (&fragment)[4], int row, int column) const {
        const unsigned lane = threadIdx.x % WARP;
        load_matrices(fragment, data, lane_at(row, lane % 16, column, lane / 16 * 8));
    }
    // The B fragments of the transpose, columns [row, row + 8) in the first two words and [row + 8, row + 16) in the others.
    __device__ __forceinline__ void right_transposed(uint32_t (&fragment)[4], int row, int column) const {
        const unsigned lane = threadIdx.x % WARP;
        load_matrices(fragment, data, lane_at(row, lane % 8 + lane / 16 * 8, column, lane / 8 % 2 * 8));
    }
    // The B fragments of rows [row, row + 16): columns [column, column + 8) in the first two words and the next eight in the others.
    __device__ __forceinline__ void right_operand(uint32_t (&fragment)[4], int row, int column) const {
        const unsigned lane = threadIdx.x % WARP;
        load_matrices_transposed(fragment, data, lane_at(row, lane % 16, column, lane / 16 * 8));
    }

private:
    // at() of row + lane_row, column + lane_column, where row is a multiple of 8 and column one of 16, in a form whose part that depends on the
    // lane is the same for many of them.
    static __device__ __forceinline__ int lane_at(int row, unsigned lane_row, int column, unsigned lane_column) {
        if constexpr (!REORDERED) return (row + static_cast<int>(lane_row)) * STRIDE + column + static_cast<int>(lane_column);
        const unsigned aside = (lane_column ^ lane_row % 8 * 8) ^ static_cast<unsigned>(column % 64);
        return static_cast<int>(lane_row * STRIDE + aside) + row * STRIDE + column / 64 * 64;
    }
};

// How the first THREADS threads of a block share the copying of such tiles, or of others with their interface: a thread takes the same columns of
// every STEP-th row, so that all of its addresses follow from one by constants. Rows of 3 * 2^n chunks are copied in three slices.
// PADDED: whether narrower rows have a fast path of their own. Where those compute who copy, sizes that are powers of two lack the registers.
template <typename T, int DIM, int THREADS, bool PADDED = (DIM & (DIM - 1)) != 0>
struct TileCopy {
    static constexpr int CHUNKS = DIM / 8, ACROSS = CHUNKS & -CHUNKS, STEP = THREADS / ACROSS;
    unsigned row, column;  // of the first chunk of this thread

    __device__ __forceinline__ TileCopy() : row(threadIdx.x / ACROSS), column(threadIdx.x % ACROSS * 8) {}

    // Zeros in the chunks from `width` on: once, since load() leaves them alone where it can. Each thread writes what is its own in load() too.
    template <typename To>
    __device__ __forceinline__ void pad(const To &to, unsigned width) const {
        if constexpr (PADDED) {
#pragma unroll 1
            for (unsigned c = column; c < DIM; c += 8 * ACROSS)
#pragma unroll 1
                for (int n = static_cast<int>(row); c >= width && n < To::HEIGHT; n += STEP)
                    to.data.template as<uint16_t>().template store<8>(To::at(n, static_cast<int>(c)), {});
        }
    }

    // Fills a padded tile from rows [first, first + HEIGHT) of one head, whose rows begin at head_at; zeros where a row is not alive.
    // alive(n) is asked about the n-th row after this thread's first one, unless all are. 16-byte copies are under way when this returns, in the
    // group that is open; zeros, and the single elements of a tensor that allows no 16 bytes, are there.
    template <typename To, typename Alive>
    __device__ __forceinline__ void load(const To &to, const Strided<const T> &from, bool vectors, int64_t head_at, unsigned first, unsigned width,
                                         bool all, const Alive &alive) const {
        constexpr int ROWS = To::HEIGHT;
        static_assert(ROWS % STEP == 0);
        int64_t at = head_at + (first + row) * from.row + column;
        const int64_t step = STEP * from.row;
        const auto to_at = [&](int n, int aside) { return To::at(static_cast<int>(row) + n, static_cast<int>(column) + aside); };
        if (vectors && all && width == DIM) {
#pragma unroll
            for (int n = 0; n < ROWS; n += STEP, at += step)
#pragma unroll
                for (int aside = 0; aside < DIM; aside += 8 * ACROSS) copy_async(to.data, to_at(n, aside), from.data, at + aside);
            return;
        }
        if (PADDED && vectors && all) {
#pragma unroll 4
            for (int n = 0; n < ROWS; n += STEP, at += step)
#pragma unroll
                for (int aside = 0; aside < DIM; aside += 8 * ACROSS)
                    if (column + aside < width) copy_async(to.data, to_at(n, aside), from.data, at + aside);
            return;
        }
#pragma unroll 1
        for (int n = 0; n < ROWS; n += STEP, at += step) {
            const bool lives = all || alive(n);
#pragma unroll 1
            for (unsigned aside = 0; aside < DIM; aside += 8 * ACROSS) {
                const int chunk_at = to_at(n, static_cast<int>(aside));
                if (vectors && lives && column + aside < width) {
                    copy_async(to.data, chunk_at, from.data, at + aside);
                    continue;
                }
                Pack<uint16_t, 8> chunk = {};
                if (!vectors) {
#pragma unroll
                    for (unsigned j = 0; j < 8; j++)
                        if (lives && column + aside + j < width) chunk.at[j] = from.data.template as<const uint16_t>().get(at + aside + j);
                }
                to.data.template as<uint16_t>().template store<8>(chunk_at, chunk);
            }
        }
        sync_warp();  // lanes may have parted, and the products that follow need all of them
    }
};
