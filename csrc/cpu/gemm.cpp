// C = dropout(act(A B + bias) * multiplier): the matrix product behind linear_act, ffn and gated_ffn, forward and backward.
//
// Numerics: float32 accumulators; sums over k are blocked (kDepth), which keeps their error near that of one block; one rounding to the
//   tensors' dtype at the end. bfloat16 is multiplied in pairs where AMX or AVX-512 BF16 is there: exact products, float32 sums, subnormal numbers as 0.
//   With AMX float16 is, too, as two bfloat16 parts, and from kSplitRows rows on float32 as three (pairs.h): 0.5 to 0.7 of the error MKL's product has.
//   Where the caller lets float32 be rounded, it is one part there, and on an AMD in pairs, but for few rows.
// Algorithm: an A that stays near, up to kOwnRows rows read in place or with AMX as many words as a level-2 cache holds, goes by strips of columns of B,
//   which each thread packs for itself and for its level-2 cache. Else C is made in chunks of columns: the threads pack a chunk together, then share out
//   its C as a grid; each walks its part in blocks of rows, blocks of k and tiles of the micro-kernel. A is read in place when it is float32, or bfloat16
//   to be multiplied in pairs, by rows; with AMX all of it is packed once, but for parts of float32. The epilogue runs on a finished tile while it is in
//   the level-1 cache.
//
// Ladder, float32, GFLOP/s at (m, k, n) = (2880, 384, 384), (2880, 384, 1536), (2880, 1536, 384) on 2 cores of an Intel Xeon with AMX (model 167, VM),
// 2026-11-22; torch 2.13 with MKL in the same runs: 339, 338, 325.
//   300, 267, 317  packed strips, tiles through a buffer
//   323, 324, 312  finished tiles straight into C, whose lines are fetched while the sums are formed
//   343, 349, 333  the threads pack B together and prefer to share out rows
//   429, 424, 415  AMX, three bfloat16 parts, blocks of 1 KiB (its own limit there: 8 ns a block product, about 650)
// A B that lies by rows (transposed weights, backward) took 1.04 to 1.28 times as long to multiply by 48 to 128 rows as one by columns, strip by strip;
// 1.01 to 1.21 packed four strips at a time, the rows fetched ahead (2 cores of an AMD EPYC, Zen 3, AVX2, VM, 2026-11-26).
// bfloat16 with AVX-512 BF16, times of torch's (oneDNN's) in the same runs over ours, 16, 64, 128, 512 rows by 768 x 3,072 weights, on 2 cores of an
// AMD EPYC (Zen 5, VM), 2026-11-27:
//   0.39, 0.60, 0.70, 0.84  a chunk of B packed together, rows of any length by a call of memcpy
//   0.83, 0.93, 0.93, 0.90  whole vectors packed as such; A read in place
//   1.00, 0.97, 0.95, 0.92  own strips; while others use the machine the level-3 cache is slow, and this was 1.5 times as fast as the chunk
// Own strips in float32, 64 rows by 768 x 3,072: 1.10 times as fast as the chunk, by the kernels for AVX2 1.7 times (the same machine).
// B kept packed from call to call (`packed`), GFLOP/s before and after; weights by columns that come from memory, one core of an AMD EPYC (Zen 5,
// VM), 2026-11-27:
//   rows                     8                 16                24                33                64                128
//   768 x 3,072 float32      few rows          115 -> 146        126 -> 165        150 -> 177        188 -> 207        208 -> 221
//   768 x 3,072 bfloat16     few rows          few rows          few rows          265 -> 297        338 -> 374        393 -> 418
//   2,048 x 2,048 float32    80 -> 105         108 -> 147        123 -> 170        146 -> 181        184 -> 208        214 -> 226
//   2,048 x 2,048 bfloat16   few rows          221 -> 261        247 -> 310        246 -> 329        337 -> 395        402 -> 441
// By rows (Conv1D), 768 x 3,072, float32 and bfloat16: 16 rows 98 -> 137 and 83 -> 231, 33 rows 117 -> 163 and 137 -> 290. The kernels for AVX2,
// float32: 33 rows 1.07 to 1.15 times as fast. Halves that are multiplied as float32: 1.00 to 1.07 (float16, AVX-512), 0.93 to 1.02 (AVX2).
// Halves with AMX, times as fast as with blocks of A packed for every chunk of B, a strip of rows of B at a time, and float16 as float32; medians of
// calls in turns, weights from memory, one core of an Intel Xeon (Emerald Rapids, VM), 2026-11-28:
//   bfloat16             256 and 1,024 rows by 768 x 3,072 1.38, 1.32; 512 and 2,048 by 4,096 x 4,096 1.20, 1.49
//   bfloat16 by rows     256 and 1,024 rows by 768 x 3,072 1.54, 1.39; 512 by 4,096 x 4,096 1.21
//   float16              32, 64, 256 and 1,024 rows by 768 x 3,072 1.25, 1.34, 2.7, 2.7; 512 by 4,096 x 4,096 1.64
// At 1,024 rows by 768 x 3,072: A packed once 1.10, loaded past the level-1 cache and strip by strip 1.06, rows of C written whole and fetched ahead 1.18.
// The products alone would take 2.2 ms of the 5.4 there; other sizes of chunks and blocks of rows make no difference.
// float32 that is rounded, with AMX, 12, 16, 32, 64, 256, 1,024 rows, times of torch's (oneDNN's) by "medium" over ours, medians of calls in turns, one core
// of the same Xeon, 2026-11-29:
//   384 x 1,536  1.03, 1.07, 1.18, 1.16, 1.24, 1.71
//   768 x 3,072  0.90, 1.04, 1.06, 1.05, 1.37, 1.74 (256 rows: 2.0 ms, where the exact product takes 9.0, torch's 9.2)
// float32 that is rounded, in pairs (vdpbf16ps), 64, 256, 1,024 rows, times of the exact product's over it and torch's by "medium" over it, calls in turns,
// least of 11, one core of an AMD EPYC (Zen 4, VM), 2026-11-29:
//   384 x 1,536  1.65 1.63, 1.70 1.72, 1.79 1.83    768 x 3,072  1.45 1.49, 1.69 1.66, 1.81 1.80    A is rounded block by block, for every chunk of B
//                1.74 1.71, 1.74 1.78, 1.82 1.88                 1.63 1.65, 1.78 1.80, 1.89 1.93    once, for all; strips of one's own
// The next block of B fetched between the steps of every product, and B packed a block of k at a time (by rows, 0.94 to 1.11 by itself), AVX-512, times
// as fast as all of k packed first and nothing fetched, then torch's time over ours; weights from memory, calls in turns, one core of the same machine:
//   rows                       49         64         128        256        384
//   bfloat16  768 x 3,072      1.16 1.14  1.16 1.13  1.11 1.01  1.04 1.01  1.03 1.07
//             3,072 x 768      1.37 1.05  1.10 1.02  1.09 1.00  1.06 0.96  0.99 1.00
//     by rows 768 x 3,072                 1.16 1.11  1.09 1.05  1.05 1.01  1.14 1.01
//             3,072 x 768                 1.34 1.12  1.20 1.04  1.09 1.02  1.09 1.02
//   float32   768 x 3,072      1.03 1.22  1.02 1.20  1.02 1.17  1.02 1.08  0.99 1.08
//             3,072 x 768      1.19 1.14  1.16 1.11  1.08 1.04  1.00 1.05  1.03 1.06
//     by rows 768 x 3,072      1.09 1.19  1.19 1.27  1.07 1.16  1.03 1.16
//             3,072 x 768      1.31 1.22  1.11 1.16  1.12 1.08  1.06 1.09
// From the caches 0.94 to 1.14, one case 1.23. With AVX2 blocks of k gain nothing, and level-2 caches are small: left as they were.
// bfloat16 in pairs of one block of k straight from the registers, and float32 a strip of a block of rows in one call, times as fast as tile by tile
// through a buffer, calls in turns, the same machine, two runs: gradients of 768 x 3,072 weights by 1, 4, 16, 32, 64 rows, bfloat16 1.7 2.5, 2.2 2.4,
// 1.7, 1.4, 1.2 (torch's time over ours 0.33, 0.37, 0.54, 0.78, 0.85, now 0.74 0.79, 0.67 0.74, 0.82 0.86, 0.94, 1.02 1.04), float32 1.2 1.45, 1.1 1.3,
// 1.05 1.3, 1.1 1.2, 1.15 1.2; 128, 512 and 1,024 rows by 384 x 1,536, bfloat16, 1.14, 1.12, 1.06. us of 768 x 768 by 1 row, bfloat16: 97 a call for
// every tile, 63 one for a strip, 49 subnormal sums asked for once and two vectors to a store.
// Eight tiles finished at a time, gelu or relu, 128, 256 and 384 features: 1.06, 1.03, 1.02 in bfloat16, 1.03, 1.02, 1.01 in float32.
// Blocks of 32 rows instead of 192 by few features, whose rows of C are written one after the other: 0.85 to 1.05.
// Few rows: few_rows.cpp.
#include <omp.h>

