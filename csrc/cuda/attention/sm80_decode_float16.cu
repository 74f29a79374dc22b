#include "sm80_decode_dtype.cuh"

template cudaError_t sm80_decode<float16>(const fastattn_cuda_decode &call);
