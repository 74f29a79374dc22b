// mma.sync m16n8k16 on half types with float32 accumulators, and the ldmatrix that feeds it. With g = lane / 4 and t = lane % 4:
//   a[0], a[1]: rows g, g + 8, columns 2t, 2t + 1; a[2], a[3]: the same rows, columns 2t + 8, 2t + 9
//   b0, b1: column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
//   c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "memory.cuh"
#include "numeric.cuh"

// c += a b
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (__is_same(T, float16))
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices. Row r of matrix m starts at tile[at] of lane 8 m + r. fragment[m] holds row g, columns 2t, 2t + 1 of matrix m;
// transposed: rows 2t, 2t + 1 of column g.
template <typename T>
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const Shared<T> &tile, int at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(tile.address(at))
                 : "memory");
}
template <typename T>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const Shared<T> &tile, int at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(tile.address(at))
                 : "memory");
}
