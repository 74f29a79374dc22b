// See micro.h.
#include "micro.h"

#include <type_traits>

FASTATTN_NAMESPACE_BEGIN
namespace {

struct Product {
    FASTATTN_INLINE vfloat step(vfloat acc, float a, vfloat b) {
#if defined(__FMA__) && !defined(__AVX512F__) && !defined(FASTATTN_EMULATE)
        // By name: GCC 16 rounds twice in tiles of 1 x 1 and once in others, and bits would depend on how rows are shared out.
        return (vfloat)_mm256_fmadd_ps((__m256)broadcast(a), (__m256)b, (__m256)acc);
#else
        return acc + broadcast(a) * b;
#endif
    }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
struct PairProduct {
    FASTATTN_INLINE vfloat step(vfloat acc, float a, vfloat b) {
        int32_t word;
        __builtin_memcpy(&word, &a, sizeof word);
        return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
    }
};
#endif

constexpr int64_t kFetchDepth = 192;
constexpr int kUnrolledSteps = kManyRegisters && kLanes == 4 ? 2 : 4;  // Clang loads four steps of AArch64's full tile at once, past its registers

// Where a tile's operands and result lie, the result as float32 or as bfloat16.
template <class Result>
struct Tile {
    const float *a;
    int64_t lda;
    const float *b;
    int64_t ldb;
    Result *c;
    int64_t ldc;
    const float *bias;
};

template <int Rows, int Vectors>
FASTATTN_INLINE void store_tile(float *c, int64_t ldc, const vfloat (&sums)[Rows][Vectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; v++) store(c + r * ldc + v * kLanes, sums[r][v]);
}

#if defined(FASTATTN_ROUNDS_TILES)
// Two vectors to a store. Subnormal sums, which the instructions would make 0, are looked for once for all.
template <int Rows, int Vectors>
FASTATTN_INLINE void store_tile(uint16_t *c, int64_t ldc, const vfloat (&sums)[Rows][Vectors]) {
    constexpr int kSubnormal = 0x20;
    __mmask16 subnormal = 0;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; v++) subnormal |= _mm512_fpclass_ps_mask((__m512)sums[r][v], kSubnormal);
    if (__builtin_expect(subnormal != 0, 0)) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 3
            for (int v = 0; v < Vectors; v++) store_any(c + r * ldc + v * kLanes, FASTATTN_BFLOAT16, sums[r][v], kLanes);
        return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
        uint16_t *row = c + r * ldc;
        if constexpr (Vectors > 1) {
            const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)sums[r][1], (__m512)sums[r][0]);
            __builtin_memcpy(row, &pair, sizeof pair);
        }
        if constexpr (Vectors != 2) {
            const __m256bh last = _mm512_cvtneps_pbh((__m512)sums[r][Vectors - 1]);
            __builtin_memcpy(row + (Vectors - 1) * kLanes, &last, sizeof last);
        }
    }
}
#endif

template <class Operation, Layout layout, int Rows, int Vectors, bool fetching = false, class Result = float>
void fixed_tile(const Tile<Result> &t, int64_t k, bool accumulate, [[maybe_unused]] PartsAhead ahead = {}) {
    // C may be far away: its lines are fetched while the sums are formed, where that takes long enough.
    if (k >= kFetchDepth)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; v++) __builtin_prefetch(t.c + r * t.ldc + v * kLanes, 1);
    vfloat acc[Rows][Vectors] = {};
#pragma GCC unroll kUnrolledSteps
    for (int64_t i = 0; i < k; i++) {
        if constexpr (fetching) __builtin_prefetch(ahead.at(i), 0, 2);
        vfloat bv[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; v++) bv[v] = load(t.b + i * t.ldb + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const float av = layout == Layout::rows ? t.a[r * t.lda + i] : t.a[i * t.lda + r];
#pragma GCC unroll 3
            for (int v = 0; v < Vectors; v++) acc[r][v] = Operation::step(acc[r][v], av, bv[v]);
        }
    }
    if (t.bias)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; v++) {
            const vfloat bias = load(t.bias + v * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) acc[r][v] += bias;
        }
    // C is added last, not used as the start: long sums over k in blocks then keep the accuracy of blocked summation.
    if constexpr (std::is_same_v<Result, float>) {
        if (accumulate)
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++)
#pragma GCC unroll 3
                for (int v = 0; v < Vectors; v++) acc[r][v] += load(t.c + r * t.ldc + v * kLanes);
    }
    store_tile(t.c, t.ldc, acc);
}

