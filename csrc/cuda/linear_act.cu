// linear_act: bias and activation behind a matrix product.
//
// Contract   y = act(x + bias), optionally pre = x + bias. x, y, pre (rows, cols) contiguous, float32, bfloat16 or float16; bias (cols) of
//            the same dtype or null. y may be x. Any rows and cols, 0 included.
// Numerics   x + bias and the activation in float32, one rounding per output. gelu and its tanh form are written without 1 + erf and
//            1 + tanh, which would cancel for negative arguments.
// Algorithm  A thread owns 16 bytes of one row's columns, keeps their bias in registers and walks down the rows. Where cols or a pointer
//            is not a multiple of 16 bytes, the same kernel runs one element at a time.
// Measured   not yet: compiled for sm_80 and sm_90, never run on a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device_guard.cuh"
#include "library.h"

namespace {

constexpr int THREADS = 256;
constexpr int MAX_ROW_BLOCKS = 65535;
constexpr int BLOCKS_PER_CALL = 4096;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float x, float &out) { out = x; }
__device__ __forceinline__ void from_float(float x, __half &out) { out = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16 &out) { out = __float2bfloat16_rn(x); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// fmaxf would turn NaN into 0.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
        case FASTATTN_ACT_RELU:
            return relu(x);
        case FASTATTN_ACT_GELU:
            return 0.5f * x * erfcf(-0.70710678118654752f * x);
        case FASTATTN_ACT_GELU_TANH: {
            // 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
            const float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
            return x * sigmoid(2.0f * u);
        }
        case FASTATTN_ACT_SILU:
            return x * sigmoid(x);
        case FASTATTN_ACT_QUICK_GELU:
            return x * sigmoid(1.702f * x);
        case FASTATTN_ACT_RELU2:
            return relu(x) * relu(x);
        default:
            return x;
    }
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// Block (threads over columns, threads over rows); grid (column blocks, row blocks), rows in strides of the whole grid.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS) bias_act_kernel(const T *x, const T *bias, T *y, T *pre, int64_t rows, int64_t packs, int activation) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= packs) return;
    float added[N];
    for (int i = 0; i < N; ++i) added[i] = bias ? to_float(bias[column * N + i]) : 0.0f;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
    const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
    for (int64_t row = first; row < rows; row += step) {
        const int64_t at = row * packs + column;
        const Pack<T, N> in = reinterpret_cast<const Pack<T, N> *>(x)[at];
        Pack<T, N> sum, out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float value = to_float(in.at[i]) + added[i];
            from_float(value, sum.at[i]);
            from_float(activate(value, activation), out.at[i]);
        }
        if (pre) reinterpret_cast<Pack<T, N> *>(pre)[at] = sum;
        reinterpret_cast<Pack<T, N> *>(y)[at] = out;
    }
}

bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, int N>
cudaError_t launch(const fastattn_cuda_bias_act &call) {
    const int64_t packs = call.cols / N;
    int across = 1;
    while (across < THREADS && across < packs) across *= 2;
    const int down = THREADS / across;
    const int64_t column_blocks = (packs + across - 1) / across;
    const int64_t row_blocks = (call.rows + down - 1) / down;
    if (column_blocks > INT32_MAX) return cudaErrorInvalidValue;
    // Enough blocks to fill any device; beyond that a thread takes more rows and reuses its bias.
    int64_t wanted = BLOCKS_PER_CALL / column_blocks;
    if (wanted < 1) wanted = 1;
    if (wanted > row_blocks) wanted = row_blocks;
    if (wanted > MAX_ROW_BLOCKS) wanted = MAX_ROW_BLOCKS;
    const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>(wanted));
    bias_act_kernel<T, N><<<grid, dim3(across, down), 0, static_cast<cudaStream_t>(call.stream)>>>(
        static_cast<const T *>(call.x), static_cast<const T *>(call.bias), static_cast<T *>(call.y), static_cast<T *>(call.pre), call.rows,
        packs, call.activation);
    return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for(const fastattn_cuda_bias_act &call) {
    constexpr int N = 16 / sizeof(T);
    const bool wide = call.cols % N == 0 && aligned(call.x) && aligned(call.y) && aligned(call.pre);
    return wide ? launch<T, N>(call) : launch<T, 1>(call);
}

}  // namespace

extern "C" int fastattn_cuda_linear_act(const fastattn_cuda_bias_act *call) {
    if (call->rows == 0 || call->cols == 0) return cudaSuccess;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    switch (call->dtype) {
        case FASTATTN_FLOAT32:
            return launch_for<float>(*call);
        case FASTATTN_BFLOAT16:
            return launch_for<__nv_bfloat16>(*call);
        case FASTATTN_FLOAT16:
            return launch_for<__half>(*call);
        default:
            return cudaErrorInvalidValue;
    }
}
