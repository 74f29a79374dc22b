// See few_rows.h.
//
// Numerics: float32 sums. Where B lies by columns (a weight as nn.Linear keeps it), every lane of a vector sums its share of k; where it lies by rows
//   (transposed weights), sums over k are blocked (kDepth), as in gemm.cpp.
// Algorithm: by columns, dot products, a few rows and columns at a time, that share the loads of both. By rows, kRowsOfB rows at a time are added to sums
//   in the level-1 cache, so that B is read in the order of memory. While a row is read, the next ones are fetched. bfloat16 with AMX: see below.
//
// Ladder, 2,048 x 8,192 weights, GB/s of them read with 1 and 8 rows of A: float32 by columns, float32 by rows, bfloat16 by columns, bfloat16 by rows, on
// 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-26; torch 2.13 in the same runs: 26 7, 28 8, 20 2.6, 0.3 0.03.
//   42 22,  4  4,  10 6,  10 6   packed, but for float32 by columns
//   42 17, 35 15,  41 12, 39 11  read in place; float32 by columns is as before, the difference that of the machine from run to run
// Operands of dot products loaded into registers once, which GCC had loaded for every product (8 and 16 rows, float32, 512 x 512 weights in the caches):
//   60 and 92 us become 56 and 82; with AVX-512 27 loads for 24 products become 11.
// 12 and 16 rows of bfloat16: 2.0 and 1.4 times as fast as packed, 32 rows equal.
// bfloat16 by pairs (vdpbf16ps), both operands as they lie, us for 2,048 x 2,048 and 768 x 3,072 weights, 2 cores of an AMD EPYC (Zen 5, VM), 2026-11-27;
// torch 2.13 in the same runs:
//   1 row 253, 78      8 rows 281, 113      16 rows 349, 150
//         121, 73             235, 117             268, 182   converted to float32; 16 rows packed
//          64, 41             113,  64             242, 108   pairs; 16 rows are 1.2 to 1.4 times as fast as packed, 32 are 0.95
// What comes next was fetched by the first pass over what is here, now by each a part. Times as fast in float32, 8, 12, 16 and 32 rows, one core (the
// Zen 5), least of three or two runs in turns: 768 x 3,072 1.04 1.16 1.10 1.06, by rows 1.13 1.16 1.11 1.01; 3,072 x 768 by rows 1.42 1.37 1.30 1.12;
// the kernels for AVX2, 768 x 3,072 1.31 1.30 1.22 1.14, by rows 1.53 1.28 1.19 1.00, in bfloat16 1.08 1.08 1.08 1.07.
// bfloat16 by rows in pairs, 4 rows of A with 8 of B or 8 with 4, whose words registers hold. Torch's time over ours, one core (the Zen 5), weights that
// come from memory, as in generation, before and now, 4, 8, 12, 16 and 24 rows: 768 x 3,072 2.1 2.9, 1.2 2.4, 0.67 1.45, 0.69 1.33, 0.70 1.11; 2,048 x 2,048
// 2.4 2.9, 1.4 2.7, 0.71 1.8, 0.71 1.4, 0.73 1.2; 32 rows, packed, 0.75. From the caches 0.93 1.48, 0.60 1.27, 0.84 0.77, 0.88 0.75 of the first. Tried: sums of 64
// columns in registers over a block of k, so that B is read by pieces of rows: from the caches as fast, from memory 4 rows 1.5, 8 rows 1.0.
// bfloat16 with AMX: by columns the unit reads weights where they lie, C^T = B^T A^T, and B is never packed; by rows pairs of rows are put together 64 rows
// by 512 columns at a time. Times as fast as before (pairs up to 8 rows, then packed), weights from memory, one core of an Intel Xeon (Emerald Rapids,
// VM), 2026-11-28, by columns of 1, 8, 16, 32, 64 and 128 rows: 768 x 3,072 1.3 1.8 2.0 1.7 1.1 1.5; 16 rows of 4,096 x 4,096 2.5; by rows of 8, 16 and 64
// rows 1.1 3.1 1.9. Torch's time over ours, by columns, 1, 16, 64 and 128 rows: 768 x 3,072 1.6 1.9 1.4 1.2; 4,096 x 11,008 1.6 1.7 1.4 1.3; by rows of 1,
// 4, 8, 16 and 32 rows 2.4 1.3 1.06 1.1 0.87. An A too large for the level-2 cache a block of k at a time: 128 and 64 rows of 14,336 x 4,096 2.1 and
// 1.6. Tried by rows: 32 rows by 1,024 columns 0.8, in strips of 32 columns 0.88.
// Dot products of 1 and 2 rows with 8 columns instead of 4 rows with 4, whose last ones were repeated, and of 6 rows with 4 where that repeats fewer than 8
// with 3; with AVX2 one row with 6 columns instead of two with 4. Times as fast, medians of calls in turns, one core of an AMD EPYC (Zen 4, VM), 2026-11-29,
// from the caches and from memory (two rows as one):
//   float32   1 row  384 x 384 1.40, 1.15   768 x 768 1.20, 1.30   768 x 3,072 1.43, 1.28   3,072 x 768 1.06, 1.18   2,048 x 2,048 1.23, 1.20
//   bfloat16                   1.30, 1.05             1.39, 1.10               1.38, 1.09               1.25, 1.31                 1.12, 1.33
//   AVX2, float32, bfloat16, float16, 768 x 3,072 1.11 1.25 1.17, 1.09 1.02 1.05; 2,048 x 2,048 1.15 1.16 1.15, 1.11 1.11 1.09; with 8 columns, from the
//   caches, 0.8 to 1.1
//   6, 12, 17 rows of 768 x 3,072, float32 1.23 1.35 1.32, 1.00 1.11 1.22; bfloat16 1.42 1.32 1.30, 1.01 1.05 1.15
// With those groups more rows are faster by columns than packed. Times as fast, 36 and 48 rows, from the caches and from memory: float32 384 x 1,536 1.00
// 0.91, 1.26 1.14; 768 x 3,072 1.17 1.06, 1.17 1.10; 2,048 x 2,048 1.45 1.25, 1.29 1.20; 4,096 x 14,336 1.26 1.07, 1.31 1.22; 64 rows 0.8 to 1.24.
// bfloat16 in pairs, 30, 36 and 48 rows: 384 x 1,536 1.03 0.91 0.93, 1.22 1.12 0.92; 768 x 3,072 1.01 0.93 0.95, 0.97 1.08 0.92; 2,048 x 2,048 1.54 1.22
// 1.35, 1.18 1.18 1.27; 4,096 x 14,336 1.36 1.85 1.11, 1.40 1.25 1.08. Torch's time over ours, 32 rows of 4,096 x 14,336, 4,096 x 4,096 and 2,048 x 5,632:
// 0.84 0.76 0.88, now 1.01 1.11 1.04.
// 6 columns instead of 8, rows of B 4 KiB apart, from the caches and from memory: float32 1.05 to 1.23, 0.93 to 1.08; bfloat16 equal; other rows 0.85 to 1.06.
// What comes next not fetched by 1 or 2 rows at all: 1.00 to 1.07 there, not tried elsewhere. Panels of 768 columns: equal.
// float32 that is rounded, 12 columns of B at a time: times as fast as packed, 12, 16, 24 and 32 rows, the same machine and day (in use by others), from the
// caches and from memory, 3 columns at a time: 384 x 1,536 0.9 2.4 0.7 1.4, 0.9 1.0 1.1 1.0; 768 x 3,072 1.1 1.3 1.4 1.3, 1.4 1.3 1.3 1.2; 3,072 x 768
// 1.3 1.8 1.8 1.5, 1.5 1.1 1.1 1.4; 12 columns, in groups of dots(), over those 1.04 0.91 0.86 0.94, 1.08 1.0 1.05 0.95; 1.14 0.92 0.90 0.99, 1.19 1.11 1.14
// 1.06; 1.09 1.12 0.8 0.9, 1.25 1.02 1.08 1.06. 48 rows gain where k is large, lose where it is 384.
// Beside weights that were packed in an earlier call: most_beside_packed(). GFLOP/s in float32 read in place and kept packed, 1, 4 and 16
// rows, one core of the same machine: 1,024 x 4,096 14 18, 53 65, 125 148; 768 x 3,072 of 4, 8, 12 rows 52 58, 115 98, 105 121; 384 x 1,536 of 8, 16,
// 24 rows 96 91, 149 134, 153 152; bfloat16, 768 x 3,072, 16 and 24 rows 296 221, 303 265.
// Few features by columns, us packed and by dot products, 8, 16 and 32 rows of 768 columns, one core of an AMD EPYC (Zen 4, VM), 2026-11-29: float32
// 8 features 11 12 16, 16 26 46; 32 14 19 27, 18 30 54; 64 23 30 47, 23 37 66; 128 39 53 83, 29 53 98. bfloat16 in pairs, which below a vector of them go
// one by one, 8 features 16 17 21, 51 94 180; 32 12 15 21, 18 25 44; 64 15 19 30, 20 29 51; 128 22 30 47, 23 36 61.
#include "few_rows.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kLine = 64;

