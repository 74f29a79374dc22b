// C = dropout(act(A B + bias) * multiplier): the matrix product behind linear_act, ffn and gated_ffn, forward and backward.
//
// Numerics: float32 accumulators; sums over k are blocked (kDepth), which keeps their error near that of one block; one rounding to the
//   tensors' dtype at the end. bfloat16 is multiplied in pairs where AMX or AVX-512 BF16 is there: exact products, float32 sums. With AMX
//   float32 is, too, from kSplitRows rows on, as three bfloat16 parts (pairs.h): 0.5 to 0.7 of the error MKL's float32 product has.
// Algorithm: C is made in chunks of columns whose packed B fits the level-2 cache. The threads pack a chunk together, in strips of kTileWidth
//   columns, then share out the chunk's C as a grid; each walks its part in blocks of rows, blocks of k and tiles of the micro-kernel. A is
//   read in place when it is float32 by rows. The epilogue runs on a finished tile while it is in the level-1 cache.
//
// Ladder, float32, GFLOP/s at (m, k, n) = (2880, 384, 384), (2880, 384, 1536), (2880, 1536, 384) on 2 cores of an Intel Xeon with AMX (model 167, VM),
// 2026-11-22; torch 2.13 with MKL in the same runs: 339, 338, 325.
//   300, 267, 317  packed strips, tiles through a buffer
//   323, 324, 312  finished tiles straight into C, whose lines are fetched while the sums are formed
//   343, 349, 333  the threads pack B together and prefer to share out rows
//   429, 424, 415  AMX, three bfloat16 parts, blocks of 1 KiB (its own limit there: 8 ns a block product, about 650)
#include <omp.h>

#include "activation.h"
#include "kernels.h"
#include "micro.h"
#include "pack.h"
#include "pairs.h"
#include "philox.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kDepth = 512;            // k in one block, even
constexpr int64_t kBlockRows = 192;        // rows of A in one block, a multiple of every tile's
constexpr int64_t kChunkFloats = 1 << 18;  // packed B in one chunk: 1 MiB
constexpr int64_t kSplitChunkFloats = 1 << 20;  // in three parts, where packing A again for every chunk costs more than B from the shared cache

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

Range part(int64_t total, int64_t step, int64_t parts, int64_t index) {
    const int64_t units = (total + step - 1) / step;
    return {smaller(total, units * index / parts * step), smaller(total, units * (index + 1) / parts * step)};
}

// How the operands of one product are held.
struct Form {
    int parts;  // as in Left

    // Elements of the micro-kernel along k, and those of all parts.
    int64_t depth(int64_t k) const { return parts ? round_up((k + 1) / 2, kWordDepth) : k; }
    int64_t elements(int64_t k) const { return depth(k) * larger(1, parts); }
    int64_t tile_rows() const { return parts ? kWordRows : kTileRows; }
};

// Calls f.template operator()<parts>() for words.
template <class F>
bool with_parts(int parts, F &&f) {
    if constexpr (kFloat32Parts > 0) {
        if (parts == 3) return f.template operator()<3>();
    }
    if constexpr (kBfloat16Parts > 0) return f.template operator()<1>();
    return false;
}

// A strip of B: k x (up to kTileWidth) columns, lanes beyond p.n zero. True when an element does not split.
bool pack_strip(const fastattn_gemm &p, [[maybe_unused]] Form form, Range k, int64_t column, float *target) {
    const int64_t columns = smaller(kTileWidth, p.n - column);
    const void *start = offset(p.b.data, p.dtype, k.begin * p.b.stride[0] + column * p.b.stride[1]);
    const bool transposed = p.b.stride[0] == 1;
    const Rows source{start, p.dtype, p.b.stride[transposed ? 1 : 0]};
#if defined(__AVX512BF16__)
    if (form.parts)
        return with_parts(form.parts, [&]<int parts>() {
            const int64_t depth = form.depth(k.size());
            const WordsTarget words = kWordBlocks ? WordsTarget{target, 16, parts * kTileVectors * 256, 256, kTileVectors * 256}
                                                  : WordsTarget{target, kTileWidth, 16 * kTileWidth, 16, 0};
            return transposed ? pack_words_transposed<parts>(source, columns, k.size(), words, depth)
                              : pack_words_of_row_pairs<parts>(source, k.size(), columns, words, depth);
        });
#endif
    if (transposed) pack_transposed(source, columns, k.size(), 1.0f, target, kTileWidth, (columns + kLanes - 1) / kLanes);
    else pack_rows(source, k.size(), columns, 1.0f, target, kTileWidth);
    return false;
}

