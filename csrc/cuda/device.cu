// What the machine has and what was compiled for it. A machine with no driver gets an error code here and nowhere else.
#include <cuda_runtime.h>

#include <cstring>

#include "library.h"

extern "C" const char *fastattn_cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" const char *fastattn_cuda_architectures(void) { return FASTATTN_CUDA_ARCHITECTURES; }

extern "C" int fastattn_cuda_device_count(int *count) { return cudaGetDeviceCount(count); }

extern "C" int fastattn_cuda_device_query(int index, fastattn_cuda_device *device) {
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, index);
    if (error != cudaSuccess) return error;
    static_assert(sizeof(device->name) == sizeof(properties.name), "device names have 256 bytes");
    std::memcpy(device->name, properties.name, sizeof(device->name));
    device->capability_major = properties.major;
    device->capability_minor = properties.minor;
    device->multiprocessors = properties.multiProcessorCount;
    device->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    return cudaSuccess;
}
