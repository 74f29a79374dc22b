// What forward and backward share: queries as lanes, blocks of keys and values, and the score tile.
//
// Scores are held transposed, scores(key, query lane), and in natural units: a bias of finfo.min stays finite, which times log2 e it would
// not, and differences of scores lose nothing before exp2 takes them times log2 e. Keys and values are then the broadcast operand of the micro-kernel and are read where
// they lie, only the queries are transposed once a tile; softmax statistics run along the rows, so they are plain vector operations without a
// single horizontal sum; and every bound of a mask becomes a comparison of lanes.
#pragma once
#include "../micro.h"
#include "../pack.h"
#include "../philox.h"
#include "mask.h"

FASTATTN_NAMESPACE_BEGIN

FASTATTN_INLINE Rows rows_of(const fastattn_tensor &t, int32_t dtype, int64_t b, int64_t h) {
    return {offset((const void *)t.data, dtype, b * t.stride[0] + h * t.stride[1]), dtype, t.stride[2]};
}

// Tiles of nearly equal size instead of full ones and a small rest.
struct QueryTiles {
    int64_t count, vectors;
    explicit QueryTiles(int64_t len_q)
        : count((len_q + kMaxLanes - 1) / kMaxLanes), vectors(count ? ((len_q + count - 1) / count + kLanes - 1) / kLanes : 0) {}
    QueryTile tile(int64_t b, int64_t h, int64_t index, int64_t len_q) const {
        const int64_t begin = index * vectors * kLanes;
        return {b, h, begin, smaller(vectors * kLanes, len_q - begin), vectors};
    }
};

// A block of K or V for the micro-kernel: in place for float32 rows, else converted; rows that a key mask hides are read as 0.
static inline Left load_block(Rows source, int64_t begin, int64_t count, int64_t columns, const uint8_t *visible_rows, Layout layout, float *scratch) {
    if (source.dtype == FASTATTN_FLOAT32 && !visible_rows) return {(const float *)source.at(begin, 0), source.stride, layout};
    const int64_t ld = round_up(columns, kLanes);
    for (int64_t row = 0; row < count; row++) {
        if (visible_rows && !visible_rows[row]) memset(scratch + row * ld, 0, (size_t)ld * 4);
        else pack_rows({source.at(begin + row, 0), source.dtype, 0}, 1, columns, 1.0f, scratch + row * ld, ld);
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
        add_to(scores + row * tile.lanes() + v * kLanes, bias);
    };
    if (t.stride[2] == 0 || t.stride[3] != 1) {
        for (int64_t row = 0; row < count; row++)
            for (int64_t v = 0; v < tile.vectors; v++) {
                vfloat bias = zero();
                for (int lane = 0; lane < kLanes && v * kLanes + lane < tile.count; lane++)
                    bias[lane] = load_scalar(offset(t.data, p.bias_dtype, base + (v * kLanes + lane) * t.stride[2] + row * t.stride[3]), p.bias_dtype);
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

// e^(score - base) for base >= score. -inf - -inf would be NaN: a query that has seen nothing gets the base 0.
FASTATTN_INLINE vfloat softmax_base(vfloat maximum) { return select((vint)(maximum == -kInf), zero(), maximum); }
FASTATTN_INLINE vfloat softmax_term(vfloat score, vfloat base) { return exp2((score - base) * kLog2e); }

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

// Rows of A times B with sums over k in blocks: one chain of 256 additions would be less accurate than what it is measured against.
static inline void multiply_blocked(int64_t m, int64_t vectors, int64_t k, Left rows, const float *b, int64_t lanes, float *c) {
    constexpr int64_t kDepth = 64;
    multiply(m, vectors, smaller(k, kDepth), rows, b, lanes, c, lanes, false);
    for (int64_t begin = kDepth; begin < k; begin += kDepth)
        multiply(m, vectors, smaller(kDepth, k - begin), {rows.data + begin, rows.stride, rows.layout}, b + begin * lanes, lanes, c, lanes, true);
}

// scores(key, lane) for keys [begin, begin + count), -inf where hidden. `queries` hold the scale already.
static inline void score_tile(const fastattn_attention &p, const QueryTile &tile, const TileMask &mask, Coverage coverage, Left keys,
                              const float *queries, int64_t begin, int64_t count, float *scores, float *slope) {
    multiply_blocked(count, tile.vectors, p.dim_qk, keys, queries, tile.lanes(), scores);
    if (p.softcap > 0) apply_softcap(p, scores, count * tile.lanes(), slope);
    if (p.bias.data) add_bias(p, tile, begin, count, scores);
    if (coverage == Coverage::partial) mask.apply(scores);
}

FASTATTN_NAMESPACE_END
