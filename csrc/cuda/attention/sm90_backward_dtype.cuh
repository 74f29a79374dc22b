// The instances of the backward's kernels on wgmma: a file per dtype and kernel, so that they compile side by side.
#pragma once
#include "dispatch.cuh"
#include "sm90_backward_keys.cuh"
#include "sm90_backward_queries.cuh"

template <typename T, int DIM, int TILES>
cudaError_t launch_sm90_queries(const fastattn_cuda_attention_gradient &from) {
    return needs_extras(from.call) ? launch_sm90_backward_queries<T, DIM, true, 1>(from)
                                   : launch_sm90_backward_queries<T, DIM, false, TILES>(from);
}

// The second number: tiles of 64 keys to a step of a plain call.
template <typename T>
cudaError_t sm90_backward_queries(const fastattn_cuda_attention_gradient &from) {
    static_assert(SM90_DIM == 128);
    const int64_t dim = head_dim(from.call);
    if (dim <= 64) return launch_sm90_queries<T, 64, 2>(from);
    if (dim <= 128) return launch_sm90_queries<T, 128, 1>(from);
    return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t sm90_backward_keys(const fastattn_cuda_attention_gradient &from) {
    const int64_t dim = head_dim(from.call);
    const bool extras = needs_extras(from.call);
    if (dim > 128) return cudaErrorInvalidValue;
    if (dim <= 64 && !extras) return launch_sm90_backward_keys<T, 64, true, true, false>(from);
    if (dim <= 64) return launch_sm90_backward_keys<T, 64, true, true, true>(from);
    if (!extras) return launch_sm90_backward_keys<T, 128, true, true, false>(from);
    // Both gradients, one after the other.
    const cudaError_t error = launch_sm90_backward_keys<T, 128, false, true, true>(from);
    return error != cudaSuccess ? error : launch_sm90_backward_keys<T, 128, true, false, true>(from);
}
