// The instances of sm80_forward.cuh: a file per dtype, so that they compile side by side.
#pragma once
#include "dispatch.cuh"
#include "sm80_forward.cuh"

template <typename T, int DIM, int ROWS, int M, int EXTRAS_M>
cudaError_t launch_dim(const fastattn_cuda_attention &call) {
    return needs_extras(call) ? launch_sm80_forward<T, DIM, ROWS, EXTRAS_M, true>(call) : launch_sm80_forward<T, DIM, ROWS, M, false>(call);
}

template <typename T>
cudaError_t sm80_forward(const fastattn_cuda_attention &call) {
    const int64_t dim = head_dim(call);
    // Queries of a block and slabs of 16 of them per warp: two slabs share what they read of k and v, where registers allow.
    if (dim <= 32) return launch_dim<T, 32, 128, 2, 2>(call);
    if (dim <= 64) return launch_dim<T, 64, 128, 2, 2>(call);
    if (dim <= 96) return launch_dim<T, 96, 128, 2, 1>(call);
    if (dim <= 128) return launch_dim<T, 128, 128, 2, 1>(call);
    if (dim <= 192) return launch_dim<T, 192, 64, 1, 1>(call);
    if (dim <= 256) return launch_dim<T, 256, 64, 1, 1>(call);
    return cudaErrorInvalidValue;
}
