// attention forward: checks a call and hands it to the kernel of its dtype.
#include "../device_guard.cuh"
#include "dispatch.cuh"

namespace {

template <typename T>
cudaError_t forward(const fastattn_cuda_attention &call) {
    return takes_sm90(call) ? sm90_forward<T>(call) : sm80_forward<T>(call);
}

}  // namespace

extern "C" int fastattn_cuda_attention_forward(const fastattn_cuda_attention *call) {
    // A packed batch without queries in its sequences may have rows of no sequence.
    const int64_t rows = call->cu_seqlens_q ? call->rows_q : call->len_q;
    if (call->batch == 0 || call->heads_q == 0 || rows == 0) return cudaSuccess;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    switch (call->dtype) {
        case FASTATTN_BFLOAT16:
            return forward<bfloat16>(*call);
        case FASTATTN_FLOAT16:
            return forward<float16>(*call);
        default:
            return cudaErrorInvalidValue;
    }
}