#include "activation.h"
#include "few_rows.h"
#include "kernels.h"
#include "operands.h"
#include "philox.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kBlockRows = 192;        // rows of A in one block, a multiple of every tile's
constexpr int64_t kChunkFloats = 1 << 18;  // packed B in one chunk: 1 MiB
constexpr int64_t kOwnFloats = 1 << 16;    // of one thread's strips: 256 KiB
constexpr int64_t kFinishedTiles = 8;      // tiles whose sums are finished at a time
constexpr int64_t kSlicedRows = kLanes == 16 ? 2 * kBlockRows : 0;  // of A, up to which they are packed a block of k at a time
constexpr int64_t kOwnLeftFloats = 1 << 18;  // of A beside them, in words
constexpr int64_t kMostLeftFloats = 1 << 24;  // of all of A made once for all of B: 64 MiB
constexpr int64_t kSplitChunkFloats = 1 << 20;  // in three parts, where packing A again for every chunk costs more than B from the shared cache

// A strip and what lies before it in its first 32 columns is a strip of keep masks.
static_assert(kTileWidth + 32 - (kTileWidth & -kTileWidth) <= kKeepStrip);

bool has_extras(const fastattn_gemm &p) { return p.pre.data || p.multiplier.data || p.dropout.threshold; }

// Finished sums of a strip into C, by whole vectors and the last part of a row, a row at a time: its lines of C are written whole, and those a few
// rows on fetched, which lie too far apart for the hardware to foresee. `added` is the bias where the sums do not hold it yet.
template <int dtype, int activation, bool extras>
void finish_rows(const fastattn_gemm &p, const float *sums, int64_t ld, Range rows, Range columns, const void *added) {
    constexpr int64_t kAhead = 8;
    const bool is_block = rows.size() > kWordRows;  // what becomes of a tile was fetched while its sums were formed
    const int64_t kept_from = columns.begin / 32 * 32;
    int16_t keep[extras ? (kBlockRows + 2) * kKeepStrip : 1];
    if (extras && p.dropout.threshold) keep_strip(p.dropout, rows.begin, rows.size(), kept_from, keep);
    float bias[kTileWidth];
    for (int64_t c = columns.begin; c < columns.end; c += kLanes)
        store(bias + (c - columns.begin), added ? load_any(offset(added, p.bias_dtype, c), p.bias_dtype, lanes_left(c, columns.end)) : zero());
    for (int64_t r = rows.begin; r < rows.end; r++, sums += ld) {
        void *target = offset(p.c.data, dtype, r * p.c.stride[0]);
        if (is_block && r + kAhead < rows.end)
            for (int64_t c = columns.begin; c < columns.end; c += 64 / size_of(dtype)) __builtin_prefetch(offset(target, dtype, kAhead * p.c.stride[0] + c), 1);
        over_columns(columns.size(), [&](int64_t at, int width) {
            const int64_t c = columns.begin + at;
            const vfloat pre = load_any(sums + at, FASTATTN_FLOAT32, width) + load(bias + at);
            if (extras && p.pre.data) store_any(offset(p.pre.data, dtype, r * p.pre.stride[0] + c), dtype, pre, width);
            vfloat v = activate<activation>(pre);
            if (extras && p.multiplier.data) v *= load_any(offset(p.multiplier.data, dtype, r * p.multiplier.stride[0] + c), dtype, width);
            if (extras && p.dropout.threshold) v = drop(v, p.dropout, keep + (r - rows.begin) * kKeepStrip + (c - kept_from));
            store_any(offset(target, dtype, c), dtype, v, width);
        });
    }
}

