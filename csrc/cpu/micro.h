// The matrix micro-kernel under every CPU kernel: a tile of C, at most kTileRows x kTileVectors vectors, kept in registers over all of k.
//
//   C(r, lanes) (+)= sum_k A(r, k) * B(k, lanes)       C and B row-major in whole vectors, A broadcast one element at a time
//
// A is read where it lies: by rows (A(r, k) at a[r * lda + k]) or by columns (at a[k * lda + r]), so that attention needs no packed copy of
// K or V and a transposed operand costs nothing.
#pragma once
#include "simd.h"

FASTATTN_NAMESPACE_BEGIN

// With 32 registers a full tile is 8 x 3 vectors: 24 accumulators, 3 vectors of B and one broadcast; 11 loads for 24 fused multiply-adds a
// step. With 16 it is 4 x 3 vectors.
constexpr int kTileRows = kManyRegisters ? 8 : 4;
constexpr int kTileVectors = 3;
constexpr int kTileWidth = kTileVectors * kLanes;

enum class Layout { rows, columns };

struct Left {
    const float *data;
    int64_t stride;  // between rows, or between columns; of blocked words between row blocks
    Layout layout;
    int parts = 0;  // 0: float32; 1 to 3: words of bfloat16 pairs (pairs.h), in so many parts
};

// Memory to bring into the level-2 cache during a product: so many lines with every block of k of every kWordRows rows.
struct Ahead {
    const float *data = nullptr;
    int64_t lines = 0;
};

// Rows of a tensor to bring into the level-2 cache, `each` of them at a time: processors wait for bursts of prefetches, or drop them.
struct RowsAhead {
    const char *row = nullptr;
    int64_t stride = 0, lines = 0;  // bytes from one row to the next, cache lines of one
    int64_t left = 0, each = 0;

    void step() {
        for (int64_t r = 0; r < each && left > 0; r++, left--, row += stride)
            for (int64_t line = 0; line < lines; line++) __builtin_prefetch(row + line * 64, 0, 2);
    }
};

// The same without bursts: a part of a row, `each` bytes of it, with every k of every whole tile of C. With AVX-512, by an A in rows.
struct PartsAhead {
    const char *row = nullptr;
    int64_t stride = 0, left = 0;  // bytes from one row to the next; rows
    int64_t each = 0;
    int shift = 0;  // a row has 2^shift parts

    const char *at(int64_t k) const { return row + (k >> shift) * stride + (k & ((1 << shift) - 1)) * each; }
    void step(int64_t k) { row += (k >> shift) * stride, left -= k >> shift; }
};

// What a product fetches, whole rows with every kTileRows rows of C; the next product goes on with what is left.
struct Fetches {
    RowsAhead rows[2];
    PartsAhead parts = {};
};

// C(m, vectors * kLanes) = A B, or += with accumulate, plus a row of `bias` if given; any m, any number of vectors.
//
// With words, k counts words and is a multiple of kWordDepth, C has room for m rounded up to kWordRows, vectors is at most kWordVectors, and there
// is no bias. kWordBlocks: A and B lie in blocks of 16 x 16 words, one after the other: A by row block, k block, part; B by k block, part,
// vector (kWordVectors of them, whatever `vectors` is), and meanwhile `ahead` is fetched, but no `fetches`. Otherwise as float32.
void multiply(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, float *c, int64_t ldc, bool accumulate,
              const float *bias = nullptr, Ahead ahead = {}, Fetches *fetches = nullptr);

// With AMX words of either operand may lie in rows of any stride as well: A(r, word) at a[r * lda + word], of which whole groups of 16 rows are read,
// and B(word, lane) at b[word * ldb + lane]. k is a multiple of kWordDepth; `fetches` as above.
void multiply_word_rows(int64_t m, int64_t vectors, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                        bool accumulate, Fetches *fetches = nullptr);

#if defined(__AMX_BF16__)
// AMX: blocks of 16 x 16 words; 32 x 32 of C in four accumulator tiles. Fast enough to make float16 of three products and float32 of six.
constexpr int kBfloat16Parts = 1, kFloat16Parts = 2, kFloat32Parts = 3;
constexpr bool kWordBlocks = true;
constexpr int kWordRows = 32, kWordVectors = 2, kWordDepth = 16;
#elif defined(__AVX512BF16__)
// vdpbf16ps: the same tiles as float32.
constexpr int kBfloat16Parts = 1, kFloat16Parts = 0, kFloat32Parts = 0;
constexpr bool kWordBlocks = false;
constexpr int kWordRows = kTileRows, kWordVectors = kTileVectors, kWordDepth = 1;
#define FASTATTN_ROUNDS_TILES 1

// The product of words and the row of `bias`, rounded to bfloat16: C has room for whole vectors.
void multiply_to_bfloat16(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, uint16_t *c, int64_t ldc, const float *bias,
                          Fetches *fetches);
#else
constexpr int kBfloat16Parts = 0, kFloat16Parts = 0, kFloat32Parts = 0;
constexpr bool kWordBlocks = false;
constexpr int kWordRows = kTileRows, kWordVectors = kTileVectors, kWordDepth = 1;
#endif

// Sets up the matrix unit of the calling thread for products of words, and gives it back; free where there is nothing to set up.
struct MatrixUnit {
    explicit MatrixUnit(bool used = true);
    ~MatrixUnit();
    MatrixUnit(const MatrixUnit &) = delete;
    MatrixUnit &operator=(const MatrixUnit &) = delete;

    const bool used;
};

FASTATTN_NAMESPACE_END
