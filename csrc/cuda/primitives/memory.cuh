// Global and shared memory as spans. On the device a span is its pointer; the emulation keeps the extent too and checks every access.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

// N consecutive elements, moved by one instruction where they have 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// `count` elements of global memory from `base` on.
template <typename T>
class Global {
public:
    Global() = default;
    __host__ __device__ Global(T *base, int64_t /* count */) : base_(base) {}
    __host__ __device__ explicit operator bool() const { return base_ != nullptr; }
    __host__ __device__ T *address() const { return base_; }

    __device__ __forceinline__ T get(int64_t at) const { return base_[at]; }
    __device__ __forceinline__ void set(int64_t at, T value) const { base_[at] = value; }
    // As many elements as fill a P, by one access.
    template <typename P>
    __device__ __forceinline__ P load_as(int64_t at) const {
        return *reinterpret_cast<const P *>(base_ + at);
    }
    template <typename P>
    __device__ __forceinline__ void store_as(int64_t at, const P &value) const {
        if constexpr (sizeof(P) == sizeof(uint4)) {
            // By name: what is assigned as a structure the compiler stores in four where it has lost sight of the alignment.
            uint4 words;
            memcpy(&words, &value, sizeof words);
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(base_ + at)), "r"(words.x), "r"(words.y), "r"(words.z),
                         "r"(words.w)
                         : "memory");
        } else {
            *reinterpret_cast<P *>(base_ + at) = value;
        }
    }
    template <int N>
    __device__ __forceinline__ Pack<T, N> load(int64_t at) const {
        return load_as<Pack<T, N>>(at);
    }
    template <int N>
    __device__ __forceinline__ void store(int64_t at, const Pack<T, N> &value) const {
        store_as(at, value);
    }
    // The same memory from element `at` on.
    __device__ __forceinline__ Global from(int64_t at) const { return Global(base_ + at, 0); }
    // The same memory in elements of another type.
    template <typename U>
    __device__ __forceinline__ Global<U> as() const {
        return Global<U>(reinterpret_cast<U *>(base_), 0);
    }

private:
    T *base_ = nullptr;
};

// `count` elements of shared memory.
template <typename T>
class Shared {
public:
    __device__ Shared(T *base, int /* count */) : base_(base) {}

    __device__ __forceinline__ T get(int at) const { return base_[at]; }
    __device__ __forceinline__ void set(int at, T value) const { base_[at] = value; }
    // As many elements as fill a P, by one access.
    template <typename P>
    __device__ __forceinline__ P load_as(int at) const {
        return *reinterpret_cast<const P *>(base_ + at);
    }
    template <int N>
    __device__ __forceinline__ Pack<T, N> load(int at) const {
        return load_as<Pack<T, N>>(at);
    }
    template <int N>
    __device__ __forceinline__ void store(int at, const Pack<T, N> &value) const {
        *reinterpret_cast<Pack<T, N> *>(base_ + at) = value;
    }
    // The same memory from element `at` on.
    __device__ __forceinline__ Shared from(int at) const { return Shared(base_ + at, 0); }
    // The same memory in elements of another type.
    template <typename U>
    __device__ __forceinline__ Shared<U> as() const {
        return Shared<U>(reinterpret_cast<U *>(base_), 0);
    }
    // What instructions that name shared memory take.
    __device__ __forceinline__ uint32_t address(int at) const { return static_cast<uint32_t>(__cvta_generic_to_shared(base_ + at)); }

private:
    T *base_;
};

// The dynamic shared memory of a block, given out front to back in pieces of whole 16 bytes. ALIGNMENT: of the first; operands of wgmma begin at
// multiples of 1024.
template <int ALIGNMENT = 128>
class SharedArena {
public:
    __device__ SharedArena() {
        extern __shared__ __align__(ALIGNMENT) unsigned char fastattn_dynamic_shared[];
        next_ = fastattn_dynamic_shared;
    }
    template <typename T>
    __device__ Shared<T> take(int count) {
        T *base = reinterpret_cast<T *>(next_);
        next_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
        return Shared<T>(base, count);
    }

private:
    unsigned char *next_;
};

// Static shared memory; a kernel that wants several arrays of one type and size numbers them.
template <typename T, int COUNT, int NUMBER = 0>
__device__ __forceinline__ Shared<T> static_shared() {
    __shared__ T storage[COUNT];
    return Shared<T>(storage, COUNT);
}

__device__ __forceinline__ float atomic_add(const Global<float> &to, int64_t at, float value) { return atomicAdd(to.address() + at, value); }
__device__ __forceinline__ int atomic_add(const Global<int> &to, int64_t at, int value) { return atomicAdd(to.address() + at, value); }
