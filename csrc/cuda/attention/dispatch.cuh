// Which kernel runs a call; defined per dtype in files of their own.
#pragma once
#include <primitives/numeric.cuh>

#include "../library.h"

template <typename T>
cudaError_t sm80_forward(const fastattn_cuda_attention &call);
template <typename T>
cudaError_t sm80_decode(const fastattn_cuda_decode &call);
