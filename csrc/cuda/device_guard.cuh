// Makes a device current for one call and restores the one before.
#pragma once
#include <cuda_runtime.h>

class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        error_ = cudaGetDevice(&previous_);
        if (error_ != cudaSuccess || previous_ == device) return;
        error_ = cudaSetDevice(device);
        changed_ = error_ == cudaSuccess;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

    cudaError_t error() const { return error_; }

private:
    int previous_ = 0;
    bool changed_ = false;
    cudaError_t error_;
};