void finish(const fastattn_gemm &p, const float *sums, int64_t ld, Range rows, Range columns, const void *added) {
    with_dtype(p.dtype, [&]<int dtype>() {
        with_activation(p.activation, [&]<int activation>() {
            if (has_extras(p)) finish_rows<dtype, activation, true>(p, sums, ld, rows, columns, added);
            else finish_rows<dtype, activation, false>(p, sums, ld, rows, columns, added);
        });
    });
}

Operand left_operand(const fastattn_gemm &p) { return {p.a.data, p.dtype, p.a.stride[0], p.a.stride[1]}; }
Operand right_operand(const fastattn_gemm &p) { return {p.b.data, p.dtype, p.b.stride[0], p.b.stride[1]}; }

constexpr int64_t kFewExact = 8;  // up to so many rows float32 is not rounded, whose time is that of reading B

FewRows few_rows(const fastattn_gemm &p) { return {p.m, p.n, p.k, right_operand(p), p.m > kFewExact && is_rounded(p.dtype, p.rounds_float32)}; }

// Whether packing B would not pay for itself, or multiplying by a B that was packed before is slower.
bool has_few_rows(const fastattn_gemm &p, bool is_packed) {
    if (p.a.stride[1] != 1) return false;
    return few_rows(p).are_few(is_packed);
}

