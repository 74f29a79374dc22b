// What the kernels of the backward by queries share behind the products: ds of a walk over the keys, and norm and centre, which follow from its sums.
#pragma once
#include "gradient_params.cuh"
#include "query_block.cuh"

template <typename T, int DIM, int ROWS, int M, int STEP, bool EXTRAS>
struct GradientBlock : QueryBlock<T, DIM, ROWS, M, STEP, EXTRAS> {
    using Base = QueryBlock<T, DIM, ROWS, M, STEP, EXTRAS>;
    using Base::b, Base::h, Base::p, Base::row, Base::s, Base::sequence, Base::warp_row;
    using Base::S_TILES, Base::O_TILES;

    // Of a query, whose keys four lanes share: what e is relative to, norm and centre as far as they are known, and the sums over the keys of e, e dp
    // and |ds|, which between the steps may be a lane's part of them.
    struct Row {
        float base, norm, centre, total, moment, size;
    };

    const AttentionGradientParams<T> &g;
    float grad_weights[M][S_TILES][4];  // dp
    uint32_t rounded[M][S_TILES / 2][4];
    float gradient[M][O_TILES][4];  // of q, so far

    __device__ __forceinline__ GradientBlock(const AttentionGradientParams<T> &params, int entry, int tile, int warp)
        : Base(params.call, entry, tile, warp), g(params) {}

    // Calls f(m, half) for each of this thread's rows.
    template <typename F>
    static __device__ __forceinline__ void each_row(const F &f) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) f(m, half);
    }
    // The sum over the four lanes that share a row.
    static __device__ __forceinline__ float over_lanes(float x) {
        x += shuffle_xor(x, 1);
        return x + shuffle_xor(x, 2);
    }

    // What is known of a row before the first walk. row_head: where lse of the sequence's rows of this head begins. grad_out: the block's rows.
    template <typename QTile>
    __device__ __forceinline__ Row estimate_row(const QTile &grad_out, int64_t row_head, int i) const {
        const float lse = lse_of(row_head, i);
        const float norm = 1.0f / (1.0f + sink_of(lse));
        return {lse == -INFINITY ? INFINITY : lse,  // then every e is 0
                norm, norm * estimated_delta(grad_out, i) - grad_lse_of(row_head, i, lse), 0.0f, 0.0f, 0.0f};
    }

    // Dropout, of dp.
    __device__ __forceinline__ void drop_gradients(uint64_t seed, int first_key) {
        this->drop_out(grad_weights, seed, first_key);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) grad_weights[m][n][e] *= p.dropout.keep_scale;
    }

    // Scores of a row become e in their place. Returns this lane's part of the sum.
    __device__ __forceinline__ float exponentiate_row(int m, int half, float base) {
        const float to_log2 = EXTRAS ? LOG2E : p.scale * LOG2E;
        // 2^(s - base); the difference first where scores may be so large that log2 e times them is not finite
        const float from = EXTRAS ? base : base * LOG2E;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[m][n][2 * half + e];
                x = exp2_fast(EXTRAS ? (x - from) * to_log2 : fmaf(x, to_log2, -from));
                total += x;
            }
        return total;
    }

    // e becomes ds in its place, by the norm and centre that are known. Returns this lane's parts of the sums of e dp and |ds|.
    __device__ __forceinline__ Pack<float, 2> differentiate_row(int m, int half, const Row &r, const uint32_t (&slopes)[M][S_TILES][2]) {
        float moment = 0.0f, size = 0.0f;
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[m][n][2 * half + e];
                const float power = x, dp = grad_weights[m][n][2 * half + e];
                x = power * fmaf(dp, r.norm, -r.centre);
                moment = fmaf(power, dp, moment);
                size += fabsf(x);
            }
        if (EXTRAS && p.softcap != 0.0f) {
#pragma unroll
            for (int n = 0; n < S_TILES; n++) bend_gradients(s[m][n][2 * half], s[m][n][2 * half + 1], slopes[m][n][half]);
        }
        return {{moment, size}};
    }

    // How far the estimated centres of some rows were off, and their largest sum |ds|: of ds, both.
    struct Gap {
        float gap, greatest;

        __device__ __forceinline__ void join(float other_gap, float other_greatest) {
            gap = fmaxf(gap, other_gap), greatest = fmaxf(greatest, other_greatest);
        }
    };

    // Sums over the keys become the exact norm and centre; the gradient of the row follows the norm.
    __device__ __forceinline__ Row correct_row(int m, int half, const Row &r, int64_t row_head, Gap &found) {
        const int i = this->query(m, half);
        const float lse = lse_of(row_head, i);
        const bool sees = r.total > 0.0f;
        const float exact_norm = sees ? 1.0f / (r.total + sink_of(lse)) : 0.0f;
        const float exact_centre = exact_norm * exact_norm * r.moment - (sees ? grad_lse_of(row_head, i, lse) / r.total : 0.0f);
        const float factor = r.norm > 0.0f ? exact_norm / r.norm : 1.0f;
        found.join(fabsf(exact_centre - factor * r.centre) * r.total, r.size * factor);
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) gradient[m][n][2 * half + e] *= factor;
        return {r.base, exact_norm, exact_centre, 0.0f, r.moment, 0.0f};
    }

    // The greatest over the queries of COUNT warps from `first` on, of which this is one; all of them call this, and sync() is their barrier.
    template <int COUNT, typename Sync>
    static __device__ __forceinline__ Gap over_warps(Gap found, const Shared<float> &gaps, int first, int warp, const Sync &sync) {
#pragma unroll
        for (int step = 4; step < WARP; step *= 2) found.join(shuffle_xor(found.gap, step), shuffle_xor(found.greatest, step));
        if (threadIdx.x % WARP == 0) gaps.store<2>(2 * warp, {{found.gap, found.greatest}});
        sync();
#pragma unroll
        for (int w = 0; w < COUNT; w++) {
            const Pack<float, 2> of = gaps.load<2>(2 * (first + w));
            found.join(of.at[0], of.at[1]);
        }
        sync();
        return found;
    }

    // Writes what the backward by keys needs of a row, and its term of the sink's gradient.
    __device__ __forceinline__ void write_row(int m, int half, const Row &r, int64_t row_head) const {
        const int i = this->query(m, half);
        if (threadIdx.x % 4 != 0 || i >= sequence.len_q) return;
        const int64_t at = row_head + i;
        g.norm.set(at, r.norm);
        g.centre.set(at, r.centre);
        if (!g.sink_terms) return;
        g.sink_terms.set(at, r.norm > 0.0f ? -sink_of(lse_of(row_head, i)) * r.norm * r.norm * r.moment : 0.0f);
    }

