#include "sm90_forward_dtype.cuh"

template cudaError_t sm90_forward<float16>(const fastattn_cuda_attention &call);