int few_rows_product(const fastattn_gemm &p) {
    const FewRows product = few_rows(p);
    const int64_t left_floats = product.left_floats();
    Scratch left(left_floats);
    if (left.failed()) return FASTATTN_OUT_OF_MEMORY;
    const void *a = p.a.data;
    int64_t lda = p.a.stride[0];
    if (left_floats) {
        float *target = left.take(left_floats);
        product.convert({p.a.data, p.dtype, p.a.stride[0]}, target);
        a = target, lda = product.left_stride();
    }
    const int64_t panel = product.panel(), scratch_floats = product.scratch_floats();
    int status = FASTATTN_OK;
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const MatrixUnit unit(product.uses_matrix_unit());
        Scratch scratch(scratch_floats);
        if (scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
        } else {
            float *sums = scratch.take(scratch_floats);
            const Range mine = part(p.n, kTileWidth, omp_get_num_threads(), omp_get_thread_num());
            for (int64_t first = mine.begin; first < mine.end; first += panel) {
                const Range columns{first, smaller(first + panel, mine.end)};
                product.sums(a, lda, columns, sums, panel);
                for (int64_t c = columns.begin; c < columns.end; c += kTileWidth)
                    finish(p, sums + (c - columns.begin), panel, {0, p.m}, {c, smaller(c + kTileWidth, columns.end)}, p.bias);
            }
        }
    }
    return status;
}

// How B is cut up and packed.
struct Packing {
    Form form;
    Operand b;
    int64_t k;
    int64_t blocks;        // of k
    int64_t together;      // strips packed at once
    bool is_sliced;        // a block of k after the other to the same place
    int64_t strip_floats;  // in all of k, or a block of it
    int64_t chunk_strips;  // a chunk's, which has about `floats`

    Packing(const fastattn_gemm &p, Form form_, int64_t floats, bool is_sliced_ = false)
        : form(form_),
          b(right_operand(p)),
          k(p.k),
          blocks(larger(1, (p.k + kDepth - 1) / kDepth)),
          together(strips_at_once(form, b)),
          is_sliced(is_sliced_),
          strip_floats(larger(1, form.elements(is_sliced ? smaller(p.k, kDepth) : p.k)) * form.strip_width()),
          chunk_strips(is_sliced && together > 1 ? together : round_up(larger(1, smaller(form.strips(p.n), floats / strip_floats)), together)) {}

    // Where a block of k of a strip begins.
    int64_t at(Range depth) const { return is_sliced ? 0 : form.right_depth(depth.begin); }
    // What a product of m rows and block d of these columns brings in meanwhile: the block that is packed after it, the first one of the next columns,
    // up to `end`, where d is the last.
    PartsAhead next(int64_t d, Range columns, int64_t end, int64_t m) const {
        const int64_t depth = form.depth(depth_block(k, d).size()), steps = m / kTileRows * form.strips(columns.size()) * depth;
        if (d + 1 == blocks) columns = {columns.end, smaller(end, columns.end + columns.size())};
        const Range block = depth_block(k, (d + 1) % blocks);
        const bool by_columns = b.down == 1;
        const int64_t rows = by_columns ? columns.size() : block.size(), bytes = (by_columns ? block : columns).size() * size_of(b.dtype);
        if (rows == 0 || bytes == 0 || steps < rows) return {};
        int shift = 0;
        while (steps >> (shift + 1) >= rows && depth >> (shift + 1)) shift++;
        const int64_t stride = (by_columns ? b.across : b.down) * size_of(b.dtype), spread = bytes + 63;  // a row may end within a line
        return {(const char *)b.at(block.begin, columns.begin), stride, rows, (spread + (1 << shift) - 1) >> shift, shift};
    }
    // Items of a chunk that can be packed one by one.
    int64_t items(Range columns) const { return (form.strips(columns.size()) + together - 1) / together * blocks; }
    // One of them to its place in `packed`. True when an element does not split.
    bool pack(Range columns, int64_t item, float *packed) const {
        const int64_t strip = item / blocks * together, width = form.strip_width();
        const Range depth = depth_block(k, item % blocks);
        const Range strips{columns.begin + strip * width, smaller(columns.begin + (strip + together) * width, columns.end)};
        float *target = packed + strip * strip_floats + at(depth);
        if (together == 1) return pack_strip(form, b, depth, strips, target);
        return pack_strips_of_rows(form, b, depth, strips, target, strip_floats);
    }
};

// A by rows that is rounded before it is multiplied: once for all strips of B, which read it in place then. With AMX A is rounded as it goes to its blocks.
class RoundedLeft {
  public:
    RoundedLeft(const fastattn_gemm &p, Form form) : a_(left_operand(p)), m_(p.m), k_(p.k), scratch_(floats(form)) {
        if (scratch_.failed() || !floats(form)) return;
        float *words = scratch_.take(0);
#if defined(__AVX512BF16__)
#pragma omp parallel for num_threads(p.n_threads) schedule(static) if (p.n_threads > 1)
        for (int64_t r = 0; r < m_; r++)
            pack_words_in_rows<1>({a_.at(r, 0), a_.dtype, a_.down}, 1, k_, {words + r * stride(), stride(), 0, 16, 0}, stride());
#endif
        a_ = {words, FASTATTN_BFLOAT16, 2 * stride(), 1};
    }
    bool failed() const { return scratch_.failed(); }
    // A in this form, or the tensor where it is not rounded.
    const Operand &operand() const { return a_; }

