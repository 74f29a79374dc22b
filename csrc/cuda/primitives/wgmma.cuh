// wgmma m64nNk16 on half types with float32 accumulators: products of four warps together, asynchronous, for sm_90a alone.
//
// Warp w of a warpgroup has rows 16 w to 16 w + 15 of a and c, as fragments that lie as those of mma.cuh: c[n] is column tile n of eight, and the
// left operand, where it comes from registers, one 16 x 16 fragment. Operands in shared memory are given as a SwizzledMatrix.
// Operations run in groups, behind the threads' back: between issue and the wait for their group their registers belong to them, and so does the
// shared memory that they read. What threads wrote to that memory comes before them by wgmma_share(), in each thread that wrote, and a barrier.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "memory.cuh"
#include "numeric.cuh"

constexpr int WARPGROUP = 128;

// A matrix of 16-bit elements in shared memory, in panels of 64 elements along the direction in which they are contiguous. A row of a panel has 128
// bytes, and its chunks of 16 bytes are exchanged by the row: chunk c of row r lies at c ^ r % 8. Panels begin at multiples of 1024 bytes.
// first: element 0 of the first row, a multiple of 16 columns in. panel_bytes: from one panel to the next.
struct SwizzledMatrix {
    uint64_t bits;

    template <typename T>
    __device__ __forceinline__ SwizzledMatrix(const Shared<T> &tile, int first, int panel_bytes)
        // The address is a multiple of 16 below 2^18 and so is its sum with the offset: one addition of constants per operand of a tile.
        : bits(static_cast<uint64_t>(1024 >> 4 | 1 << 30) << 32 |  // eight rows to the next eight; swizzled by 128 bytes
               (tile.address(0) / 16 + static_cast<uint32_t>(first) * sizeof(T) / 16 +  // start
                (static_cast<uint32_t>(panel_bytes) / 16 << 16))) {}                    // leading dimension
};

// Registers that were written since come before the operations that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of the operations issued so far.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// What this thread wrote to shared memory becomes visible to the operations of those who meet it at a barrier behind this.
__device__ __forceinline__ void wgmma_share() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits until at most LEFT groups are under way; c, accumulators of a group that is complete, can then be read.
template <int LEFT, int N>
__device__ __forceinline__ void wgmma_wait(float (&c)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
    // The compiler sees the accumulators written where the operations were issued: it is told that they change here.
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

// Gives a warpgroup more registers, or fewer, than it was launched with; all of its threads call it.
template <int COUNT>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Operands of an asm statement: the accumulators of 4, 8 and 16 column tiles.
#define FASTATTN_TILE(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FASTATTN_TILES_4(n) FASTATTN_TILE(n), FASTATTN_TILE(n + 1), FASTATTN_TILE(n + 2), FASTATTN_TILE(n + 3)
#define FASTATTN_TILES_8 FASTATTN_TILES_4(0), FASTATTN_TILES_4(4)
#define FASTATTN_TILES_16 FASTATTN_TILES_8, FASTATTN_TILES_4(8), FASTATTN_TILES_4(12)
#define FASTATTN_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
    "%30, %31"
#define FASTATTN_REGISTERS_64 \
    FASTATTN_REGISTERS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63"
// c = a b^T, or c += where `add` says so: both operands in shared memory, by rows.
#define FASTATTN_WGMMA_SHARED(TYPES, N, REGISTERS, A, B, ADD, TILES)                                       \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPES " {" REGISTERS "}, " A ", " B ", add, 1, 1, 0, 0;\n}" \
                 : TILES                                                                                   \
                 : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(add)))
#define FASTATTN_SHARED_64(TYPES) FASTATTN_WGMMA_SHARED(TYPES, "64", FASTATTN_REGISTERS_32, "%32", "%33", "%34", FASTATTN_TILES_8)
#define FASTATTN_SHARED_128(TYPES) FASTATTN_WGMMA_SHARED(TYPES, "128", FASTATTN_REGISTERS_64, "%64", "%65", "%66", FASTATTN_TILES_16)
// c += a b: a in registers, b in shared memory by rows.
#define FASTATTN_WGMMA_REGISTERS(TYPES, N, REGISTERS, A, B, TILES)                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPES " {" REGISTERS "}, {" A "}, " B ", 1, 1, 1, 1;" \
                 : TILES                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits))
#define FASTATTN_REGISTERS_BY_64(TYPES) \
    FASTATTN_WGMMA_REGISTERS(TYPES, "64", FASTATTN_REGISTERS_32, "%32, %33, %34, %35", "%36", FASTATTN_TILES_8)
#define FASTATTN_REGISTERS_BY_128(TYPES) \
    FASTATTN_WGMMA_REGISTERS(TYPES, "128", FASTATTN_REGISTERS_64, "%64, %65, %66, %67", "%68", FASTATTN_TILES_16)
// The instruction of N column tiles and type T.
#define FASTATTN_WGMMA_OF(BY_64, BY_128)                                     \
    static_assert(N == 8 || N == 16);                                        \
    if constexpr (N == 8 && __is_same(T, float16)) BY_64("f16.f16");         \
    if constexpr (N == 8 && !__is_same(T, float16)) BY_64("bf16.bf16");      \
    if constexpr (N == 16 && __is_same(T, float16)) BY_128("f16.f16");       \
    if constexpr (N == 16 && !__is_same(T, float16)) BY_128("bf16.bf16")

// c = a b^T + (add ? c : 0), for 64 rows of a and N times eight of b, 16 columns of both.
template <typename T, int N>
__device__ __forceinline__ void wgmma_transposed(float (&c)[N][4], const SwizzledMatrix &a, const SwizzledMatrix &b, bool add) {
    FASTATTN_WGMMA_OF(FASTATTN_SHARED_64, FASTATTN_SHARED_128);
}

// c += a b, for 16 rows of b and N tiles of eight of its columns.
template <typename T, int N>
__device__ __forceinline__ void wgmma(float (&c)[N][4], const uint32_t (&a)[4], const SwizzledMatrix &b) {
    FASTATTN_WGMMA_OF(FASTATTN_REGISTERS_BY_64, FASTATTN_REGISTERS_BY_128);
}

#undef FASTATTN_TILE
#undef FASTATTN_TILES_4
#undef FASTATTN_TILES_8
#undef FASTATTN_TILES_16
#undef FASTATTN_REGISTERS_32
#undef FASTATTN_REGISTERS_64
#undef FASTATTN_WGMMA_SHARED
#undef FASTATTN_SHARED_64
#undef FASTATTN_SHARED_128
#undef FASTATTN_WGMMA_REGISTERS
#undef FASTATTN_REGISTERS_BY_64
#undef FASTATTN_REGISTERS_BY_128
#undef FASTATTN_WGMMA_OF
