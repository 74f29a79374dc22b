// Launching a kernel: on the caller's device and stream, nothing allocated, nothing waited for.
#pragma once
#include <cuda_runtime.h>

#include "../shared_limits.h"

struct Launch {
    const char *name;  // for the emulation's reports
    dim3 grid, block;
    int shared_bytes;  // dynamic shared memory
    void *stream;
    int most_shared_bytes = 0;  // what the device has, where launches of a kernel differ: asking is for all of them, and threads launch side by side
};

// How many bytes of shared memory a block of the present device may have, static and dynamic ones together.
inline cudaError_t max_shared_bytes(int *bytes) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error != cudaSuccess ? error : cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// kernel<<<...>>>(arguments...). THREADS is the kernel's launch bound.
template <int THREADS, typename... Parameters, typename... Arguments>
cudaError_t launch(const Launch &how, void (*kernel)(Parameters...), const Arguments &...arguments) {
    if (how.block.x * how.block.y * how.block.z > THREADS) return cudaErrorInvalidConfiguration;
    cudaGetLastError();  // what an earlier call left behind is not this one's, and was reported then
    if (asks_for_shared_bytes(how.shared_bytes)) {
        const int most = how.shared_bytes > how.most_shared_bytes ? how.shared_bytes : how.most_shared_bytes;
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (error != cudaSuccess) return error;
    }
    kernel<<<how.grid, how.block, how.shared_bytes, static_cast<cudaStream_t>(how.stream)>>>(arguments...);
    return cudaGetLastError();
}