  private:
    int64_t stride() const { return round_up(k_ / 2, kLanes); }
    int64_t floats(Form form) const {
        const bool is_used = !kWordBlocks && form.parts && a_.dtype == FASTATTN_FLOAT32 && a_.across == 1 && k_ % 2 == 0;
        return is_used && m_ * stride() <= kMostLeftFloats ? m_ * stride() : 0;
    }

    Operand a_;
    int64_t m_, k_;
    Scratch scratch_;
};

// All of A in the blocks of the matrix unit, packed once for all chunks of B by the threads together: depth block by depth block, as pack_left() has it.
// Parts of float32 are no faster so (measured).
class BlockedLeft {
  public:
    BlockedLeft(const fastattn_gemm &p, Form form)
        : a_(left_operand(p)), m_(p.m), k_(p.k), form_(form), scratch_(is_used() ? block_floats() * depths() : 0) {
        if (!scratch_.failed()) words_ = scratch_.take(0);
    }
    bool is_used() const { return kWordBlocks && form_.parts && form_.parts < 3 && k_ > 0 && block_floats() * depths() <= kMostLeftFloats; }
    bool failed() const { return scratch_.failed(); }

    int64_t items() const { return is_used() ? row_parts() * depths() : 0; }
    // Packs one of them. True when an element does not split.
    bool pack(int64_t item) const {
        const int64_t d = item / row_parts(), first = item % row_parts() * kBlockRows;
        bool nonfinite = false;
        const Range depth = depth_block(k_, d);
        pack_left(form_, a_, {first, smaller(first + kBlockRows, m_)}, depth, (float *)at(first, d).data, nonfinite);
        return nonfinite;
    }
    // The rows from `row` on, a multiple of kWordRows, of depth block d.
    Left at(int64_t row, int64_t d) const {
        const int64_t stride = form_.depth(depth_block(k_, d).size()) * form_.parts * 16;
        return {words_ + d * block_floats() + row / 16 * stride, stride, Layout::rows, form_.parts};
    }

  private:
    int64_t depths() const { return (k_ + kDepth - 1) / kDepth; }
    int64_t row_parts() const { return (m_ + kBlockRows - 1) / kBlockRows; }
    int64_t block_floats() const { return round_up(m_, 16) * form_.elements(smaller(kDepth, k_)); }

    Operand a_;
    int64_t m_, k_;
    Form form_;
    Scratch scratch_;
    float *words_ = nullptr;
};

// One thread's rows.
class Worker {
  public:
    Worker(const fastattn_gemm &p, const Operand &a, Form form, const Packing &packing, const BlockedLeft &left)
        : p_(p), a_(a), form_(form), packing_(packing), blocked_(left), scratch_(Scratch::padded(left_floats()) + Scratch::padded(sum_floats())) {
        if (scratch_.failed()) return;
        left_ = scratch_.take(left_floats());
        sums_ = scratch_.take(sum_floats());
    }
    bool failed() const { return scratch_.failed(); }
    // Whether words could not hold an element of A.
    bool nonfinite() const { return nonfinite_; }

    // C(rows, columns); `packed` begins with the strip of the first column.
    void run(Range rows, Range columns, const float *packed) {
        const MatrixUnit unit;
        for (int64_t r = rows.begin; r < rows.end; r += kBlockRows) block({r, smaller(r + kBlockRows, rows.end)}, columns, packed);
    }

    // The products of block d of k, added to the sums of all rows; `packed` holds nothing else. `ahead` is fetched meanwhile.
    void run_slice(int64_t d, Range columns, const float *packed, PartsAhead ahead) {
        fetches_.parts = ahead;
        for (int64_t r = 0; r < p_.m; r += kBlockRows)
            slice(d, {r, smaller(r + kBlockRows, p_.m)}, columns, packed, sums_ + r / kBlockRows * block_sums());
    }

  private:
    static constexpr int64_t kNearBlocks = 3;  // of k

    int64_t left_floats() const { return blocked_.is_used() ? 0 : kBlockRows * larger(1, form_.parts) * round_up(form_.depth(smaller(kDepth, p_.k)), 16); }
    int64_t sum_floats() const { return block_sums() * (packing_.is_sliced ? (p_.m + kBlockRows - 1) / kBlockRows : 1); }

    int64_t block_sums() const { return kBlockRows * form_.strip_width() * (packing_.blocks > 1 ? packing_.chunk_strips : 1); }

    // Sums over k in blocks are kept for a whole block of rows: of all columns, or of a strip where a level-2 cache holds all of k of the rows.
    void block(Range rows, Range columns, const float *packed) {
        if (blocked_.is_used() && packing_.blocks > 1 && packing_.blocks <= kNearBlocks) return strip_by_strip(rows, columns, packed);
        for (int64_t d = 0; d < packing_.blocks; d++) slice(d, rows, columns, packed, sums_);
    }

