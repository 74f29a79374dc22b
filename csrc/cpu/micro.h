// The matrix micro-kernel under every CPU kernel: a tile of C, at most kTileRows x kTileVectors vectors, kept in registers over all of k.
//
//   C(r, lanes) (+)= sum_k A(r, k) * B(k, lanes)       C and B row-major in whole vectors, A broadcast one element at a time
//
// A is read where it lies: by rows (A(r, k) at a[r * lda + k]) or by columns (at a[k * lda + r]), so that attention needs no packed copy of
// K or V and a transposed operand costs nothing.
#pragma once
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

// With AVX-512 a full tile is 8 x 48: 24 accumulators, 3 vectors of B and one broadcast of the 32 registers; 11 loads for 24 fused
// multiply-adds a step. With 16 registers it is 4 x 3 vectors.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = 3;
constexpr int kTileWidth = kTileVectors * kLanes;

enum class Layout { rows, columns };

struct Left {
    const float *data;
    int64_t stride;  // between rows, or between columns
    Layout layout;
    bool pairs = false;
};

// C(m, vectors * kLanes) = A B, or += with accumulate, plus a row of `bias` if given; any m, any number of vectors.
//
// With `pairs` (bfloat16 units only) every element of A and B is a 32-bit word that holds two bfloat16 of consecutive k, low half first, and k
// counts words; k must be a multiple of kPairDepth, A and C must have room for m rounded up to kPairRows, and there is no bias.
void multiply(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, float *c, int64_t ldc, bool accumulate,
              const float *bias = nullptr);

// C(m, n) = A B^T for float32 rows of A and of B, without packing either: for few rows of A, where packing B would cost as much as the product.
// C has room for n rounded up to whole vectors.
void multiply_dots(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc);

#if defined(__AMX_BF16__)
// AMX: tiles of 16 x 16 words, A by rows only; 16 x 48 of C in three accumulator tiles.
constexpr bool kHasPairs = true;
constexpr bool kPairColumns = false;
constexpr int kPairRows = 16, kPairDepth = 16;
#elif defined(__AVX512BF16__)
// vdpbf16ps: the same tiles as float32.
constexpr bool kHasPairs = true;
constexpr bool kPairColumns = true;
constexpr int kPairRows = kTileRows, kPairDepth = 1;
#else
constexpr bool kHasPairs = false;
constexpr bool kPairColumns = true;
constexpr int kPairRows = kTileRows, kPairDepth = 1;
#endif

// Sets up the matrix unit of the calling thread for multiply() with pairs, and gives it back; free where there is nothing to set up.
struct MatrixUnit {
    MatrixUnit();
    ~MatrixUnit();
};

FASTATTN_NAMESPACE_END
