// The end of decoding: the sums of a row become its output, and the parts of its keys are put together.
#pragma once
#include <cmath>

#include <primitives/launch.cuh>
#include <primitives/threads.cuh>

#include "decode_params.cuh"
#include "scores.cuh"

// What a row's sums are multiplied with, and its log-sum-exp: sums are of e^(s - base).
struct Normal {
    bool sees;
    float factor, lse;

    __device__ __forceinline__ Normal(float base, float sum, const Global<const float> &sinks, int head) {
        sees = !(sum == 0.0f);  // NaN is not hidden
        lse = sees ? base + log2f(sum) * LN2 : -INFINITY;
        factor = sees ? 1.0f / sum : 0.0f;
        if (!sinks || !sees) return;
        const float sink = sinks.get(head), top = fmaxf(base, sink), shrink = exp2f((base - top) * LOG2E);
        factor = shrink / (sum * shrink + exp2f((sink - top) * LOG2E));
    }
    // 0 where the row sees nothing, whatever others of its block saw.
    __device__ __forceinline__ float of(float summed) const { return sees ? summed * factor : 0.0f; }
};

// e^(a - base); a base of -inf is that of no key.
__device__ __forceinline__ float share_of(float a, float base) { return exp2f((a - (base == -INFINITY ? 0.0f : base)) * LOG2E); }

constexpr int COMBINE_THREADS = 128;

// Puts the parts of each row together, in order; a warp per row.
template <typename T>
__global__ void __launch_bounds__(COMBINE_THREADS) decode_combine(const __grid_constant__ DecodeParams<T> p) {
    constexpr int MOST = 256 / WARP;  // columns of a lane
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (COMBINE_THREADS / WARP) + threadIdx.x / WARP;
    if (row >= p.all_rows()) return;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    float top = -INFINITY;
    for (int part = lane; part < p.parts; part += WARP) top = fmaxf(top, p.statistics.get((part * p.all_rows() + row) * 2));
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) top = fmaxf(top, shuffle_xor(top, step));
    float total = 0.0f, values[MOST] = {};
    // A lane looks up the share of a part each, for all to use; the loads of several parts are then under way at once.
    for (int first = 0; first < p.parts; first += WARP) {
        float share = 0.0f, own_total = 0.0f;
        if (first + lane < p.parts) {
            const Pack<float, 2> own = p.statistics.template load<2>(((first + lane) * p.all_rows() + row) * 2);
            if (own.at[1] != 0.0f) share = share_of(own.at[0], top), own_total = own.at[1] * share;  // else it saw no key, and left no sums
        }
        const uint32_t left = warp_ballot(own_total != 0.0f || share != 0.0f);
        const int parts = smaller(WARP, p.parts - first);
#pragma unroll 4
        for (int i = 0; i < parts; i++) {
            const int64_t number = (first + i) * p.all_rows() + row;
            const float of_part = shuffle(share, i);
            const bool has_sums = left >> i & 1;
            total += shuffle(own_total, i);
#pragma unroll
            for (int n = 0; n < MOST; n++) {
                if (lane + n * WARP >= p.dim_v) continue;
                const float sum = p.sums.get(number * p.dim_v + lane + n * WARP);  // may be anything where the part left none
                values[n] += has_sums ? sum * of_part : 0.0f;
            }
        }
    }
    const int64_t query = row % p.len_q, head = row / p.len_q % p.heads_q, batch = row / p.len_q / p.heads_q;
    const Normal normal(top, total, p.sinks, static_cast<int>(head));
    if (lane == 0) p.lse.set(row, normal.lse);
    const int64_t at = p.out.at(batch, head, query);
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (lane + i * WARP < p.dim_v) p.out.data.set(at + lane + i * WARP, from_float<T>(normal.of(values[i])));
}
