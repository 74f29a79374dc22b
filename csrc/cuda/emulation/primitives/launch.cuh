// The emulation of primitives/launch.cuh: the whole grid runs before launch returns.
#pragma once
#include "../runtime.h"

struct Launch {
    const char *name;
    dim3 grid, block;
    int shared_bytes;
    void *stream;
    int most_shared_bytes = 0;
};

inline cudaError_t max_shared_bytes(int *bytes) {
    *bytes = emulation::shared_bytes_of_device();
    return cudaSuccess;
}

template <int THREADS, typename... Parameters, typename... Arguments>
cudaError_t launch(const Launch &how, void (*kernel)(Parameters...), const Arguments &...arguments) {
    if (how.block.x * how.block.y * how.block.z > THREADS) return cudaErrorInvalidConfiguration;
    if (how.most_shared_bytes != 0 && how.shared_bytes > how.most_shared_bytes) return cudaErrorInvalidValue;  // as cudaFuncSetAttribute does
    return emulation::run_grid(how.name, how.grid, how.block, how.shared_bytes, [&] { kernel(arguments...); });
}
