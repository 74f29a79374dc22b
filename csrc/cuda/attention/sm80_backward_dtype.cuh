// The instances of the backward's kernels: a file per dtype and kernel, so that they compile side by side.
#pragma once
#include "dispatch.cuh"
#include "sm80_backward_keys.cuh"
#include "sm80_backward_queries.cuh"

template <typename T, int DIM, int STEP>
cudaError_t launch_queries(const fastattn_cuda_attention_gradient &from) {
    return needs_extras(from.call) ? launch_sm80_backward_queries<T, DIM, STEP, true>(from)
                                   : launch_sm80_backward_queries<T, DIM, STEP, false>(from);
}

// The second number: keys of a step.
template <typename T>
cudaError_t sm80_backward_queries(const fastattn_cuda_attention_gradient &from) {
    const int64_t dim = head_dim(from.call);
    if (dim <= 32) return launch_queries<T, 32, 64>(from);
    if (dim <= 64) return launch_queries<T, 64, 64>(from);
    if (dim <= 96) return launch_queries<T, 96, 64>(from);
    if (dim <= 128) return launch_queries<T, 128, 64>(from);
    if (dim <= 192) return launch_queries<T, 192, 32>(from);
    return cudaErrorInvalidValue;
}

// Both gradients, one after the other.
template <typename T, int DIM, int STEP, bool EXTRAS>
cudaError_t launch_keys_twice(const fastattn_cuda_attention_gradient &from) {
    const cudaError_t error = launch_sm80_backward_keys<T, DIM, STEP, false, true, EXTRAS>(from);
    return error != cudaSuccess ? error : launch_sm80_backward_keys<T, DIM, STEP, true, false, EXTRAS>(from);
}
template <typename T, int DIM>
cudaError_t launch_keys(const fastattn_cuda_attention_gradient &from) {
    return needs_extras(from.call) ? launch_sm80_backward_keys<T, DIM, 64, true, true, true>(from)
                                   : launch_sm80_backward_keys<T, DIM, 64, true, true, false>(from);
}

// Of wide heads: queries of a step, and how many of the two gradients fit the registers.
template <typename T>
cudaError_t sm80_backward_keys(const fastattn_cuda_attention_gradient &from) {
    const int64_t dim = head_dim(from.call);
    const bool extras = needs_extras(from.call);
    if (dim <= 32) return launch_keys<T, 32>(from);
    if (dim <= 64) return launch_keys<T, 64>(from);
    if (dim <= 96) return launch_keys<T, 96>(from);
    if (dim <= 128) return extras ? launch_keys_twice<T, 128, 64, true>(from) : launch_sm80_backward_keys<T, 128, 32, true, true, false>(from);
    if (dim <= 192) return extras ? launch_keys_twice<T, 192, 16, true>(from) : launch_keys_twice<T, 192, 32, false>(from);
    return cudaErrorInvalidValue;
}
