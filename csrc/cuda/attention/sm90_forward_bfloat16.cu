#include "sm90_forward_dtype.cuh"

template cudaError_t sm90_forward<bfloat16>(const fastattn_cuda_attention &call);
