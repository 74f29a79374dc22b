// attention_decode: checks a call and hands it to the kernel of its dtype.
#include "../device_guard.cuh"
#include "dispatch.cuh"

extern "C" int fastattn_cuda_attention_decode(const fastattn_cuda_decode *call) {
    const fastattn_decode &problem = call->problem;
    if (problem.batch == 0 || problem.heads_q == 0 || problem.len_q == 0) return cudaSuccess;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    switch (problem.dtype) {
        case FASTATTN_BFLOAT16:
            return sm80_decode<bfloat16>(*call);
        case FASTATTN_FLOAT16:
            return sm80_decode<float16>(*call);
        default:
            return cudaErrorInvalidValue;
    }
}
