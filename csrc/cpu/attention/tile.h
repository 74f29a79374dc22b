// What forward and backward share: queries as lanes, blocks of keys and values, and the score tile.
//
// Scores are held transposed, scores(key, query lane), and in natural units: a bias of finfo.min stays finite, which times log2 e it would
// not, and differences of scores lose nothing before exp2 takes them times log2 e. Keys and values are then the broadcast operand of the
// micro-kernel and are read where they lie, only the queries are transposed once a tile; softmax statistics run along the rows, so they are plain
// vector operations without a single horizontal sum; and a mask is one word of bits per lane.
#pragma once
#include "../micro.h"
#include "../philox.h"
#include "distance.h"

FASTATTN_NAMESPACE_BEGIN

// A block of K or V for the micro-kernel: in place for float32 rows, else converted; rows that no query of the tile sees are read as 0, because
// what lies there may be NaN.
static inline Left load_block(Rows source, const KeyBlock &block, int64_t columns, Layout layout, float *scratch) {
    const bool all_seen = block.seen == bits_below(block.count);
    if (source.dtype == FASTATTN_FLOAT32 && all_seen) return {(const float *)source.at(block.begin, 0), source.stride, layout};
    const int64_t ld = round_up(columns, kLanes);
    if (all_seen) {
        pack_rows({source.at(block.begin, 0), source.dtype, source.stride}, block.count, columns, 1.0f, scratch, ld);
        return {scratch, ld, layout};
    }
    for (int64_t row = 0; row < block.count; row++) {
        if (block.seen >> row & 1) pack_rows({source.at(block.begin + row, 0), source.dtype, 0}, 1, columns, 1.0f, scratch + row * ld, ld);
        else memset(scratch + row * ld, 0, (size_t)ld * 4);
    }
    return {scratch, ld, layout};
}

// scores = softcap * tanh(scores / softcap); `slope`, if given, receives the derivative 1 - tanh^2.
static inline void apply_softcap(const fastattn_attention &p, float *scores, int64_t floats, float *slope) {
    for (int64_t at = 0; at < floats; at += kLanes) {
        const vfloat t = tanh(load(scores + at) * (1.0f / p.softcap));
        store(scores + at, t * p.softcap);
        if (slope) store(slope + at, 1.0f - t * t);
    }
}

// scores(key, lane) += bias(lane, key), for keys [begin, begin + count).
static inline void add_bias(const fastattn_attention &p, const QueryTile &tile, int64_t begin, int64_t count, float *scores) {
    const fastattn_tensor &t = p.bias;
    const int64_t base = tile.batch * t.stride[0] + tile.head * t.stride[1] + tile.begin * t.stride[2] + begin * t.stride[3];
    const auto add = [&](int64_t row, int64_t v, vfloat bias) {
        float *target = scores + row * tile.lanes() + v * kLanes;
        store(target, select((vint)(bias == -kInf), bias, load(target) + bias));  // hidden, whatever the score is
    };
    if (t.stride[2] == 0) {  // one number for all queries
        for (int64_t row = 0; row < count; row++) {
            const vfloat bias = broadcast(load_scalar(offset(t.data, p.bias_dtype, base + row * t.stride[3]), p.bias_dtype));
            for (int64_t v = 0; v < tile.vectors; v++) add(row, v, bias);
        }
        return;
    }
    if (t.stride[3] != 1) {
        for (int64_t row = 0; row < count; row++)
            for (int64_t v = 0; v < tile.vectors; v++) {
                vfloat bias = zero();
                for (int lane = 0; lane < kLanes && v * kLanes + lane < tile.count; lane++)
                    bias[lane] = load_scalar(offset(t.data, p.bias_dtype, base + (v * kLanes + lane) * t.stride[2] + row * t.stride[3]),
                                             p.bias_dtype);
                add(row, v, bias);
            }
        return;
    }
    const Rows source{offset(t.data, p.bias_dtype, base), p.bias_dtype, t.stride[2]};
    float block[kLanes * kLanes];
    for (int64_t v = 0; v < tile.vectors; v++)
        for (int64_t row = 0; row < count; row += kLanes) {
            const int64_t valid = larger(0, smaller(kLanes, tile.count - v * kLanes));
            const int64_t rows = smaller(kLanes, count - row);
            pack_transposed({source.at(v * kLanes, row), source.dtype, source.stride}, valid, rows, 1.0f, block, kLanes, 1);
            for (int64_t i = 0; i < rows; i++) add(row + i, v, load(block + i * kLanes));
        }
}

// e^(factor (score - base)), `rate` being factor log2 e, for base >= score. -inf - -inf would be NaN: a query that has seen nothing gets the base 0.
FASTATTN_INLINE vfloat softmax_base(vfloat maximum) { return select((vint)(maximum == -kInf), zero(), maximum); }
FASTATTN_INLINE vfloat softmax_term(vfloat score, vfloat base, float rate) { return exp2((score - base) * rate); }
// The same of a sink, which may lie above the base: from e^88 on it is infinite, and leaves the others nothing.
FASTATTN_INLINE vfloat softmax_sink(float sink, vfloat base) {
    const vfloat distance = sink - base;
    return select((vint)(distance > 88.0f), broadcast(kInf), exp(distance));
}