    void slice(int64_t d, Range rows, Range columns, const float *packed, float *sums_of_block) {
        const int64_t width = form_.strip_width();
        const Range k = depth_block(p_.k, d);
        const Left left = blocked_.is_used() ? blocked_.at(rows.begin, d) : pack_left(form_, a_, rows, k, left_, nonfinite_);
        for (int64_t c = columns.begin; c < columns.end; c += width) {
            const Range strip{c, smaller(c + width, columns.end)};
            const int64_t index = (c - columns.begin) / width;
            const float *b = packed + index * packing_.strip_floats + packing_.at(k);
            const Ahead ahead = fetched(c + width < columns.end ? b + packing_.strip_floats : nullptr, rows);
            if (packing_.blocks == 1) {
                tiles(left, k, b, rows, strip, ahead);
                continue;
            }
            float *sums = sums_of_block + index * kBlockRows * width;
            multiply(rows.size(), vectors(strip), form_.depth(k.size()), left, b, width, sums, width, d > 0, nullptr, ahead, &fetches_);
            if (d + 1 == packing_.blocks) finish(p_, sums, width, rows, strip, p_.bias);
        }
    }

    void strip_by_strip(Range rows, Range columns, const float *packed) {
        const int64_t width = form_.strip_width();
        for (int64_t c = columns.begin; c < columns.end; c += width, packed += packing_.strip_floats) {
            const Range strip{c, smaller(c + width, columns.end)};
            for (int64_t d = 0; d < packing_.blocks; d++) {
                const Range k = depth_block(p_.k, d);
                const float *b = packed + form_.right_depth(k.begin), *next = b + form_.right_depth(k.size());
                const bool is_last = d + 1 == packing_.blocks && c + width >= columns.end;
                multiply(rows.size(), vectors(strip), form_.depth(k.size()), blocked_.at(rows.begin, d), b, width, sums_, width, d > 0, nullptr,
                         fetched(is_last ? nullptr : next, rows));
            }
            finish(p_, sums_, width, rows, strip, p_.bias);
        }
    }

    // What is multiplied next comes in while the rows of a block go through this.
    Ahead fetched(const float *data, Range rows) const {
        const int64_t lines = kWordDepth * larger(1, form_.parts) * kWordVectors, tiles = (rows.size() + kWordRows - 1) / kWordRows;
        return {data, data ? (lines + tiles - 1) / tiles : 0};
    }

    // With a single block of k tiles are finished while they are hot, with AMX one by one. Whole vectors of float32, or of words, go to C at once, where
    // they may be all there is to do.
    void tiles(Left left, Range k, const float *packed, Range rows, Range strip, Ahead ahead) {
        const bool by_tile = kWordBlocks && form_.parts;
        const int64_t step = form_.tile_rows() * (by_tile ? 1 : kFinishedTiles), width = form_.strip_width(), depth = form_.depth(k.size());
        const bool is_whole = strip.size() % kLanes == 0, is_plain = p_.activation == FASTATTN_ACT_NONE && !has_extras(p_);
#if defined(FASTATTN_ROUNDS_TILES)
        if (p_.dtype == FASTATTN_BFLOAT16 && form_.parts && is_whole && is_plain) return rounded_tiles(left, depth, packed, rows, strip);
#endif
        const bool straight = p_.dtype == FASTATTN_FLOAT32 && !form_.parts && is_whole && (!p_.bias || p_.bias_dtype == FASTATTN_FLOAT32);
        const float *bias = straight && p_.bias ? (const float *)p_.bias + strip.begin : nullptr;
        if (straight && is_plain) {
            float *c = (float *)p_.c.data + rows.begin * p_.c.stride[0] + strip.begin;
            return multiply(rows.size(), vectors(strip), depth, left, packed, width, c, p_.c.stride[0], false, bias, ahead, &fetches_);
        }
        for (int64_t r = rows.begin; r < rows.end; r += step) {
            const Range tile{r, smaller(r + step, rows.end)};
            if (by_tile) fetch(tile, strip);
            float *sums = straight ? (float *)p_.c.data + r * p_.c.stride[0] + strip.begin : sums_;
            const int64_t ld = straight ? p_.c.stride[0] : width;
            multiply(tile.size(), vectors(strip), depth, left, packed, width, sums, ld, false, bias, ahead, &fetches_);
            finish(p_, sums, ld, tile, strip, straight ? nullptr : p_.bias);
            left.data += form_.left_rows(left, step);
            ahead.data += depth / kWordDepth * ahead.lines * 16;
        }
    }

#if defined(FASTATTN_ROUNDS_TILES)
    void rounded_tiles(Left left, int64_t depth, const float *packed, Range rows, Range strip) {
        float bias[kTileWidth];
        for (int64_t c = strip.begin; p_.bias && c < strip.end; c += kLanes)
            store(bias + (c - strip.begin), load_any(offset(p_.bias, p_.bias_dtype, c), p_.bias_dtype, kLanes));
        const int64_t ld = p_.c.stride[0];
        uint16_t *c = (uint16_t *)p_.c.data + rows.begin * ld + strip.begin;
        multiply_to_bfloat16(rows.size(), vectors(strip), depth, left, packed, form_.strip_width(), c, ld, p_.bias ? bias : nullptr, &fetches_);
    }
#endif

