// Attention forward: out = softmax(scale q k^T, softcapped, + bias, masked; one extra logit for a sink) v, and its log-sum-exp.
//
// Shapes: q (B,Hq,Sq,D), k (B,Hkv,Skv,D), v (B,Hkv,Skv,Dv), out (B,Hq,Sq,Dv), lse (B,Hq,Sq); float32, bfloat16, float16; any strides with a
//   contiguous last dimension; a head group shares its K and V.
// Numerics: scores, softmax and sums in float32, the scale folded into the queries or, of pairs, the softmax; a query that sees no key gives 0 and -inf.
//   bfloat16 is multiplied in pairs where AVX-512 BF16 or AMX is there (pair_tile.h), which take subnormal numbers for 0.
// Algorithm: online softmax (softmax.h) over tiles of up to 48 queries, with AMX 64 in bfloat16, x 64 keys. Blocks of keys that no query of
//   the tile sees are not visited, fully visible ones run no mask code (mask.h). Work is shared out by (batch, head, query tile).
//
// Ladder, float32, GFLOP/s at (B, H, S, D) = (8, 12, 360, 32) and (1, 8, 2048, 64) on 2 cores of an Intel Xeon (model 167, VM), 2026-11-22; torch
// 2.13's flash kernel in the same run: 137, 216; in that of the last line, made when the machine was faster: 151, 250.
//   157, 226  one vector of queries at a time through the softmax
//   199, 240  all vectors of a row at once, no fetching of C for short sums
//   198, 293  a thread takes neighbouring tiles; the next tile's queries and the lines of the output are fetched meanwhile (a tenth, 3%)
// Of one core's time at D = 64 the products take 0.86, at 85% of what the core can do, and the softmax 0.1.
// Tried without gain: key blocks of 32, 48, 96 and 128; copying K and V blocks to contiguous memory (a tenth slower); fetching a block's values
//   before its scores.
//
// Masks, (1, 8, 8192, 64), same day: a causal window of 256 keys takes 1/40 of the time that torch's scaled_dot_product_attention takes with that
//   mask as a bool tensor; given the bool tensor itself, 1/16. Block masks of density 0.50, 0.26, 0.11, 0.06 take 1.08, 1.10, 1.18, 1.30 times
//   their share of the dense time.
// On 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-25: that window at 8 heads takes 1/34 of torch's time, 36 ms, and 1/2.6 of compiled
//   FlexAttention's at 4,096.
// There, 2026-11-26, block masks of density 0.50, 0.25, 0.10, 0.05 by what is fetched how, times their share of the dense time, medians of two runs:
//   1.07, 1.11, 1.21, 1.35 at (1, 8, 4096, 64)   1.06, 1.11, 1.14, 1.20 at (1, 8, 8192, 64)   a block to jump to, the output and queries in bursts
//   1.03, 1.06, 1.10, 1.22                       1.03, 1.04, 1.08, 1.10                       a few lines with every few rows of the products,
//                                                                                           a block by the first tile of its row alone
//   On 2 cores of an AMD EPYC (Zen 5, AVX-512, VM), 2026-11-27, density 0.05, (1, 8, 4096, 64) and (1, 2, 4096, 64), whose keys stay in the caches:
//   1.37, 1.19   as the last line
//   1.27, 1.18   a row's last tile fetches what the next row begins with
//   1.24, 1.12   the logarithms of a tile's sums by vectors: libm's took 27 ns each, as much as a third of a block per tile
//   There, in one run at (1, 8, 8192, 64): a causal window of 256 keys 1/59 of torch's time forward, 1/56 with the backward; 1/2.5 of FlexAttention's.
//   With no fetching of blocks at all 0.05 took 2% longer than with the latter, the bursts 10%.
// bfloat16, ms at (1, 8, 1024, D) for D of 32, 64, 128 on that machine with AVX-512 BF16; torch in the same runs: its scaled_dot_product_attention 7.4,
//   12.1, 22.2, products and softmax one after the other 4.1, 5.5, 12.2:
//   3.6, 6.3, 11.7   keys and values converted to float32, block by block
//   2.3, 3.6,  6.4   products of pairs
// bfloat16 with AMX, times as fast as by float32, medians of calls in turns, one core of an Intel Xeon (Emerald Rapids, VM), 2026-11-28, at (2, 12, 512,
//   64), (1, 8, 1024, D) for D of 32, 64, 128, 256 and 80, causal (1, 12, 1024, 64) and a causal window of 256 at (1, 12, 4096, 64):
//   1.9  1.6  2.0  2.2  2.3  1.6  1.9  1.6   keys read where they lie, values transposed block by block
//   2.6  2.5  2.8  4.1  3.1  2.8  2.6  2.0   values, and keys that fill no blocks, kept for a head's tiles; the softmax writes pairs, its base follows late
//   Tried: scalef of numbers below 2^-126, whose making costs more than masking them: causal 0.6.
// Rows of keys and values far apart, as (B, S, H, D) has them, cost 11% at 12 heads x 64 and 26% at 16, whose rows share sixteen sets of the level-2
//   cache; the caller passes copies of those that are read often.
#include "../kernels.h"
#include "pair_tile.h"
#include "softmax.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