private:
    // exp(sink - lse), and grad_lse, of a row; 0 where there is none, or nothing is seen.
    __device__ __forceinline__ float sink_of(float lse) const {
        return p.sinks && lse != -INFINITY ? exp2f((p.sinks.get(static_cast<unsigned>(h)) - lse) * LOG2E) : 0.0f;
    }
    __device__ __forceinline__ float grad_lse_of(int64_t row_head, int i, float lse) const {
        return g.grad_lse && i < sequence.len_q && lse != -INFINITY ? g.grad_lse.get(row_head + i) : 0.0f;
    }
    __device__ __forceinline__ float lse_of(int64_t row_head, int i) const { return i < sequence.len_q ? p.lse.get(row_head + i) : -INFINITY; }

    // sum(grad_out out) of a row: four lanes share it, by chunks of eight columns. The tile's rows end in zeros.
    template <typename QTile>
    __device__ __forceinline__ float estimated_delta(const QTile &grad_out, int i) const {
        float sum = 0.0f;
        if (i < sequence.len_q) {
            const int64_t at = p.out.at(b, h, sequence.first_q) + i * p.out.row;
            for (int d = static_cast<int>(threadIdx.x) % 4 * 8; d < p.dim_v; d += 32) {
                const Pack<T, 8> left = grad_out.data.template load<8>(QTile::at(i - row, d));
                Pack<T, 8> right = {};
                if (p.out_vectors) {
                    right = p.out.data.template load<8>(at + d);
                } else {
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        if (d + j < p.dim_v) right.at[j] = p.out.data.get(at + d + j);
                }
#pragma unroll
                for (int j = 0; j < 8; j++) sum = fmaf(to_float(left.at[j]), to_float(right.at[j]), sum);
            }
        }
        return over_lanes(sum);
    }
};