template <class Operation, Layout layout, int Rows, class Result>
void any_tile(const Tile<Result> &t, int rows, int vectors, int64_t k, bool accumulate) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return any_tile<Operation, layout, Rows - 1>(t, rows, vectors, k, accumulate);
    }
    if (vectors == 1) fixed_tile<Operation, layout, Rows, 1>(t, k, accumulate);
    else if (vectors == 2) fixed_tile<Operation, layout, Rows, 2>(t, k, accumulate);
    else fixed_tile<Operation, layout, Rows, 3>(t, k, accumulate);
}

#if defined(__AMX_BF16__)
// Tiles 0 to 3 are accumulators (upper rows left and right, lower rows left and right), 4 and 5 hold the two row blocks of A, 6 and 7 the two
// column blocks of B. A macro because the intrinsics take tile numbers as literals; loads stand between the products that they do not wait for.
// A of one part or two goes by once for each strip of B, which should stay in the level-1 cache: 7.4 ns a block product in place of 10 at a depth of 512. Of
// three parts one is read again.
#define FASTATTN_LOAD_LEFT(part)                             \
    if constexpr (parts < 3) {                               \
        _tile_stream_loadd(4, upper + (part) * kBlock, 64);  \
        _tile_stream_loadd(5, lower + (part) * kBlock, 64);  \
    } else {                                                 \
        _tile_loadd(4, upper + (part) * kBlock, 64);         \
        _tile_loadd(5, lower + (part) * kBlock, 64);         \
    }
#define FASTATTN_LOAD_RIGHT(part)                                   \
    _tile_loadd(6, b + (part) * kWordVectors * kBlock, 64);         \
    if constexpr (Vectors > 1) _tile_loadd(7, b + ((part) * kWordVectors + 1) * kBlock, 64)
#define FASTATTN_MULTIPLY                              \
    _tile_dpbf16ps(0, 4, 6);                           \
    if constexpr (Vectors > 1) _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6);                           \
    if constexpr (Vectors > 1) _tile_dpbf16ps(3, 5, 7)

// The accumulator tiles from C, or from nothing, and back: 16 Rows x 16 Vectors of it.
template <int Rows, int Vectors>
FASTATTN_INLINE void start_sums(const float *c, int64_t ldc, bool from_c) {
    if (!from_c) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, c, ldc * 4);
    if constexpr (Vectors > 1) _tile_loadd(1, c + kLanes, ldc * 4);
    if constexpr (Rows > 1) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if constexpr (Rows > 1 && Vectors > 1) _tile_loadd(3, c + 16 * ldc + kLanes, ldc * 4);
}