// keep(key, lane) = keep_scale or 0 for keys [begin, begin + count).
static inline void keep_tile(const fastattn_attention &p, const QueryTile &tile, int64_t begin, int64_t count, float *keep) {
    const uint32_t head = (uint32_t)(tile.batch * p.heads_q + tile.head);
    for (int64_t group = begin / 32; group * 32 < begin + count; group++)
        for (int64_t v = 0; v < tile.vectors; v++)
            for (uint32_t call = 0; call < 4; call++) {
                const vuint row = (vuint)lane_index() + (uint32_t)(tile.begin + v * kLanes);
                const PhiloxWords words = philox(row, ((uint32_t)group * 4 + call) - vuint{}, head, p.dropout.seed);
                for (int w = 0; w < 4; w++)
                    for (int half = 0; half < 2; half++) {
                        const int64_t key = group * 32 + 8 * w + 2 * call + half - begin;
                        if (key < 0 || key >= count) continue;
                        store(keep + key * tile.lanes() + v * kLanes, keep_factor(words, w, half, p.dropout));
                    }
            }
}

static inline void scale_by(float *target, const float *factor, int64_t floats) {
    for (int64_t at = 0; at < floats; at += kLanes) store(target + at, load(target + at) * load(factor + at));
}

// C(m, lanes) (+)= A B. Four vectors go as two and two: three and one would leave the micro-kernel with a narrow tile.
static inline void multiply_lanes(int64_t m, int64_t vectors, int64_t k, Left a, const float *b, float *c, bool accumulate,
                                  Fetches *fetches = nullptr) {
    const int64_t lanes = vectors * kLanes;
    if constexpr (kWordBlocks)
        if (a.parts) return multiply_word_rows(m, vectors, k, a.data, a.stride, b, lanes, c, lanes, accumulate, fetches);
    if (vectors != 4) return multiply(m, vectors, k, a, b, lanes, c, lanes, accumulate, nullptr, {}, fetches);
    for (int64_t half = 0; half < lanes; half += 2 * kLanes)
        multiply(m, 2, k, a, b + half, lanes, c + half, lanes, accumulate, nullptr, {}, fetches);
}

// Rows of A times B with sums over k in blocks: one chain of 256 additions would be less accurate than what it is measured against.
static inline void multiply_blocked(int64_t m, int64_t vectors, int64_t k, Left rows, const float *b, float *c,
                                    Fetches *fetches = nullptr) {
    const int64_t depth = kWordBlocks && rows.parts ? k : 64;  // the matrix unit adds 32 products at once
    multiply_lanes(m, vectors, smaller(k, depth), rows, b, c, false, fetches);
    for (int64_t begin = depth; begin < k; begin += depth) {
        const Left rest = {rows.data + begin, rows.stride, rows.layout, rows.parts};
        multiply_lanes(m, vectors, smaller(depth, k - begin), rest, b + begin * vectors * kLanes, c, true, fetches);
    }
}

static inline void scale_by(float *target, float factor, int64_t floats) {
    for (int64_t at = 0; at < floats; at += kLanes) store(target + at, load(target + at) * factor);
}

// Whether scores of pairs are left as products of queries and keys: the scale, which nothing but the softmax then asks for, is its factor.
static inline bool leaves_products(const fastattn_attention &p) {
    return multiplies_pairs(p) && p.scale > 0 && !(p.softcap > 0) && !p.bias.data && !is_given(p.distance);
}

// By which scores are multiplied in the softmax.
static inline float softmax_factor(const fastattn_attention &p) { return leaves_products(p) ? p.scale : 1.0f; }

// scores(key, lane) of the mask's block, -inf where hidden. `queries` hold the scale already, but for words.
static inline void score_tile(const fastattn_attention &p, const QueryTile &tile, const TileMask &mask, Left keys, const float *queries,
                              float *scores, float *slope, Fetches *fetches = nullptr) {
    const KeyBlock &block = mask.block();
    multiply_blocked(block.count, tile.vectors, keys.parts ? words_of_elements(p.dim_qk) : p.dim_qk, keys, queries, scores, fetches);
    if (keys.parts && !leaves_products(p)) scale_by(scores, p.scale, block.count * tile.lanes());
    if (p.softcap > 0) apply_softcap(p, scores, block.count * tile.lanes(), slope);
    if (p.bias.data) add_bias(p, tile, block.begin, block.count, scores);
    if (is_given(p.distance)) add_distance_bias(p, tile, block.begin, block.count, scores);
    mask.apply(scores);
}

FASTATTN_NAMESPACE_END