// Whether a cache line begins with element `at` of a row, as far as one counts from the row's first.
template <int dtype>
FASTATTN_INLINE bool begins_line(int64_t at) {
    return at % (dtype == FASTATTN_FLOAT32 ? kLine / 4 : kLine / 2) == 0;
}

template <int dtype>
constexpr bool kPairs = dtype == FASTATTN_BFLOAT16 && kBfloat16Parts > 0;

// How what comes next is fetched: not, at once, or in parts by the passes over what is here, so that memory is never idle. A part is one stretch: lines
// from all over were slower than all at once.
enum class Fetch { none, all, part };

template <int dtype>
class Part {
  public:
    Part() = default;
    Part(int64_t elements, int64_t index, int64_t parts) : parts_(parts), next_(elements * index / parts / kElements * kElements) {}
    // Every so many lines that a pass goes by the element to fetch, else -1.
    int64_t take() {
        if (wait_-- > 0) return -1;
        wait_ = parts_ - 1;
        next_ += kElements;
        return next_ - kElements;
    }

  private:
    static constexpr int64_t kElements = kLine / (dtype == FASTATTN_FLOAT32 ? 4 : 2);
    int64_t parts_ = 1, next_ = 0, wait_ = 0;
};

constexpr int64_t kCachedElements = 8192;  // of the rows of A of a pass: where they are more, what was fetched by one of many passes is gone by its use