    // The lines of C are on their way while the sums are formed.
    void fetch(Range tile, Range strip) const {
        for (int64_t r = tile.begin; r < tile.end; r++)
            for (int64_t c = strip.begin; c < strip.end; c += 64 / size_of(p_.dtype)) __builtin_prefetch(offset(p_.c.data, p_.dtype, r * p_.c.stride[0] + c), 1);
    }

    static int64_t vectors(Range strip) { return (strip.size() + kLanes - 1) / kLanes; }

    const fastattn_gemm &p_;
    const Operand &a_;
    Form form_;
    const Packing &packing_;
    const BlockedLeft &blocked_;
    Scratch scratch_;
    Fetches fetches_;
    float *left_ = nullptr, *sums_ = nullptr;
    bool nonfinite_ = false;
};

// How many of the threads split the columns: the least work for the busiest one, whose rows of A cost as much to bring in as a strip does to
// multiply.
int64_t column_parts(Form form, int64_t m, int64_t columns, int64_t threads) {
    const int64_t tiles = (m + kTileRows - 1) / kTileRows, strips = form.strips(columns);
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t parts = 1; parts <= threads; parts++) {
        if (threads % parts) continue;
        const int64_t rows = (tiles + threads / parts - 1) / (threads / parts) * kTileRows;
        const int64_t cost = rows * ((strips + parts - 1) / parts + 1);
        if (cost < best_cost) best = parts, best_cost = cost;
    }
    return best;
}

struct Outcome {
    int status = FASTATTN_OK;
    bool nonfinite = false;
};

Outcome packed_product(const fastattn_gemm &p, const Operand &a, Form form, const float *kept) {
    const Packing packing(p, form, form.parts == 3 ? kSplitChunkFloats : kChunkFloats);
    const int64_t width = form.strip_width(), chunk_columns = packing.chunk_strips * width;
    Outcome outcome;
    Scratch scratch(kept ? 0 : packing.chunk_strips * packing.strip_floats);
    const BlockedLeft left(p, form);
    if (scratch.failed() || left.failed()) return {FASTATTN_OUT_OF_MEMORY};
    float *made = scratch.take(0);
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        Worker worker(p, a, form, packing, left);
        bool nonfinite = false;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < left.items(); item++) nonfinite |= left.pack(item);
        for (int64_t first = 0; first < p.n; first += chunk_columns) {
            const Range columns{first, smaller(first + chunk_columns, p.n)};
            const float *packed = kept ? kept + first / width * packing.strip_floats : made;
            if (!kept) {
#pragma omp for schedule(static)
                for (int64_t item = 0; item < packing.items(columns); item++) nonfinite |= packing.pack(columns, item, made);
            }
            const int64_t across = column_parts(form, p.m, columns.size(), threads);
            const Range rows = part(p.m, form.tile_rows(), threads / across, thread / across);
            const Range mine = part(columns.size(), width, across, thread % across);
            if (!worker.failed() && rows.size() > 0 && mine.size() > 0)
                worker.run(rows, {first + mine.begin, first + mine.end}, packed + mine.begin / width * packing.strip_floats);
            if (!kept) {
#pragma omp barrier
            }
        }
#pragma omp critical
        {
            if (worker.failed()) outcome.status = FASTATTN_OUT_OF_MEMORY;
            outcome.nonfinite |= nonfinite || worker.nonfinite();
        }
    }
    return outcome;
}