// A block of A for the micro-kernel: in place when possible, else copied into `scratch`. `nonfinite` is set when an element does not split.
Left pack_left(const fastattn_gemm &p, [[maybe_unused]] Form form, Range rows, Range k, float *scratch, [[maybe_unused]] bool &nonfinite) {
    const void *start = offset(p.a.data, p.dtype, rows.begin * p.a.stride[0] + k.begin * p.a.stride[1]);
    const bool by_rows = p.a.stride[1] == 1;
    const Rows source{start, p.dtype, p.a.stride[by_rows ? 0 : 1]};
    const int64_t wide_rows = round_up(rows.size(), kLanes);
#if defined(__AVX512BF16__)
    if (form.parts) {
        const int64_t depth = form.depth(k.size());
        const bool columns_kept = !by_rows && !kWordBlocks;
        const int64_t ld = columns_kept ? wide_rows : round_up(depth, kLanes), row_block = form.elements(k.size()) * 16;
        const WordsTarget words =
            kWordBlocks ? WordsTarget{scratch, 16, row_block, form.parts * 256, 256} : WordsTarget{scratch, ld, 16 * ld, 16, 0};
        nonfinite |= with_parts(form.parts, [&]<int parts>() {
            if (by_rows) return pack_words_in_rows<parts>(source, rows.size(), k.size(), words, depth);
            if (columns_kept) return pack_words_of_row_pairs<parts>(source, k.size(), rows.size(), words, depth);
            return pack_words_of_columns<parts>(source, k.size(), rows.size(), words, depth);
        });
        return {scratch, kWordBlocks ? row_block : ld, columns_kept ? Layout::columns : Layout::rows, form.parts};
    }
#endif
    if (!by_rows) {
        pack_rows(source, k.size(), rows.size(), 1.0f, scratch, wide_rows);
        return {scratch, wide_rows, Layout::columns};
    }
    if (p.dtype == FASTATTN_FLOAT32) return {(const float *)start, p.a.stride[0], Layout::rows};
    pack_rows(source, rows.size(), k.size(), 1.0f, scratch, round_up(k.size(), kLanes));
    return {scratch, round_up(k.size(), kLanes), Layout::rows};
}

// A strip and what lies before it in its first 32 columns is a strip of keep masks.
static_assert(kTileWidth + 32 - (kTileWidth & -kTileWidth) <= kKeepStrip);

bool has_extras(const fastattn_gemm &p) { return p.pre.data || p.multiplier.data || p.dropout.threshold; }