// ---- B by columns ------------------------------------------------------------------------------------------------------------------------

// Rows x Columns dot products at a time. Vectors run along k; one reduction turns as many accumulators as a vector has lanes into one vector.
template <int dtype, int Rows, int Columns>
struct DotTile {
    static constexpr int kDots = Rows * Columns, kVectors = (kDots + kLanes - 1) / kLanes;
    static constexpr int kStep = kPairs<dtype> ? 2 * kLanes : kLanes;  // elements of k in a vector
    const void *left[Rows];  // float32, or bfloat16 where pairs are multiplied
    const void *right[Columns];

    FASTATTN_INLINE void step(const DotTile &t, vfloat (&acc)[kDots], int64_t at, int count) {
        if constexpr (kPairs<dtype>) step_of_pairs(t, acc, at, count);
        else step_of_floats(t, acc, at, count);
    }

    FASTATTN_INLINE void step_of_pairs([[maybe_unused]] const DotTile &t, [[maybe_unused]] vfloat (&acc)[kDots], [[maybe_unused]] int64_t at,
                                       [[maybe_unused]] int count) {
#if defined(__AVX512BF16__)
        const auto words = [&](const void *row) {
            vuint v = {};
            if (count == kStep) __builtin_memcpy(&v, offset(row, dtype, at), sizeof v);
            else __builtin_memcpy(&v, offset(row, dtype, at), (size_t)count * 2);
            return in_register((vfloat)v);
        };
        vfloat b[Columns];
#pragma GCC unroll 8
        for (int i = 0; i < Columns; i++) b[i] = words(t.right[i]);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const vfloat a = words(t.left[r]);
#pragma GCC unroll 8
            for (int i = 0; i < Columns; i++)
                acc[r * Columns + i] = (vfloat)_mm512_dpbf16_ps((__m512)acc[r * Columns + i], (__m512bh)a, (__m512bh)b[i]);
        }
#endif
    }

    FASTATTN_INLINE void step_of_floats(const DotTile &t, vfloat (&acc)[kDots], int64_t at, int lanes) {
        vfloat b[Columns];
#pragma GCC unroll 8
        for (int i = 0; i < Columns; i++) b[i] = in_register(load_any(offset(t.right[i], dtype, at), dtype, lanes));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const float *from = (const float *)t.left[r] + at;
            const vfloat a = in_register(lanes == kLanes ? load(from) : load_part(from, lanes));
#pragma GCC unroll 8
            for (int i = 0; i < Columns; i++) acc[r * Columns + i] += a * b[i];
        }
    }

    // result[r * Columns + i]. B is read once and from far: its next columns are fetched meanwhile.
    template <Fetch fetch>
    void run(int64_t k, int64_t ldb, float *result, Part<dtype> part = {}) const {
        vfloat acc[kDots] = {};
        int64_t at = 0;
        for (; at + kStep <= k; at += kStep) {
            if (fetch != Fetch::none && begins_line<dtype>(at)) {
                const int64_t next = fetch == Fetch::all ? at : part.take();
                if (fetch == Fetch::all || next >= 0)
#pragma GCC unroll 8
                    for (int i = 0; i < Columns; i++) __builtin_prefetch(offset(right[i], dtype, Columns * ldb + next));
            }
            step(*this, acc, at, kStep);
        }
        if (at < k) step(*this, acc, at, (int)(k - at));
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) {
            vfloat block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) block[i] = v * kLanes + i < kDots ? acc[v * kLanes + i] : zero();
            store(result + v * kLanes, sums(block));
        }
    }
};

