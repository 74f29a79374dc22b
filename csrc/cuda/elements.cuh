// Rows of elements whose dtype is known at run time: eight at a time, by 16-byte accesses where rows and pointers allow it.
//
// One instance serves every mixture of dtypes, by a branch per eight elements that all threads take alike; where such instructions are what a
// kernel waits for, an instance of one DTYPE does without. Loading and widening are two steps, so that all loads of a thread can be under way
// before it needs the first.
#pragma once
#include <primitives/memory.cuh>
#include <primitives/numeric.cuh>

#include "../common/problem.h"

constexpr int CHUNK = 8;
constexpr int ANY_DTYPE = -1;  // as a DTYPE below: each tensor's own, known at run time

__host__ __device__ inline int64_t element_bytes(int dtype) { return dtype == FASTATTN_FLOAT32 ? 4 : 2; }

// A tensor of `count` elements; the default is an absent one.
class Elements {
public:
    Elements() = default;
    __host__ __device__ Elements(const void *data, int dtype, int64_t count)
        : bytes_(static_cast<unsigned char *>(const_cast<void *>(data)), data ? count * element_bytes(dtype) : 0), dtype_(dtype) {}
    __host__ __device__ explicit operator bool() const { return static_cast<bool>(bytes_); }
    __host__ __device__ bool aligned() const { return reinterpret_cast<uintptr_t>(bytes_.address()) % 16 == 0; }
    __host__ __device__ __forceinline__ int dtype() const { return dtype_; }
    __device__ __forceinline__ Global<float> floats() const { return bytes_.as<float>(); }
    __device__ __forceinline__ Global<uint16_t> halves() const { return bytes_.as<uint16_t>(); }
    __device__ __forceinline__ Global<uint32_t> words() const { return bytes_.as<uint32_t>(); }

private:
    Global<unsigned char> bytes_;
    int dtype_ = 0;
};

// Eight elements as they lie in memory; half dtypes fill four words.
struct RawChunk {
    Pack<uint32_t, 4> low, high;
};

struct Chunk {
    float at[CHUNK];
};

template <int DTYPE>
__host__ __device__ constexpr int known_dtype(int dtype) {
    return DTYPE == ANY_DTYPE ? dtype : DTYPE;
}

// Elements [at, at + count) and zeros behind them; count 8 (or at most 0) where VECTOR. DTYPE, here and below: the dtype where it is known when
// this is compiled; then nothing branches, and of a half one `high` costs no register.
template <bool VECTOR, int DTYPE = ANY_DTYPE>
__device__ __forceinline__ RawChunk load_raw(const Elements &from, int64_t at, int count) {
    RawChunk raw = {};
    if (count <= 0) return raw;
    const bool wide = known_dtype<DTYPE>(from.dtype()) == FASTATTN_FLOAT32;
    if constexpr (VECTOR) {
        if (wide) {
            raw.low = from.words().load<4>(at);
            raw.high = from.words().load<4>(at + 4);
        } else {
            raw.low = from.halves().load_as<Pack<uint32_t, 4>>(at);
        }
    } else if (wide) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const uint32_t word = i < count ? from.words().get(at + i) : 0;
            (i < 4 ? raw.low : raw.high).at[i % 4] = word;
        }
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const uint32_t half = i < count ? from.halves().get(at + i) : 0;
            raw.low.at[i / 2] |= half << (16 * (i % 2));
        }
    }
    return raw;
}

template <int DTYPE = ANY_DTYPE>
__device__ __forceinline__ Chunk widen(const RawChunk &raw, int dtype) {
    Chunk chunk;
    if (known_dtype<DTYPE>(dtype) == FASTATTN_FLOAT32) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            chunk.at[i] = bits_float(raw.low.at[i]);
            chunk.at[i + 4] = bits_float(raw.high.at[i]);
        }
    } else if (known_dtype<DTYPE>(dtype) == FASTATTN_BFLOAT16) {
#pragma unroll
        for (int i = 0; i < 4; i++) unpack_pair<bfloat16>(raw.low.at[i], chunk.at[2 * i], chunk.at[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) unpack_pair<float16>(raw.low.at[i], chunk.at[2 * i], chunk.at[2 * i + 1]);
    }
    return chunk;
}

template <int DTYPE = ANY_DTYPE>
__device__ __forceinline__ RawChunk narrow(const Chunk &chunk, int dtype) {
    RawChunk raw = {};
    if (known_dtype<DTYPE>(dtype) == FASTATTN_FLOAT32) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            raw.low.at[i] = float_bits(chunk.at[i]);
            raw.high.at[i] = float_bits(chunk.at[i + 4]);
        }
    } else if (known_dtype<DTYPE>(dtype) == FASTATTN_BFLOAT16) {
#pragma unroll
        for (int i = 0; i < 4; i++) raw.low.at[i] = pack_pair<bfloat16>(chunk.at[2 * i], chunk.at[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) raw.low.at[i] = pack_pair<float16>(chunk.at[2 * i], chunk.at[2 * i + 1]);
    }
    return raw;
}

template <bool VECTOR, int DTYPE = ANY_DTYPE>
__device__ __forceinline__ void store_raw(const Elements &to, int64_t at, int count, const RawChunk &raw) {
    if (count <= 0) return;
    const bool wide = known_dtype<DTYPE>(to.dtype()) == FASTATTN_FLOAT32;
    if constexpr (VECTOR) {
        if (wide) {
            to.words().store<4>(at, raw.low);
            to.words().store<4>(at + 4, raw.high);
        } else {
            to.halves().store_as(at, raw.low);
        }
    } else if (wide) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (i < count) to.words().set(at + i, (i < 4 ? raw.low : raw.high).at[i % 4]);
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (i < count) to.halves().set(at + i, static_cast<uint16_t>(raw.low.at[i / 2] >> (16 * (i % 2))));
    }
}

template <bool VECTOR, int DTYPE = ANY_DTYPE>
__device__ __forceinline__ Chunk load_chunk(const Elements &from, int64_t at, int count) {
    return widen<DTYPE>(load_raw<VECTOR, DTYPE>(from, at, count), from.dtype());
}

template <bool VECTOR, int DTYPE = ANY_DTYPE>
__device__ __forceinline__ void store_chunk(const Elements &to, int64_t at, int count, const Chunk &chunk) {
    store_raw<VECTOR, DTYPE>(to, at, count, narrow<DTYPE>(chunk, to.dtype()));
}
