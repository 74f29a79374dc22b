// cp.async: 16 bytes from global to shared memory, behind the threads' back, in groups that a thread waits for.
#pragma once
#include <cuda_runtime.h>

#include "memory.cuh"

// 16 bytes to to[to_at ...] from from[from_at ...], both aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void copy_async(const Shared<T> &to, int to_at, const Global<const T> &from, int64_t from_at) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address(to_at)), "l"(from.address() + from_at) : "memory");
}
// Closes the group of the copies issued so far.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most LEFT groups of this thread are under way. Other threads' data needs a barrier on top.
template <int LEFT>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