template <int dtype, int Rows, int Columns>
void all_dots(int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, float *c, int64_t ldc) {
    using Dots = DotTile<dtype, Rows, Columns>;
    const int64_t parts = (m + Rows - 1) / Rows;
    const bool in_parts = !kPairs<dtype> && (parts == 2 || (parts > 2 && Rows * k <= kCachedElements));  // pairs: no difference, measured
    for (int64_t column = 0; column < n; column += Columns)
        for (int64_t row = 0; row < m; row += Rows) {
            Dots tile;  // past the end the last row is repeated, its result dropped
            for (int r = 0; r < Rows; r++) tile.left[r] = offset(a, kPairs<dtype> ? dtype : FASTATTN_FLOAT32, smaller(row + r, m - 1) * lda);
            for (int i = 0; i < Columns; i++) tile.right[i] = offset(b, dtype, smaller(column + i, n - 1) * ldb);
            float result[Dots::kVectors * kLanes];
            const bool are_more = column + 2 * Columns <= n;
            if (are_more && in_parts) tile.template run<Fetch::part>(k, ldb, result, {k, row / Rows, parts});
            else if (are_more && row == 0) tile.template run<Fetch::all>(k, ldb, result);
            else tile.template run<Fetch::none>(k, ldb, result);
            // Whole groups are stored, past n too: C has room for them.
            for (int r = 0; r < Rows && row + r < m; r++) __builtin_memcpy(c + (row + r) * ldc + column, result + r * Columns, Columns * 4);
        }
}

// As many dot products as registers hold, of as few rows past the end as there may be.
template <int dtype>
void dots(int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, float *c, int64_t ldc) {
    const auto run = [&]<int Rows, int Columns>() { all_dots<dtype, Rows, Columns>(m, n, k, a, lda, b, ldb, c, ldc); };
    if constexpr (kLanes == 16) {
        if (m == 1) run.template operator()<1, 8>();
        else if (m == 2) run.template operator()<2, 8>();
        else if (m <= 4) run.template operator()<4, 4>();
        else if ((m + 5) / 6 * 6 < (m + 7) / 8 * 8) run.template operator()<6, 4>();
        else run.template operator()<8, 3>();
    } else {
        if (m == 1) run.template operator()<1, kLanes == 8 ? 6 : kLanes>();
        else run.template operator()<2, kLanes / 2>();
    }
}

constexpr int kRoundedColumns = 12;  // whole groups of dots()

#if defined(__AVX512BF16__)
// Columns of float32 that are rounded as they are read: the words of kRoundedColumns, near by, are multiplied by all rows of A.
void rounded_dots(int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, float *words) {
    const int64_t ld = lda / 2;
    for (int64_t column = 0; column < n; column += kRoundedColumns) {
        const int64_t columns = smaller(kRoundedColumns, n - column);
        pack_words_in_rows<1>({b + column * ldb, FASTATTN_FLOAT32, ldb}, columns, k, {words, ld, 0, 16, 0}, ld);
        dots<FASTATTN_BFLOAT16>(m, columns, k, a, lda, words, lda, c + column, ldc);
    }
}
#endif

// ---- B by rows ---------------------------------------------------------------------------------------------------------------------------

constexpr int kRowsOfB = 4;
constexpr int64_t kPanel = (1024 + kTileWidth - 1) / kTileWidth * kTileWidth;  // kRowsOfB rows of it, and the sums of two rows of A, in the level-1 cache

