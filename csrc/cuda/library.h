// The C interface of libfastattn_cuda.so: device pointers, shapes, a device and a stream. Nothing here knows torch or Python.
//
// Functions return a cudaError_t as int, 0 for success; fastattn_cuda_error_text() names it. Each sets the device it is given
// and restores the one that was current, launches on the given stream only and allocates nothing, so a graph may capture it.
#pragma once
#include <stdint.h>

#include "../common/problem.h"

#define FASTATTN_CUDA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    char name[256];
    int32_t capability_major, capability_minor;
    int32_t multiprocessors;
    int64_t memory_bytes;
} fastattn_cuda_device;

// y = act(x + bias), pre = x + bias; x, y, pre (rows, cols) contiguous, of one dtype; arithmetic in float32.
typedef struct {
    int32_t device;
    void *stream;
    int32_t dtype;
    int32_t activation;
    int64_t rows, cols;
    const void *x;
    const void *bias;  // (cols), of the dtype of x, or null
    void *y;           // may be x itself
    void *pre;         // null: not wanted
} fastattn_cuda_bias_act;

FASTATTN_CUDA_API const char *fastattn_cuda_error_text(int error);
// The architectures of the compiled kernels, comma-separated: "sm_80,compute_90" is machine code for 8.x and PTX for 9.0 on.
FASTATTN_CUDA_API const char *fastattn_cuda_architectures(void);
FASTATTN_CUDA_API int fastattn_cuda_device_count(int *count);
FASTATTN_CUDA_API int fastattn_cuda_device_query(int index, fastattn_cuda_device *device);
FASTATTN_CUDA_API int fastattn_cuda_linear_act(const fastattn_cuda_bias_act *call);

#ifdef __cplusplus
}
#endif
