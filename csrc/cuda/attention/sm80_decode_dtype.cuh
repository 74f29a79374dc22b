// The instances of sm80_decode.cuh: a file per dtype, so that they compile side by side.
#pragma once
#include "dispatch.cuh"
#include "sm80_decode.cuh"

// Warps by rows and by keys of a tile: one token of most models has up to 16 rows per key head, which one warp holds.
template <typename T, int DIM, int KEYS, int MANY_ROWS, int MANY_KEYS>
cudaError_t launch_decode_dim(const fastattn_cuda_decode &call) {
    const int64_t rows = call.problem.heads_q / call.problem.heads_kv * call.problem.len_q;
    return rows <= 16 ? launch_sm80_decode<T, DIM, KEYS, 1, KEYS / 16>(call) : launch_sm80_decode<T, DIM, KEYS, MANY_ROWS, MANY_KEYS>(call);
}

template <typename T>
cudaError_t sm80_decode(const fastattn_cuda_decode &call) {
    const int64_t dim = call.problem.dim_qk > call.problem.dim_v ? call.problem.dim_qk : call.problem.dim_v;
    if (dim <= 64) return launch_decode_dim<T, 64, 64, 4, 1>(call);
    if (dim <= 128) return launch_decode_dim<T, 128, 64, 4, 1>(call);
    if (dim <= 256) return launch_decode_dim<T, 256, 32, 2, 2>(call);
    return cudaErrorInvalidValue;
}