// sums(r, c) (+)= sum over Depth rows of B, for Rows rows of A; `add` where the sums hold something.
template <int dtype, int Rows, int Depth, Fetch fetch>
void add_products(const float *a, int64_t lda, const void *b, int64_t ldb, int64_t n, float *sums, int64_t ld, bool add, Part<dtype> part) {
    vfloat av[Rows][Depth];
    for (int r = 0; r < Rows; r++)
        for (int d = 0; d < Depth; d++) av[r][d] = broadcast(a[r * lda + d]);
    const auto column = [&](int64_t c, int lanes) {
        vfloat acc[Rows];
#pragma GCC unroll 2
        for (int r = 0; r < Rows; r++) acc[r] = add ? load(sums + r * ld + c) : zero();
#pragma GCC unroll 4
        for (int d = 0; d < Depth; d++) {
            const vfloat bv = in_register(load_any(offset(b, dtype, d * ldb + c), dtype, lanes));
#pragma GCC unroll 2
            for (int r = 0; r < Rows; r++) acc[r] += av[r][d] * bv;
        }
#pragma GCC unroll 2
        for (int r = 0; r < Rows; r++) store(sums + r * ld + c, acc[r]);
    };
    over_columns(n, [&](int64_t c, int lanes) {
        if (fetch != Fetch::none && begins_line<dtype>(c)) {
            const int64_t next = fetch == Fetch::all ? c : part.take();
            if (fetch == Fetch::all || next >= 0)
#pragma GCC unroll 4
                for (int d = 0; d < Depth; d++) __builtin_prefetch(offset(b, dtype, (Depth + d) * ldb + next));
        }
        column(c, lanes);
    });
}

template <int dtype, int Depth>
void add_rows_of_b(int64_t m, const float *a, int64_t lda, const void *b, int64_t ldb, int64_t n, float *sums, int64_t ld, bool add, bool ahead) {
    // Halves, whose lines take longer to convert than to come, are fetched at once.
    constexpr Fetch kFetch = dtype == FASTATTN_FLOAT32 ? Fetch::part : Fetch::all;
    for (int64_t row = 0; row < m; row += 2) {
        float *target = sums + row * ld;
        const Part<dtype> part = kFetch == Fetch::part ? Part<dtype>(n, row / 2, (m + 1) / 2) : Part<dtype>();
        const bool fetches = ahead && (row == 0 || kFetch == Fetch::part);
        const auto products = [&]<int Rows>() {
            if (fetches) add_products<dtype, Rows, Depth, kFetch>(a + row * lda, lda, b, ldb, n, target, ld, add, part);
            else add_products<dtype, Rows, Depth, Fetch::none>(a + row * lda, lda, b, ldb, n, target, ld, add, part);
        };
        if (row + 2 <= m) products.template operator()<2>();
        else products.template operator()<1>();
    }
}

// The sums of blocks of k: the first block's in place, the others' beside it, from where they are added.
template <typename Block>
void over_depth(int64_t m, int64_t n, int64_t k, float *sums, int64_t ld, Block &&add_block) {
    const int64_t width = round_up(n, kLanes);
    for (int64_t begin = 0; begin < larger(k, 1); begin += kDepth) {
        float *target = begin ? sums + m * ld : sums;
        if (k == 0)
            for (int64_t r = 0; r < m; r++) memset(target + r * ld, 0, (size_t)width * 4);
        add_block(Range{begin, smaller(k, begin + kDepth)}, target);
        for (int64_t r = 0; begin && r < m; r++)
            for (int64_t c = 0; c < width; c += kLanes) add_to(sums + r * ld + c, load(target + r * ld + c));
    }
}

template <int dtype>
void by_rows(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const void *b, int64_t ldb, float *sums, int64_t ld) {
    over_depth(m, n, k, sums, ld, [&](Range block, float *target) {
        int64_t i = block.begin;
        for (; i + kRowsOfB <= block.end; i += kRowsOfB)
            add_rows_of_b<dtype, kRowsOfB>(m, a + i, lda, offset(b, dtype, i * ldb), ldb, n, target, ld, i > block.begin, i + 2 * kRowsOfB <= k);
        for (; i < block.end; i++) add_rows_of_b<dtype, 1>(m, a + i, lda, offset(b, dtype, i * ldb), ldb, n, target, ld, i > block.begin, false);
    });
}

// ---- B by rows, in pairs -----------------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// kLanes words of rows k and k + 1 of B; without the second row its halves are 0. (By words_of_row_pair, which looks for the ends of
// both rows and columns, 8 and 12 rows took 3 to 8% longer, least of four runs in turns.)
FASTATTN_INLINE vfloat words_of_rows(const uint16_t *b, int64_t ldb, bool is_pair, int lanes) {
    const auto row = [&](const uint16_t *from) {
        vhalf h;
        if (lanes == kLanes) __builtin_memcpy(&h, from, sizeof h);
        else h = load_part(from, lanes);
        return widen(h);
    };
    return in_register((vfloat)(is_pair ? row(b) | row(b + ldb) << 16 : row(b)));
}

