// Which kernel runs a call; defined per dtype in files of their own.
#pragma once
#include <primitives/numeric.cuh>

#include "../library.h"

template <typename T>
cudaError_t sm80_forward(const fastattn_cuda_attention &call);
template <typename T>
cudaError_t sm90_forward(const fastattn_cuda_attention &call);
template <typename T>
cudaError_t sm80_backward_queries(const fastattn_cuda_attention_gradient &from);
template <typename T>
cudaError_t sm90_backward_queries(const fastattn_cuda_attention_gradient &from);
template <typename T>
cudaError_t sm80_backward_keys(const fastattn_cuda_attention_gradient &from);
template <typename T>
cudaError_t sm90_backward_keys(const fastattn_cuda_attention_gradient &from);
template <typename T>
cudaError_t sm80_decode(const fastattn_cuda_decode &call);

// The widest head of the wgmma kernels: one panel more, and their accumulators find no registers.
constexpr int64_t SM90_DIM = 128;

// What decides between the instances: the wider of the two head dims, and whether the call needs what EXTRAS holds.
inline int64_t head_dim(const fastattn_cuda_attention &call) { return call.dim_qk > call.dim_v ? call.dim_qk : call.dim_v; }
inline bool needs_extras(const fastattn_cuda_attention &call) {
    const bool biased = call.bias.data || call.distance.table || call.distance.slopes;
    return call.softcap != 0.0f || biased || call.dropout.threshold != 0 || call.mask.dense.data || !(call.scale > 0.0f);
}
// Whether the wgmma kernels run a call: those that ask for them know the device.
inline bool takes_sm90(const fastattn_cuda_attention &call) { return call.kernels == 90 && head_dim(call) <= SM90_DIM; }