struct Buffers {
    explicit Buffers(const fastattn_attention &p)
        : scratch(kMaxLanes * (lane_rows(p.dim_qk) + p.dim_v) + kKeyBlock * (2 * kMaxLanes + round_up(p.dim_qk, kLanes) + round_up(p.dim_v, kLanes) + seen_width(p)) +
                  WordBlocks::floats(p, WordBlocks::rows, p.dim_qk) + WordBlocks::floats(p, WordBlocks::columns, p.dim_v) + 112),
          queries(scratch.take(lane_rows(p.dim_qk) * kMaxLanes)),
          out(scratch.take(p.dim_v * kMaxLanes)),
          scores(scratch.take(kKeyBlock * kMaxLanes)),
          keep(scratch.take(kKeyBlock * kMaxLanes)),
          keys(scratch.take(kKeyBlock * round_up(p.dim_qk, kLanes))),
          values(scratch.take(kKeyBlock * round_up(p.dim_v, kLanes))),
          seen(scratch.take(kKeyBlock * seen_width(p))),
          key_words(p, WordBlocks::rows, p.dim_qk, scratch),
          value_words(p, WordBlocks::columns, p.dim_v, scratch) {}
    Scratch scratch;
    float *queries, *out, *scores, *keep, *keys, *values, *seen;
    WordBlocks key_words, value_words;
};

void rescale(float *out, int64_t rows, int64_t vectors, const vfloat (&correction)[kMaxVectors]) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t v = 0; v < vectors; v++) {
            float *target = out + (row * vectors + v) * kLanes;
            store(target, load(target) * correction[v]);
        }
}

void write_tile(const fastattn_attention &p, const QueryTile &tile, const Softmax &softmax, const float *out) {
    float norm[kMaxLanes], lse[kMaxLanes];
    for (int64_t v = 0; v < tile.vectors; v++) {
        const vfloat base = softmax.base(v), total = softmax.total(v);
        const vfloat divisor = p.sinks ? total + softmax_sink(p.sinks[tile.head], base) : total;
        const vint empty = (vint)(total == 0.0f);
        store(norm + v * kLanes, select(empty, zero(), 1.0f / divisor));
        store(lse + v * kLanes, select(empty, broadcast(-kInf), base + log(total)));
    }
    memcpy(p.lse + tile.row(p), lse, (size_t)tile.count * sizeof(float));
    const Rows target = query_rows(p, p.out, tile);
    unpack_transposed(out, tile.lanes(), tile.count, p.dim_v, norm, (void *)target.at(tile.begin, 0), p.dtype, target.stride);
}

RowsAhead ahead(Rows rows, Span span, int64_t columns, int64_t each) {
    if (span.begin >= span.end) return {};
    const int64_t size = size_of(rows.dtype);
    return {(const char *)rows.at(span.begin, 0), rows.stride * size, (columns * size + 63) / 64, span.end - span.begin, each};
}

// A block of keys or values, all of it during a product of m rows.
RowsAhead block_ahead(Rows rows, Span span, int64_t columns, int64_t m) {
    const int64_t steps = (m + kTileRows - 1) / kTileRows;
    return ahead(rows, span, columns, (span.end - span.begin + steps - 1) / steps);
}

