// Products of tiles by mma.sync. Sums lie in registers, M slabs of 16 rows per warp and N tiles of 8 columns, in the order of an accumulator of
// primitives/mma.cuh: element e of c[m][n] is row 16 m + 8 (e / 2) + lane / 4, column 8 n + lane % 4 * 2 + e % 2.
#pragma once
#include "tile.cuh"

// Column of accumulator element e of column tile n.
__device__ __forceinline__ int sum_column(int n, int e) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2; }

template <int M, int N>
__device__ __forceinline__ void zero_sums(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f;
}

// c = left right^T, for the rows of `left` from `row` on and all of `right`.
template <typename T, int DIM, int M, int N, typename Left, typename Right>
__device__ __forceinline__ void multiply_transposed(float (&c)[M][N][4], const Left &left, int row, const Right &right) {
    zero_sums(c);
#pragma unroll
    for (int d = 0; d < DIM; d += 16) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.left_operand(a[m], row + 16 * m, d);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            right.right_transposed(b, 8 * n, d);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], a[m], b[0], b[1]);
                mma<T>(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Sums rounded to T: the left operand of a further product.
template <typename T, int M, int N>
__device__ __forceinline__ void round_sums(uint32_t (&rounded)[M][N / 2][4], const float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) rounded[m][n / 2][n % 2 * 2 + half] = pack_pair<T>(c[m][n][2 * half], c[m][n][2 * half + 1]);
}

// c += left right, where right has 16 DEPTH rows.
template <typename T, int M, int N, int DEPTH, typename Right>
__device__ __forceinline__ void accumulate(float (&c)[M][N][4], const uint32_t (&left)[M][DEPTH][4], const Right &right) {
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            right.right_operand(b, 16 * k, 8 * n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], left[m][k], b[0], b[1]);
                mma<T>(c[m][n + 1], left[m][k], b[2], b[3]);
            }
        }
    }
}

// Writes this warp's rows of sums to rows [first, first + 16 M) of one head, through its rows from `row` on of a tile that nobody else reads any
// more. rows_end: where the head's rows end; value(m, half, sum): what is written.
template <typename T, int M, int N, typename TileType, typename Value>
__device__ __forceinline__ void store_sums(const float (&c)[M][N][4], const TileType &through, int row, const Strided<T> &to, bool vectors,
                                           int64_t head_at, int first, int rows_end, int width, const Value &value) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    sync_warp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint32_t pair = pack_pair<T>(value(m, half, c[m][n][2 * half]), value(m, half, c[m][n][2 * half + 1]));
                const int at = TileType::at(row + 16 * m + 8 * half + lane / 4, sum_column(n, 0));
                through.data.template as<uint32_t>().set(static_cast<int>(static_cast<unsigned>(at) / 2), pair);
            }
    sync_warp();
    for (int i = lane; i < 16 * M * TileType::CHUNKS; i += WARP) {
        const int r = i / TileType::CHUNKS, column = i % TileType::CHUNKS * 8;
        if (first + r >= rows_end || column >= width) continue;
        const Pack<T, 8> chunk = through.data.template load<8>(TileType::at(row + r, column));
        const int64_t at = head_at + (first + r) * to.row + column;
        if (vectors) {
            to.data.template store<8>(at, chunk);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (column + j < width) to.data.set(at + j, chunk.at[j]);
        }
    }
}
