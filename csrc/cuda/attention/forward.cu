// attention forward: checks a call and hands it to the kernel of its dtype. mma.sync serves every architecture so far.
#include "../device_guard.cuh"
#include "dispatch.cuh"

extern "C" int fastattn_cuda_attention_forward(const fastattn_cuda_attention *call) {
    // A packed batch without queries in its sequences may have rows of no sequence.
    const int64_t rows = call->cu_seqlens_q ? call->rows_q : call->len_q;
    if (call->batch == 0 || call->heads_q == 0 || rows == 0) return cudaSuccess;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    switch (call->dtype) {
        case FASTATTN_BFLOAT16:
            return sm80_forward<bfloat16>(*call);
        case FASTATTN_FLOAT16:
            return sm80_forward<float16>(*call);
        default:
            return cudaErrorInvalidValue;
    }
}