void attend(const fastattn_attention &p, const QueryTile &tile, Buffers &buffers) {
    const int64_t lanes = tile.lanes();
    const Rows q = query_rows(p, p.q, tile), out = query_rows(p, p.out, tile);
    const Rows k = key_rows(p, p.k, tile, tile.head_kv(p)), v = key_rows(p, p.v, tile, tile.head_kv(p));
    const bool pairs = multiplies_pairs(p);
    const Rows queries{q.at(tile.begin, 0), q.dtype, q.stride};
    if (pairs) pack_query_words(queries, tile.count, p.dim_qk, buffers.queries, lanes);
    else pack_transposed(queries, tile.count, p.dim_qk, p.scale, buffers.queries, lanes, tile.vectors);

    TileMask mask(p, tile);
    Softmax softmax(softmax_factor(p));
    bool started = false;
    // Fetched meanwhile: the output's lines, the queries of the thread's next tile, the one before this, and blocks that the hardware does not foresee.
    Fetches with_scores = {{{}, ahead(q, {larger(0, tile.begin - lanes), tile.begin}, p.dim_qk, 1)}};
    Fetches with_values = {{{}, ahead(out, {tile.begin, tile.begin + tile.count}, p.dim_v, 1)}};
    while (mask.next()) {
        const KeyBlock &block = mask.block();
        const Span jump = mask.jump();
        with_scores.rows[0] = block_ahead(k, jump, p.dim_qk, block.count);
        with_values.rows[0] = block_ahead(v, jump, p.dim_v, p.dim_v);
        const Left keys = pairs ? buffers.key_words.words(tile, tile.head_kv(p), k, block, {buffers.keys, buffers.seen})
                                : load_block(k, block, p.dim_qk, Layout::rows, buffers.keys);
        score_tile(p, tile, mask, keys, buffers.queries, buffers.scores, nullptr, &with_scores);
        const float *keep = p.dropout.threshold ? buffers.keep : nullptr;
        if (keep) keep_tile(p, tile, block.begin, block.count, buffers.keep);
        vfloat correction[kMaxVectors];
        const bool raised = pairs ? softmax.step_of_pairs(buffers.scores, keep, block.count, tile.vectors, correction)
                                  : softmax.step(buffers.scores, block.count, tile.vectors, correction);
        if (started && raised) rescale(buffers.out, p.dim_v, tile.vectors, correction);
        if (pairs) {
            const Left values = buffers.value_words.words(tile, tile.head_kv(p), v, block, {buffers.values, buffers.seen});
            multiply_column_words(values, block, p.dim_v, tile.vectors, buffers.scores, buffers.out, started, &with_values);
        } else {
            if (keep) scale_by(buffers.scores, keep, block.count * lanes);
            multiply_columns(v, block, p.dim_v, tile.vectors, buffers.scores, buffers.values, buffers.out, started, &with_values);
        }
        started = true;
    }
    if (!started) memset(buffers.out, 0, (size_t)(p.dim_v * lanes) * 4);
    write_tile(p, tile, softmax, buffers.out);
}

// Rows of a packed batch that no sequence owns.
void clear_unowned(const fastattn_attention &p) {
    for_unowned(p.cu_seqlens_q, p.batch, p.len_q, p.rows_q, [&](Span rows) {
        clear_rows(p.out, p.dtype, p.heads_q, rows, p.dim_v);
        for (int64_t h = 0; h < p.heads_q; h++)
            for (int64_t row = rows.begin; row < rows.end; row++) p.lse[h * p.rows_q + row] = -kInf;
    });
}

}  // namespace

int attention_forward(const fastattn_attention &p) {
    const Tiling tiling(p);
    if (tiling.failed()) return FASTATTN_OUT_OF_MEMORY;
    const int64_t items = tiling.count();
    int status = FASTATTN_OK;
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const MatrixUnit unit(multiplies_pairs(p));
        Buffers buffers(p);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
        } else {
            buffers.key_words.clear();
            buffers.value_words.clear();
        }
#pragma omp for schedule(dynamic, larger(1, smaller(8, items / (16 * p.n_threads))))
        for (int64_t item = 0; item < items; item++)
            if (!buffers.scratch.failed()) attend(p, tiling.from_last(item), buffers);
    }
    if (p.cu_seqlens_q) clear_unowned(p);
    return status;
}

FASTATTN_NAMESPACE_END
