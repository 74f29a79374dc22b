// What threads do together: shuffles and votes of a full warp, barriers of a block.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

constexpr int WARP = 32;

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
__device__ __forceinline__ bool warp_any(bool value) { return __any_sync(0xFFFFFFFFu, value); }
__device__ __forceinline__ bool warp_all(bool value) { return __all_sync(0xFFFFFFFFu, value); }
__device__ __forceinline__ uint32_t warp_ballot(bool value) { return __ballot_sync(0xFFFFFFFFu, value); }
// The number of the lowest bit that is set; some bit is.
__device__ __forceinline__ int first_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ bool sync_block_or(bool value) { return __syncthreads_or(value); }
// Barriers 1 to 15 among `threads` threads, whole warps: one side waits, the other may only arrive.
__device__ __forceinline__ void sync_named(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ bool sync_named_or(int barrier, int threads, bool value) {
    int any;
    asm volatile(
        "{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %3, 0;\nbar.red.or.pred any, %1, %2, mine;\nselp.b32 %0, 1, 0, any;\n}"
        : "=r"(any)
        : "r"(barrier), "r"(threads), "r"(static_cast<int>(value))
        : "memory");
    return any != 0;
}
