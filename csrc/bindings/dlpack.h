// The part of DLPack's C interface, version 1, by which a tensor of another library is read where it lies (https://dmlc.github.io/dlpack).
#pragma once
#include <cstdint>

struct DLPackTensor {
    void *data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t code, bits;  // of the dtype
    uint16_t lanes;
    int64_t *shape, *strides;  // in elements
    uint64_t byte_offset;
};

constexpr int32_t kDLPackCpu = 1;
constexpr uint8_t kDLPackInt = 0, kDLPackFloat = 2, kDLPackBfloat = 4, kDLPackBool = 6;

// Type attribute __dlpack_c_exchange_api__, a capsule of this name; the functions that are not used here have no types.
constexpr const char *kDLPackExchangeName = "dlpack_exchange_api";
constexpr uint32_t kDLPackMajor = 1;

using ReadTensor = int (*)(void *tensor, DLPackTensor *out);  // borrowed; 0, or -1 with a Python exception set

struct DLPackExchange {
    uint32_t major, minor;
    DLPackExchange *previous;  // that of an older major version, or null
    void *allocate, *share, *take;
    ReadTensor read;  // may be null
    void *current_stream;
};