template <int Rows, int Vectors>
FASTATTN_INLINE void store_sums(float *c, int64_t ldc) {
    _tile_stored(0, c, ldc * 4);
    if constexpr (Vectors > 1) _tile_stored(1, c + kLanes, ldc * 4);
    if constexpr (Rows > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
    if constexpr (Rows > 1 && Vectors > 1) _tile_stored(3, c + 16 * ldc + kLanes, ldc * 4);
}

template <int Vectors, int parts>
void matrix_tile(const float *upper, const float *lower, const float *b, int64_t k, float *c, int64_t ldc, bool accumulate, Ahead ahead) {
    constexpr int64_t kBlock = 256;
    // Parts of float32 are added to C last, which keeps the accuracy of blocked summation; to what becomes a half it makes no difference.
    start_sums<2, Vectors>(c, ldc, accumulate && parts < 3);
    for (int64_t i = 0; i < k; i += kWordDepth) {
        for (int64_t line = 0; line < ahead.lines; line++) __builtin_prefetch(ahead.data + line * 16, 0, 2);
        ahead.data += ahead.lines * 16;
        FASTATTN_LOAD_LEFT(0)
        if constexpr (parts == 3) {  // the smallest products first, each with one operand of the one before
            FASTATTN_LOAD_RIGHT(2);
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_RIGHT(1);
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_LEFT(1)
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_RIGHT(0);
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_LEFT(2)
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_LEFT(0)
            FASTATTN_MULTIPLY;
        } else if constexpr (parts == 2) {
            FASTATTN_LOAD_RIGHT(1);
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_RIGHT(0);
            FASTATTN_MULTIPLY;
            FASTATTN_LOAD_LEFT(1)
            FASTATTN_MULTIPLY;
        } else {
            FASTATTN_LOAD_RIGHT(0);
            FASTATTN_MULTIPLY;
        }
        upper += parts * kBlock;
        lower += parts * kBlock;
        b += parts * kWordVectors * kBlock;
    }
    const bool added_last = accumulate && parts == 3;
    float sums[kWordRows * kWordVectors * kLanes];
    float *target = added_last ? sums : c;
    const int64_t ld = added_last ? kWordVectors * kLanes : ldc;
    store_sums<2, Vectors>(target, ld);
    for (int r = 0; added_last && r < kWordRows; r++)
        for (int v = 0; v < Vectors; v++) add_to(c + r * ldc + v * kLanes, load(sums + (r * kWordVectors + v) * kLanes));
}

template <int parts>
void matrix_tiles(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, float *c, int64_t ldc, bool accumulate, Ahead ahead) {
    for (int64_t row = 0; row < m; row += kWordRows) {
        // The lower half may lie past m: it is then computed from the upper one, into rows that nobody reads.
        const float *upper = a.data + row / 16 * a.stride, *lower = row + 16 < m ? upper + a.stride : upper;
        if (vectors == 1) matrix_tile<1, parts>(upper, lower, b, k, c + row * ldc, ldc, accumulate, ahead);
        else matrix_tile<2, parts>(upper, lower, b, k, c + row * ldc, ldc, accumulate, ahead);
        ahead.data += k / kWordDepth * ahead.lines * 16;
    }
}

// Rows x Vectors tiles of C, 16 x 16 each, of operands in rows.
template <int Rows, int Vectors>
void row_tile(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t k, float *c, int64_t ldc, bool accumulate) {
    const float *lower = a + (Rows - 1) * 16 * lda;
    start_sums<Rows, Vectors>(c, ldc, accumulate);
    for (int64_t i = 0; i < k; i += kWordDepth) {
        _tile_loadd(4, a + i, lda * 4);
        _tile_loadd(6, b + i * ldb, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Vectors > 1) {
            _tile_loadd(7, b + i * ldb + kLanes, ldb * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Rows > 1) {
            _tile_loadd(5, lower + i, lda * 4);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Vectors > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums<Rows, Vectors>(c, ldc);
}

// Of a last tile of fewer than 16 rows C holds no more than those. They are summed as in a whole one, however rows are shared out.
template <int Vectors>
void last_row_tile(int64_t rows, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t k, float *c, int64_t ldc, bool accumulate) {
    constexpr int64_t kWidth = Vectors * kLanes;
    alignas(64) float sums[16 * kWidth];
    for (int64_t r = 0; accumulate && r < rows; r++) memcpy(sums + r * kWidth, c + r * ldc, kWidth * 4);
    __asm__ volatile("" : : "r"(sums) : "memory");  // GCC does not know that tiles are loaded from there
    row_tile<1, Vectors>(a, lda, b, ldb, k, sums, kWidth, accumulate);
    for (int64_t r = 0; r < rows; r++) memcpy(c + r * ldc, sums + r * kWidth, kWidth * 4);
}

template <int Vectors>
void row_tiles(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, bool accumulate, Fetches *fetches) {
    for (int64_t row = 0; row < m; row += 32) {
        for (int64_t i = row; fetches && i < smaller(row + 32, m); i += kTileRows)
            for (RowsAhead &rows : fetches->rows) rows.step();
        const float *left = a + row * lda;
        float *target = c + row * ldc;
        if (m - row >= 32) {
            row_tile<2, Vectors>(left, lda, b, ldb, k, target, ldc, accumulate);
            continue;
        }
        if (m - row >= 16) row_tile<1, Vectors>(left, lda, b, ldb, k, target, ldc, accumulate);
        const int64_t done = (m - row) / 16 * 16;
        if (m - row > done) last_row_tile<Vectors>(m - row - done, left + done * lda, lda, b, ldb, k, target + done * ldc, ldc, accumulate);
    }
}
#endif

// Columns outermost: one strip of B serves all rows of A before the next is touched.
template <class Operation, Layout layout, class Result>
void all_tiles(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, Result *c, int64_t ldc, bool accumulate, const float *bias,
               Fetches *fetches) {
    for (int64_t v = 0; v < vectors; v += kTileVectors)
        for (int64_t row = 0; row < m; row += kTileRows) {
            if (fetches)
                for (RowsAhead &rows : fetches->rows) rows.step();
            const float *left = a.data + (layout == Layout::rows ? row * a.stride : row);
            const Tile<Result> tile{left, a.stride, b + v * kLanes, ldb, c + row * ldc + v * kLanes, ldc, bias ? bias + v * kLanes : nullptr};
            if constexpr (kLanes == 16 && layout == Layout::rows) {
                const bool is_whole = m - row >= kTileRows && vectors - v >= kTileVectors;
                if (is_whole && fetches && fetches->parts.left > 0) {
                    fixed_tile<Operation, layout, kTileRows, kTileVectors, true>(tile, k, accumulate, fetches->parts);
                    fetches->parts.step(k);
                    continue;
                }
            }
            any_tile<Operation, layout, kTileRows>(tile, (int)smaller(kTileRows, m - row), (int)smaller(kTileVectors, vectors - v), k, accumulate);
        }
}

template <class Operation, class Result>
void both_layouts(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, Result *c, int64_t ldc, bool accumulate, const float *bias,
                  Fetches *fetches) {
    if (a.layout == Layout::rows) all_tiles<Operation, Layout::rows>(m, vectors, k, a, b, ldb, c, ldc, accumulate, bias, fetches);
    else all_tiles<Operation, Layout::columns>(m, vectors, k, a, b, ldb, c, ldc, accumulate, bias, fetches);
}

}  // namespace

#if defined(__AMX_BF16__)
MatrixUnit::MatrixUnit(bool is_used) : used(is_used) {
    if (!used) return;
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    // GCC's intrinsic names only the first bytes as its input: without this the rest would not be written before it.
    __asm__ volatile("" : : "r"(&layout) : "memory");
    _tile_loadconfig(&layout);
}
MatrixUnit::~MatrixUnit() {
    if (used) _tile_release();
}
#else
MatrixUnit::MatrixUnit(bool is_used) : used(is_used) {}
MatrixUnit::~MatrixUnit() {}
#endif

void multiply(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, float *c, int64_t ldc, bool accumulate, const float *bias,
              [[maybe_unused]] Ahead ahead, Fetches *fetches) {
#if defined(__AMX_BF16__)
    if (a.parts == 1) return matrix_tiles<1>(m, vectors, k, a, b, c, ldc, accumulate, ahead);
    if (a.parts == 2) return matrix_tiles<2>(m, vectors, k, a, b, c, ldc, accumulate, ahead);
    if (a.parts == 3) return matrix_tiles<3>(m, vectors, k, a, b, c, ldc, accumulate, ahead);
#elif defined(__AVX512BF16__)
    if (a.parts) return both_layouts<PairProduct>(m, vectors, k, a, b, ldb, c, ldc, accumulate, nullptr, fetches);
#endif
    both_layouts<Product>(m, vectors, k, a, b, ldb, c, ldc, accumulate, bias, fetches);
}

#if defined(FASTATTN_ROUNDS_TILES)
void multiply_to_bfloat16(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, int64_t ldb, uint16_t *c, int64_t ldc, const float *bias,
                          Fetches *fetches) {
    both_layouts<PairProduct>(m, vectors, k, a, b, ldb, c, ldc, false, bias, fetches);
}
#endif

#if defined(__AMX_BF16__)
void multiply_word_rows(int64_t m, int64_t vectors, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                        bool accumulate, Fetches *fetches) {
    for (int64_t v = 0; v < vectors; v += 2) {
        if (vectors - v == 1) row_tiles<1>(m, k, a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc, accumulate, fetches);
        else row_tiles<2>(m, k, a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc, accumulate, fetches);
    }
}
#endif

FASTATTN_NAMESPACE_END