// Finished sums of a strip into C, by whole vectors and the last part of a row. `added` is the bias where the sums do not hold it yet.
template <int dtype, int activation, bool extras>
void finish_rows(const fastattn_gemm &p, const float *sums, int64_t ld, Range rows, Range columns, const void *added) {
    const int64_t kept_from = columns.begin / 32 * 32;
    int16_t keep[extras ? (kBlockRows + 2) * kKeepStrip : 1];
    if (extras && p.dropout.threshold) keep_strip(p.dropout, rows.begin, rows.size(), kept_from, keep);
    for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
        const int width = lanes_left(c, columns.end);
        const vfloat bias = added ? load_any(offset(added, p.bias_dtype, c), p.bias_dtype, width) : zero();
        const float *source = sums + (c - columns.begin);
        for (int64_t r = rows.begin; r < rows.end; r++, source += ld) {
            const vfloat pre = load_any(source, FASTATTN_FLOAT32, width) + bias;
            if (extras && p.pre.data) store_any(offset(p.pre.data, dtype, r * p.pre.stride[0] + c), dtype, pre, width);
            vfloat v = activate<activation>(pre);
            if (extras && p.multiplier.data) v *= load_any(offset(p.multiplier.data, dtype, r * p.multiplier.stride[0] + c), dtype, width);
            if (extras && p.dropout.threshold) v = drop(v, p.dropout, keep + (r - rows.begin) * kKeepStrip + (c - kept_from));
            store_any(offset(p.c.data, dtype, r * p.c.stride[0] + c), dtype, v, width);
        }
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

constexpr int64_t kFewRows = 32;

// Whether packing B would not pay for itself.
bool few_rows(const fastattn_gemm &p) {
    return p.m <= kFewRows && p.dtype == FASTATTN_FLOAT32 && p.a.stride[1] == 1 && p.b.stride[0] == 1;
}

int few_rows_product(const fastattn_gemm &p) {
    const int64_t strips = (p.n + kTileWidth - 1) / kTileWidth;
#pragma omp parallel for num_threads(p.n_threads) schedule(static) if (p.n_threads > 1)
    for (int64_t index = 0; index < strips; index++) {
        alignas(64) float sums[kFewRows * kTileWidth];
        const Range strip{index * kTileWidth, smaller((index + 1) * kTileWidth, p.n)};
        const float *b = (const float *)p.b.data + strip.begin * p.b.stride[1];
        multiply_dots(p.m, strip.size(), p.k, (const float *)p.a.data, p.a.stride[0], b, p.b.stride[1], sums, kTileWidth);
        finish(p, sums, kTileWidth, {0, p.m}, strip, p.bias);
    }
    return FASTATTN_OK;
}

// How B is cut up and packed.
struct Packing {
    int64_t blocks;        // of k
    int64_t strip_floats;  // in all of k
    int64_t chunk_strips;  // packed at a time

    Packing(const fastattn_gemm &p, Form form)
        : blocks(larger(1, (p.k + kDepth - 1) / kDepth)),
          strip_floats(larger(1, form.elements(p.k)) * kTileWidth),
          chunk_strips(larger(1, smaller((p.n + kTileWidth - 1) / kTileWidth, (form.parts == 3 ? kSplitChunkFloats : kChunkFloats) / strip_floats))) {}
    Range block(const fastattn_gemm &p, int64_t index) const { return {index * kDepth, smaller((index + 1) * kDepth, p.k)}; }
};

// One thread's rows.
class Worker {
  public:
    Worker(const fastattn_gemm &p, Form form, const Packing &packing)
        : p_(p), form_(form), packing_(packing), scratch_(Scratch::padded(left_floats()) + Scratch::padded(sum_floats())) {
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

  private:
    int64_t left_floats() const { return kBlockRows * larger(1, form_.parts) * round_up(form_.depth(smaller(kDepth, p_.k)), 16); }
    int64_t sum_floats() const { return kBlockRows * kTileWidth * (packing_.blocks > 1 ? packing_.chunk_strips : 1); }

    // Sums over k in blocks are kept for a whole block of rows.
    void block(Range rows, Range columns, const float *packed) {
        for (int64_t d = 0; d < packing_.blocks; d++) {
            const Range k = packing_.block(p_, d);
            const Left left = pack_left(p_, form_, rows, k, left_, nonfinite_);
            for (int64_t c = columns.begin; c < columns.end; c += kTileWidth) {
                const Range strip{c, smaller(c + kTileWidth, columns.end)};
                const int64_t index = (c - columns.begin) / kTileWidth;
                const float *b = packed + index * packing_.strip_floats + form_.elements(k.begin) * kTileWidth;
                if (packing_.blocks == 1) {
                    tiles(left, k, b, rows, strip);
                    continue;
                }
                float *sums = sums_ + index * kBlockRows * kTileWidth;
                multiply(rows.size(), vectors(strip), form_.depth(k.size()), left, b, kTileWidth, sums, kTileWidth, d > 0);
                if (d + 1 == packing_.blocks) finish(p_, sums, kTileWidth, rows, strip, p_.bias);
            }
        }
    }

    // With a single block of k each tile is finished while it is hot. Whole vectors of float32 go to C at once, where they may be all there is to do.
    void tiles(Left left, Range k, const float *packed, Range rows, Range strip) {
        const int64_t step = form_.tile_rows();
        const bool straight = p_.dtype == FASTATTN_FLOAT32 && !form_.parts && strip.size() % kLanes == 0 && (!p_.bias || p_.bias_dtype == FASTATTN_FLOAT32);
        const bool done = straight && p_.activation == FASTATTN_ACT_NONE && !has_extras(p_);
        const float *bias = straight && p_.bias ? (const float *)p_.bias + strip.begin : nullptr;
        for (int64_t r = rows.begin; r < rows.end; r += step) {
            const Range tile{r, smaller(r + step, rows.end)};
            if (!straight) fetch(tile, strip);
            float *sums = straight ? (float *)p_.c.data + r * p_.c.stride[0] + strip.begin : sums_;
            const int64_t ld = straight ? p_.c.stride[0] : kTileWidth;
            multiply(tile.size(), vectors(strip), form_.depth(k.size()), left, packed, kTileWidth, sums, ld, false, bias);
            if (!done) finish(p_, sums, ld, tile, strip, straight ? nullptr : p_.bias);
            left.data += left.parts && kWordBlocks ? step / 16 * left.stride : left.layout == Layout::rows ? step * left.stride : step;
        }
    }

    // The lines of C are on their way while the sums are formed.
    void fetch(Range tile, Range strip) const {
        for (int64_t r = tile.begin; r < tile.end; r++)
            for (int64_t c = strip.begin; c < strip.end; c += 64 / size_of(p_.dtype)) __builtin_prefetch(offset(p_.c.data, p_.dtype, r * p_.c.stride[0] + c), 1);
    }

    static int64_t vectors(Range strip) { return (strip.size() + kLanes - 1) / kLanes; }

    const fastattn_gemm &p_;
    Form form_;
    const Packing &packing_;
    Scratch scratch_;
    float *left_ = nullptr, *sums_ = nullptr;
    bool nonfinite_ = false;
};

// How many of the threads split the columns: the least work for the busiest one, whose rows of A cost as much to bring in as a strip does to
// multiply.
int64_t column_parts(int64_t m, int64_t columns, int64_t threads) {
    const int64_t tiles = (m + kTileRows - 1) / kTileRows, strips = (columns + kTileWidth - 1) / kTileWidth;
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t parts = 1; parts <= threads; parts++) {
        if (threads % parts) continue;
        const int64_t rows = (tiles + threads / parts - 1) / (threads / parts) * kTileRows;
        const int64_t cost = rows * ((strips + parts - 1) / parts + 1);
        if (cost < best_cost) best = parts, best_cost = cost;
    }
    return best;
}

constexpr int64_t kSplitRows = 400;  // splitting B pays from about here on (measured at k and n of 384 and 1536)

struct Outcome {
    int status = FASTATTN_OK;
    bool nonfinite = false;
};

Outcome packed_product(const fastattn_gemm &p, Form form) {
    const Packing packing(p, form);
    const int64_t chunk_columns = packing.chunk_strips * kTileWidth;
    Outcome outcome;
    Scratch scratch(packing.chunk_strips * packing.strip_floats);
    if (scratch.failed()) return {FASTATTN_OUT_OF_MEMORY};
    float *packed = scratch.take(0);
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        Worker worker(p, form, packing);
        bool nonfinite = false;
        for (int64_t first = 0; first < p.n; first += chunk_columns) {
            const int64_t columns = smaller(chunk_columns, p.n - first), strips = (columns + kTileWidth - 1) / kTileWidth;
#pragma omp for schedule(static)
            for (int64_t item = 0; item < strips * packing.blocks; item++) {
                const int64_t strip = item / packing.blocks;
                const Range k = packing.block(p, item % packing.blocks);
                float *target = packed + strip * packing.strip_floats + form.elements(k.begin) * kTileWidth;
                nonfinite |= pack_strip(p, form, k, first + strip * kTileWidth, target);
            }
            const int64_t across = column_parts(p.m, columns, threads);
            const Range rows = part(p.m, form.tile_rows(), threads / across, thread / across), mine = part(columns, kTileWidth, across, thread % across);
            if (!worker.failed() && rows.size() > 0 && mine.size() > 0)
                worker.run(rows, {first + mine.begin, first + mine.end}, packed + mine.begin / kTileWidth * packing.strip_floats);
#pragma omp barrier
        }
#pragma omp critical
        {
            if (worker.failed()) outcome.status = FASTATTN_OUT_OF_MEMORY;
            outcome.nonfinite |= nonfinite || worker.nonfinite();
        }
    }
    return outcome;
}

}  // namespace

int gemm(const fastattn_gemm &p) {
    if (p.m == 0 || p.n == 0) return FASTATTN_OK;
    if (few_rows(p)) return few_rows_product(p);
    const Form form{p.dtype == FASTATTN_BFLOAT16 ? kBfloat16Parts : p.dtype == FASTATTN_FLOAT32 && p.m >= kSplitRows ? kFloat32Parts : 0};
    const Outcome outcome = packed_product(p, form);
    // Infinity and NaN do not split into parts: such a product, rare as it is, is made again without.
    if (outcome.nonfinite && form.parts == 3) return packed_product(p, Form{0}).status;
    return outcome.status;
}

FASTATTN_NAMESPACE_END