// Each thread packs the strips of B that it multiplies, a few at a time, which its level-2 cache holds: nothing is shared, nobody waits. All rows of
// A go by for every such group, or up to kSlicedRows of them for every block of k of it, while the next block of B comes in.
Outcome own_strips_product(const fastattn_gemm &p, const Operand &a, Form form, const float *kept) {
    const bool is_sliced = !kept && !(kWordBlocks && form.parts) && p.m <= kSlicedRows;
    const Packing packing(p, form, kOwnFloats, is_sliced);
    const int64_t width = form.strip_width(), group_columns = packing.chunk_strips * width;
    const BlockedLeft left(p, form);
    if (left.failed()) return {FASTATTN_OUT_OF_MEMORY};
    Outcome outcome;
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        Worker worker(p, a, form, packing, left);
        Scratch scratch(kept ? 0 : packing.chunk_strips * packing.strip_floats);
        const Range mine = part(p.n, width, omp_get_num_threads(), omp_get_thread_num());
        const bool failed = worker.failed() || scratch.failed();
        float *made = failed ? nullptr : scratch.take(0);
        bool nonfinite = false;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < left.items(); item++) nonfinite |= left.pack(item);
        for (int64_t first = mine.begin; first < mine.end && !failed; first += group_columns) {
            const Range columns{first, smaller(first + group_columns, mine.end)};
            if (packing.is_sliced) {
                for (int64_t d = 0; d < packing.blocks; d++) {
                    for (int64_t item = d; item < packing.items(columns); item += packing.blocks) nonfinite |= packing.pack(columns, item, made);
                    worker.run_slice(d, columns, made, packing.next(d, columns, mine.end, p.m));
                }
                continue;
            }
            for (int64_t item = 0; item < packing.items(columns) && !kept; item++) nonfinite |= packing.pack(columns, item, made);
            worker.run({0, p.m}, columns, kept ? kept + first / width * packing.strip_floats : made);
        }
#pragma omp critical
        {
            if (failed) outcome.status = FASTATTN_OUT_OF_MEMORY;
            outcome.nonfinite |= nonfinite || worker.nonfinite();
        }
    }
    return outcome;
}

// Up to kOwnRows rows of A, read in place by every thread, or words of it that a level-2 cache holds, and enough strips for all threads to have as many.
bool has_own_strips(const fastattn_gemm &p, const Operand &a, Form form) {
    const int64_t strips = form.strips(p.n), busiest = (strips + p.n_threads - 1) / p.n_threads;
    const bool stays_near = kWordBlocks && form.parts ? form.parts < 3 && p.m * form.elements(p.k) <= kOwnLeftFloats
                                                      : p.m <= kOwnRows && is_read_in_place(form, a, p.k);
    return stays_near && busiest * p.n_threads * 4 <= strips * 5;
}

// That of a B that is kept. The parts of float32 belong to many rows, where packing is little of the work, and take half as much memory again.
Form kept_form(const fastattn_gemm &p) { return {p.dtype == FASTATTN_BFLOAT16 || is_rounded(p.dtype, p.rounds_float32) ? kBfloat16Parts : 0}; }

// Whether a kept B is read at all. Halves that are multiplied as float32 would take twice their memory, to gain 1.00 to 1.07 times the speed (1.22 in
// float16 with AVX-512 where rows are 4 KiB apart).
bool is_kept(const fastattn_gemm &p) { return (p.dtype == FASTATTN_FLOAT32 || kept_form(p).parts) && form_of(p.dtype, p.rounds_float32, p.m).parts == kept_form(p).parts; }

}  // namespace

int gemm(const fastattn_gemm &p) {
    if (p.m == 0 || p.n == 0) return FASTATTN_OK;
    const Form form = form_of(p.dtype, p.rounds_float32, p.m);
    const float *kept = kept_strips(p.packed, form, p.dtype, p.k, p.n);
    if (has_few_rows(p, kept)) return few_rows_product(p);
    const RoundedLeft left(p, form);
    if (left.failed()) return FASTATTN_OUT_OF_MEMORY;
    const Operand &a = left.operand();
    const Outcome outcome = has_own_strips(p, a, form) ? own_strips_product(p, a, form, kept) : packed_product(p, a, form, kept);
    // Infinity and NaN do not split into parts: such a product, rare as it is, is made again without.
    if (outcome.nonfinite && form.parts > 1) return packed_product(p, a, Form{0}, nullptr).status;
    return outcome.status;
}

// Whether float32 is rounded to bfloat16, but for few rows.
int gemm_is_rounded(const fastattn_gemm &p) { return is_rounded(p.dtype, p.rounds_float32); }

int packed_bytes(const fastattn_packing &packing) {
    const fastattn_gemm &p = *packing.product;
    const Form form = kept_form(p);
    const bool is_read = p.m > 0 && p.n > 0 && is_kept(p) && !has_few_rows(p, true);
    *packing.bytes = is_read ? (int64_t)sizeof(PackedHeader) + form.strips(p.n) * Packing(p, form, 0).strip_floats * 4 : 0;
    return FASTATTN_OK;
}

int pack(const fastattn_packing &packing) {
    const fastattn_gemm &p = *packing.product;
    const Packing whole(p, kept_form(p), 0);
    PackedHeader &header = *(PackedHeader *)packing.packed;
    header = packed_header(whole.form, p.dtype, p.k, p.n);
    const Range columns{0, p.n};
#pragma omp parallel for num_threads(p.n_threads) schedule(static) if (p.n_threads > 1)
    for (int64_t item = 0; item < whole.items(columns); item++) whole.pack(columns, item, (float *)(&header + 1));
    return FASTATTN_OK;
}

FASTATTN_NAMESPACE_END
