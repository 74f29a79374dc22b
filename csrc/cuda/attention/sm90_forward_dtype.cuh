// The instances of sm90_forward.cuh: a file per dtype, so that they compile side by side. setup.py compiles those of sm90_*.cu for sm_90a alone.
#pragma once
#include "dispatch.cuh"
#include "sm90_forward.cuh"

template <typename T, int DIM>
cudaError_t launch_dim(const fastattn_cuda_attention &call) {
    return needs_extras(call) ? launch_sm90_forward<T, DIM, true>(call) : launch_sm90_forward<T, DIM, false>(call);
}

template <typename T>
cudaError_t sm90_forward(const fastattn_cuda_attention &call) {
    static_assert(SM90_DIM == 128);
    const int64_t dim = head_dim(call);
    if (dim <= 64) return launch_dim<T, 64>(call);
    if (dim <= 128) return launch_dim<T, 128>(call);
    return cudaErrorInvalidValue;
}
