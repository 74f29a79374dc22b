#include "sm90_backward_dtype.cuh"

template cudaError_t sm90_backward_keys<bfloat16>(const fastattn_cuda_attention_gradient &from);