// As add_products, for `Words` pairs of rows of B, or, where is_pair is false, for one row.
template <int Rows, int Words, bool fetches, bool is_pair = true>
void add_pairs(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, int64_t n, float *sums, int64_t ld, bool add) {
    vfloat av[Rows][Words];
    for (int r = 0; r < Rows; r++)
        for (int i = 0; i < Words; i++) {
            int32_t word = 0;
            if (is_pair) __builtin_memcpy(&word, a + r * lda + 2 * i, 4);
            else word = a[r * lda];
            av[r][i] = (vfloat)broadcast_int(word);
        }
    over_columns(n, [&](int64_t c, int lanes) {
        if (fetches && begins_line<FASTATTN_BFLOAT16>(c))
#pragma GCC unroll 8
            for (int d = 0; d < 2 * Words; d++) __builtin_prefetch(b + (2 * Words + d) * ldb + c);
        vfloat bv[Words];
#pragma GCC unroll 4
        for (int i = 0; i < Words; i++) bv[i] = words_of_rows(b + 2 * i * ldb + c, ldb, is_pair, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            vfloat acc = add ? load(sums + r * ld + c) : zero();
#pragma GCC unroll 4
            for (int i = 0; i < Words; i++) acc = (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)av[r][i], (__m512bh)bv[i]);
            store(sums + r * ld + c, acc);
        }
    });
}

// `Most` rows of A at a time, whose words registers hold, as many as are left in the end.
template <int Most, int Words, bool is_pair = true>
void add_pairs_of_rows(int64_t m, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, int64_t n, float *sums, int64_t ld, bool add, bool ahead) {
    for (int64_t row = 0; row < m; row += Most) {
        const auto products = [&]<int Rows>(const auto &self) {
            if constexpr (Rows > 1)
                if (m - row < Rows) return self.template operator()<Rows - 1>(self);
            if (ahead && row == 0) add_pairs<Rows, Words, true, is_pair>(a, lda, b, ldb, n, sums, ld, add);
            else add_pairs<Rows, Words, false, is_pair>(a + row * lda, lda, b, ldb, n, sums + row * ld, ld, add);
        };
        products.template operator()<Most>(products);
    }
}

template <int Most, int Words>
void pairs_by_rows(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *sums, int64_t ld) {
    over_depth(m, n, k, sums, ld, [&](Range block, float *target) {
        int64_t i = block.begin;
        for (; i + 2 * Words <= block.end; i += 2 * Words)
            add_pairs_of_rows<Most, Words>(m, a + i, lda, b + i * ldb, ldb, n, target, ld, i > block.begin, i + 4 * Words <= k);
        for (; i + 2 <= block.end; i += 2) add_pairs_of_rows<4, 1>(m, a + i, lda, b + i * ldb, ldb, n, target, ld, i > block.begin, false);
        if (i < block.end) add_pairs_of_rows<4, 1, false>(m, a + i, lda, b + i * ldb, ldb, n, target, ld, i > block.begin, false);
    });
}

#endif

// ---- With the matrix unit ----------------------------------------------------------------------------------------------------------------

constexpr int64_t kMostLanes = 128;  // of A: so many rows, side by side
constexpr int64_t kNearWords = 1 << 17;  // of that A, which a level-2 cache holds beside the sums of a panel
constexpr int64_t kNearPanel = 64, kFarPanel = 256;  // of columns: the more, the seldomer an A goes by that it does not hold
constexpr int64_t kMatrixPanel = 512, kRowsAtOnce = 64;  // of a B by rows
constexpr int64_t kPairedRows = 4;  // of A with such a B: up to here pairs from memory are faster than the unit

#if defined(__AMX_BF16__)

