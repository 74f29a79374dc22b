// attention backward: checks a call and hands it to the kernels of its dtype, first by queries, then by keys.
#include "../device_guard.cuh"
#include "dispatch.cuh"

namespace {

template <typename T>
cudaError_t backward(const fastattn_cuda_attention_gradient &from) {
    const bool wgmma = takes_sm90(from.call);
    const cudaError_t error = wgmma ? sm90_backward_queries<T>(from) : sm80_backward_queries<T>(from);
    if (error != cudaSuccess || from.call.len_k == 0) return error;
    return wgmma ? sm90_backward_keys<T>(from) : sm80_backward_keys<T>(from);
}

}  // namespace

extern "C" int fastattn_cuda_attention_backward(const fastattn_cuda_attention_gradient *from) {
    if (from->call.batch == 0 || from->call.heads_q == 0 || from->call.len_q == 0) return cudaSuccess;
    const DeviceGuard guard(from->call.device);
    if (guard.error() != cudaSuccess) return guard.error();
    switch (from->call.dtype) {
        case FASTATTN_BFLOAT16:
            return backward<bfloat16>(*from);
        case FASTATTN_FLOAT16:
            return backward<float16>(*from);
        default:
            return cudaErrorInvalidValue;
    }
}
