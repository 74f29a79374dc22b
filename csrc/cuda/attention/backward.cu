// attention backward: checks a call and hands it to the kernels of its dtype, first by queries, then by keys.
#include "../device_guard.cuh"
#include "dispatch.cuh"

namespace {

template <typename T>
cudaError_t backward(const fastattn_cuda_attention_gradient &from) {
    const cudaError_t error = takes_sm90(from.call) ? sm90_backward_queries<T>(from) : sm80_backward_queries<T>(from);
    return error != cudaSuccess || from.call.len_k == 0 ? error : sm80_backward_keys<T>(from);
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