// B by columns is B^T by rows, which the unit reads where it lies: C^T = B^T A^T, over all of k where A stays near, else over as much as does.
void matrix_sums_of_columns(const FewRows &p, const float *a, Range columns, float *sums, int64_t ld) {
    const int64_t lanes = p.left_stride(), words = p.k / 2;
    const int64_t depth = words * lanes <= kNearWords ? words : kNearWords / 2 / lanes / kWordDepth * kWordDepth;
    const int64_t rest = columns.size() % kLanes, whole = columns.size() - rest, skipped = rest ? kLanes - rest : 0;
    float *transposed = sums + p.m * ld;  // (column, lane)
    for (int64_t first = 0; first < words; first += depth) {
        const auto multiply_columns = [&](int64_t from, int64_t count, int64_t column) {
            multiply_word_rows(count, lanes / kLanes, smaller(depth, words - first), (const float *)p.b.at(2 * first, from), p.b.across / 2, a + first * lanes,
                               lanes, transposed + column * lanes, lanes, first > 0);
        };
        for (int64_t c = 0; c < whole; c += 2 * kLanes) multiply_columns(columns.begin + c, smaller(2 * kLanes, whole - c), c);
        if (rest) multiply_columns(columns.end - kLanes, kLanes, whole);  // the last few are read with those before them
    }
    for (int64_t column = 0; column < columns.size(); column += kLanes)
        for (int64_t row = 0; row < p.m; row += kLanes) {
            const float *source = transposed + (column + (column == whole ? skipped : 0)) * lanes + row;
            vfloat block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) block[i] = load(source + i * lanes);
            transpose(block);
            for (int64_t r = 0; r < smaller(kLanes, p.m - row); r++) store(sums + (row + r) * ld + column, block[r]);
        }
}

// B by rows is paired a few rows at a time, in the order of memory, and multiplied from the caches.
void matrix_sums_of_rows(const FewRows &p, const float *a, int64_t lda, Range columns, float *sums, int64_t ld) {
    float *words = sums + p.m * ld;
    for (int64_t first = 0; first < p.k; first += kRowsAtOnce) {
        const int64_t rows = smaller(kRowsAtOnce, p.k - first), depth = round_up((rows + 1) / 2, kWordDepth);
        const Rows source{p.b.at(first, columns.begin), FASTATTN_BFLOAT16, p.b.down};
        const WordsTarget target = {words, kMatrixPanel, 16 * kMatrixPanel, 16, 0};
        for (int64_t word = 0; word < depth; word++) {
            for (int64_t r = 2 * word; r < 2 * word + 2 && first + kRowsAtOnce + r < p.k; r++)
                for (int64_t c = 0; c < columns.size(); c += 32) __builtin_prefetch(source.at(kRowsAtOnce + r, c), 0, 2);
            pack_row_pair<1>(source, rows, columns.size(), word, target);
        }
        multiply_word_rows(p.m, (columns.size() + kLanes - 1) / kLanes, depth, a + first / 2, lda, words, kMatrixPanel, sums, ld, first > 0);
    }
}

#endif

}  // namespace

FewRows::Left FewRows::left() const {
    if (b.dtype == FASTATTN_FLOAT32) return is_rounded ? Left::halves : Left::tensor;
    if (!kPairs<FASTATTN_BFLOAT16> || b.dtype != FASTATTN_BFLOAT16) return Left::floats;
    if (!kWordBlocks) return Left::tensor;
    if (b.down != 1) return m > kPairedRows && k > 0 ? Left::row_words : Left::tensor;
    const bool fills_blocks = k % 32 == 0 && k > 0 && n >= kLanes && b.across % 2 == 0 && (uintptr_t)b.data % 4 == 0;
    return fills_blocks ? Left::lane_words : Left::tensor;
}

int64_t FewRows::left_stride() const {
    if (left() == Left::row_words) return round_up((k + 1) / 2, kWordDepth);
    if (left() == Left::halves) return round_up(k, 2 * kLanes);
    return round_up(left() == Left::floats ? k : m, kLanes);
}

int64_t FewRows::left_floats() const {
    if (left() == Left::tensor) return 0;
    if (left() == Left::row_words) return left_stride() * round_up(m, 16);
    if (left() == Left::halves) return left_stride() / 2 * m;
    return left_stride() * (left() == Left::floats ? m : k / 2);
}

void FewRows::convert(Rows a, float *target) const {
    const int64_t ld = left_stride();
#if defined(__AVX512BF16__)
    if (left() == Left::lane_words) {
        pack_words_transposed<1>(a, m, k, {target, ld, 16 * ld, 16, 0}, k / 2);
        return;
    }
    if (left() == Left::row_words || left() == Left::halves) {
        const int64_t words = left() == Left::halves ? ld / 2 : ld;
        pack_words_in_rows<1>(a, m, k, {target, words, 16 * words, 16, 0}, words);
        return;
    }
#endif
    pack_rows(a, m, k, 1.0f, target, ld);
}

int64_t FewRows::most() const {
    const bool sums_lanes = b.down == 1 && left() != Left::lane_words;
    return sums_lanes ? smaller(most_of_dtype(), most_of_features()) : most_of_dtype();
}

