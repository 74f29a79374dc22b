// What the forward kernels share behind the products: the softmax of a walk over the keys, and what it leaves in out and lse.
#pragma once
#include "query_block.cuh"

constexpr float LAZY = 8.0f;  // p stays below 2^LAZY, far inside of float16's range

template <typename T, int DIM, int ROWS, int M, int STEP, bool EXTRAS>
struct ForwardBlock : QueryBlock<T, DIM, ROWS, M, STEP, EXTRAS> {
    using Base = QueryBlock<T, DIM, ROWS, M, STEP, EXTRAS>;
    using Base::b, Base::h, Base::p, Base::row, Base::s, Base::sequence, Base::warp_row;
    using Base::S_TILES, Base::O_TILES;

    // Of a query, whose keys four lanes share: what p is relative to, and this lane's part of the sum of p.
    struct Statistics {
        float base, sum;
    };

    float o[M][O_TILES][4];
    uint32_t rounded[M][S_TILES / 2][4];  // p

    using Base::Base;

    // p = 2^(s - base) in place of s, for one of this thread's rows. The base moves up to the row's maximum once that is LAZY powers of 2 above,
    // which after the first tiles is seldom. Returns what the row's accumulators, relative to the base before, are to be multiplied by.
    __device__ __forceinline__ float soften_row(int m, int half, Statistics &row_statistics) {
        const float to_log2 = EXTRAS ? LOG2E : p.scale * LOG2E;
        const float before = row_statistics.base;
        float greatest = before;
#pragma unroll
        for (int n = 0; n < S_TILES; n++) greatest = fmaxf(greatest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        greatest = fmaxf(greatest, shuffle_xor(greatest, 1));
        greatest = fmaxf(greatest, shuffle_xor(greatest, 2));
        const bool moves = (greatest - before) * to_log2 > LAZY;
        if (!moves) greatest = before;
        const float base = greatest == -INFINITY ? 0.0f : greatest, scaled = base * to_log2;
        // 2^(a - base); the difference first where scores may be so large that log2 e times them is not finite
        const auto power = [&](float a) { return exp2_fast(EXTRAS ? (a - base) * to_log2 : fmaf(a, to_log2, -scaled)); };
        const float shrink = moves ? power(before) : 1.0f;
        float sum = row_statistics.sum * shrink;
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[m][n][2 * half + e];
                x = power(x);
                sum += x;
            }
        row_statistics = {greatest, sum};
        return shrink;
    }

    // The accumulators of slab m follow the bases of its rows.
    __device__ __forceinline__ void shrink_sums(int m, const float (&shrink)[2]) {
        if (!warp_any(shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[m][n][e] *= shrink[e / 2];
    }

    // Normalises and writes lse and out, the latter through this warp's rows of the tile of q, which nobody else reads any more.
    // statistics(m, half): those of a row.
    template <typename QTile, typename GetStatistics>
    __device__ __forceinline__ void finish(const QTile &q, int64_t out_head, int64_t lse_head, const GetStatistics &statistics) {
        const float to_natural = EXTRAS ? 1.0f : p.scale;
        float factor[M][2];
        bool sees[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Statistics of_row = statistics(m, half);
                float sum = of_row.sum;
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                sees[m][half] = !(sum == 0.0f);  // the greatest p is at least 1, and NaN is not hidden
                const float base = of_row.base * to_natural;
                const int i = this->query(m, half);
                if (threadIdx.x % 4 == 0 && i < sequence.len_q) p.lse.set(lse_head + i, sees[m][half] ? base + log2f(sum) * LN2 : -INFINITY);
                float &own_factor = factor[m][half] = sees[m][half] ? 1.0f / sum : 0.0f;
                if (p.sinks && sees[m][half]) {
                    const float sink = p.sinks.get(static_cast<unsigned>(h)), top = fmaxf(base, sink), shrink = exp2f((base - top) * LOG2E);
                    own_factor = shrink / (sum * shrink + exp2f((sink - top) * LOG2E));
                }
                if (EXTRAS && p.dropout) own_factor *= p.dropout.keep_scale;
            }
        store_sums(o, q, warp_row, p.out, p.out_vectors, out_head, row + warp_row, sequence.len_q, p.dim_v,
                   [&](int m, int half, float sum) { return sees[m][half] ? sum * factor[m][half] : 0.0f; });
    }

    // Of a packed batch, out 0 and lse -inf for the rows of no sequence: before the first, behind the last, and what is behind the longest length
    // that was told. By all threads of the first block of a sequence and head.
    __device__ __forceinline__ void clear_unowned() const {
        if (b == 0) clear(0, sequence.first_q);
        const int end = b + 1 < p.batch ? clamp(p.packed.cu_q.get(b + 1), 0, p.packed.rows_q) : p.packed.rows_q;
        clear(sequence.first_q + sequence.len_q, end);
    }

private:
    __device__ __forceinline__ void clear(int begin, int end) const {
        for (int i = begin + static_cast<int>(threadIdx.x) / WARP; i < end; i += static_cast<int>(blockDim.x) / WARP) {
            const int lane = static_cast<int>(threadIdx.x) % WARP;
            if (lane == 0) p.lse.set(static_cast<int64_t>(h) * p.packed.rows_q + i, -INFINITY);
            for (int d = lane; d < p.dim_v; d += WARP) p.out.data.set(p.out.at(0, h, i) + d, from_float<T>(0.0f));
        }
    }
};
