#include "sm80_forward_dtype.cuh"

template cudaError_t sm80_forward<bfloat16>(const fastattn_cuda_attention &call);