// A dot product ends with a sum over the lanes, however short it is: by few features packing pays for fewer rows. Measured on x86-64, rounded float32 too.
int64_t FewRows::most_of_features() const {
    const bool pairs = is_rounded || (kPairs<FASTATTN_BFLOAT16> && b.dtype == FASTATTN_BFLOAT16);
    if (pairs) return k < 32 ? 0 : k / 16 + 2;
    return larger(4, 2 * k / kLanes);
}

// Measured, as above. With instructions for pairs of bfloat16 packing pays earlier.
int64_t FewRows::most_of_dtype() const {
    const bool by_columns = b.down == 1;
    if (is_rounded) return by_columns && !kWordBlocks ? 32 : 0;
    if (b.dtype == FASTATTN_FLOAT32) return by_columns && kLanes == 16 ? 48 : 32;
    if (b.dtype == FASTATTN_FLOAT16 && kFloat16Parts) return 24;
    if (!kPairs<FASTATTN_BFLOAT16> || b.dtype != FASTATTN_BFLOAT16) return 32;
    if (left() == Left::lane_words) return kMostLanes;
    if (left() == Left::row_words) return 96;
    if (kWordBlocks) return 8;
    if (!by_columns) return 24;
    return k >= 2048 ? 48 : 32;
}

// Strips that are packed already are read as one stream, and A a block of k at a time. Dot products read columns of B that are a row of it apart, and
// all of k of A, which the level-1 cache has to hold; columns a multiple of 4 KiB apart share its sets, with those of A too. Measured with AVX-512,
// AVX2 and, in bfloat16, AMX; elsewhere it is not known from which row on packed strips are faster.
int64_t FewRows::most_beside_packed() const {
    const bool pairs = b.dtype == FASTATTN_BFLOAT16;
    if (is_rounded) return 0;  // kept strips are half as large
    if (kLanes < 8) return most();
    if (pairs && kWordBlocks) return smaller(most(), b.down == 1 ? 48 : kPairedRows);
    if (b.down != 1) return kLanes == 16 ? 0 : most();
    if (!pairs && b.across * 4 % 4096 == 0) return 0;
    const int64_t cached = pairs ? 48 << 10 : 32 << 10, measured = pairs ? 24 : 32;
    return smaller(smaller(most(), measured), cached / larger(1, k * size_of(b.dtype)));
}

int64_t FewRows::panel() const {
    if (left() == Left::row_words) return kMatrixPanel;
    if (b.down != 1) return kPanel;
    if (left() != Left::lane_words) return kTileWidth;
    return k / 2 * left_stride() <= kNearWords ? kNearPanel : kFarPanel;
}

// Beside the sums: their transpose and up to a vector of columns that are read twice; columns that are rounded; pairs of a few rows of B; or another
// panel.
int64_t FewRows::scratch_floats() const {
    const int64_t own = m * panel();
    if (left() == Left::lane_words) return own + (panel() + kLanes) * left_stride();
    if (left() == Left::halves) return own + kRoundedColumns * left_stride() / 2;
    return own + (left() == Left::row_words ? kRowsAtOnce / 2 * kMatrixPanel : own);
}

void FewRows::sums(const void *a, int64_t lda, Range columns, float *sums, int64_t ld) const {
#if defined(__AMX_BF16__)
    if (left() == Left::lane_words) return matrix_sums_of_columns(*this, (const float *)a, columns, sums, ld);
    if (left() == Left::row_words) return matrix_sums_of_rows(*this, (const float *)a, lda, columns, sums, ld);
#endif
#if defined(__AVX512BF16__)
    if (left() == Left::halves)
        return rounded_dots(m, columns.size(), k, a, lda, (const float *)b.at(0, columns.begin), b.across, sums, ld, sums + m * ld);
#endif
    with_dtype(b.dtype, [&]<int dtype>() {
        const void *first = b.at(0, columns.begin);
#if defined(__AVX512BF16__)
        if (b.down != 1 && left() == Left::tensor && dtype == FASTATTN_BFLOAT16) {
            const auto run = m > 4 ? pairs_by_rows<8, 2> : pairs_by_rows<4, 4>;
            return run(m, columns.size(), k, (const uint16_t *)a, lda, (const uint16_t *)first, b.down, sums, ld);
        }
#endif
        if (b.down == 1) dots<dtype>(m, columns.size(), k, a, lda, first, b.across, sums, ld);
        else by_rows<dtype>(m, columns.size(), k, (const float *)a, lda, first, b.down, sums, ld);
    });
}

FASTATTN_NAMESPACE_END
