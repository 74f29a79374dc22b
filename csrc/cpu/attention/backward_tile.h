// Backward of one query tile: from the queries and their output gradients to grad_q and to what grad_k and grad_v need of the tile.
//
// The scores and dp of the tile against the keys it sees are held in strips. That costs no product more than recomputing them from a saved
// log-sum-exp would, and takes maximum, sum and delta from the float32 values themselves: a float32 lse or an output rounded to bfloat16 would
// put errors of their own into p and delta, which show where the softmax is sharp or every score is finfo.min.
#pragma once
#include "pair_tile.h"

FASTATTN_NAMESPACE_BEGIN

struct Widths {
    int64_t qk, v;  // head dims in whole vectors
    explicit Widths(const fastattn_attention &p) : qk(round_up(p.dim_qk, kLanes)), v(round_up(p.dim_v, kLanes)) {}
    int64_t both() const { return qk + v; }
};

// What a tile keeps until the gradients of its keys are added: probabilities (after dropout) and ds, block after block, and the rows they meet.
struct TileRecord {
    QueryTile tile;
    KeyBlock *blocks;
    int64_t n_blocks;
    float *scores, *grad_scores;     // (key, lane): scores become p, dp becomes ds
    float *slope;                    // derivative of the softcap, or null
    float *strips;                   // sums of ds along the diagonals of each block, or null
    float *query_rows, *grad_rows;  // (lane, column): queries and output gradients; of pairs (word, column)

    // Floats of a record of a tile that sees at most `keys` keys.
    static int64_t floats(const fastattn_attention &p, int64_t lanes, int64_t keys) {
        return lanes * (keys * (p.softcap > 0 ? 3 : 2) + Widths(p).both()) + block_floats(keys) + strip_floats(p, lanes, keys) + 6 * 16;
    }

    float *diagonals(int64_t block) const { return strips + blocks[block].row + block * tile.lanes(); }

    TileRecord(const fastattn_attention &p, const QueryTile &t, int64_t keys, Pieces &pieces) : tile(t), n_blocks(0) {
        const int64_t lanes = t.lanes();
        blocks = (KeyBlock *)pieces.take(block_floats(keys));
        scores = pieces.take(lanes * keys);
        grad_scores = pieces.take(lanes * keys);
        slope = p.softcap > 0 ? pieces.take(lanes * keys) : nullptr;
        strips = wants_gradient(p.distance) ? pieces.take(strip_floats(p, lanes, keys)) : nullptr;
        query_rows = pieces.take(lanes * Widths(p).qk);
        grad_rows = pieces.take(lanes * Widths(p).v);
    }

  private:
    static int64_t most_blocks(int64_t keys) { return keys / kKeyBlock + 2 * kMaxIntervals + 1; }  // two of a run may be cut short
    static int64_t block_floats(int64_t keys) { return Pieces::padded(most_blocks(keys) * (int64_t)(sizeof(KeyBlock) / 4)); }
    static int64_t strip_floats(const fastattn_attention &p, int64_t lanes, int64_t keys) {
        return wants_gradient(p.distance) ? keys + most_blocks(keys) * lanes + kLanes : 0;
    }
};

// Sums over query tiles of one KV head, float32 (key, column).
struct KeyGradients {
    float *keys, *values;

    static int64_t floats(const fastattn_attention &p) { return p.len_k * Widths(p).both() + 2 * 16; }
    KeyGradients(const fastattn_attention &p, Pieces &pieces)
        : keys(pieces.take(p.len_k * Widths(p).qk)), values(pieces.take(p.len_k * Widths(p).v)) {}

    void clear(const fastattn_attention &p, Span span) const {
        const Widths wide(p);
        memset(keys + span.begin * wide.qk, 0, (size_t)((span.end - span.begin) * wide.qk) * 4);
        memset(values + span.begin * wide.v, 0, (size_t)((span.end - span.begin) * wide.v) * 4);
    }

    // What one block of a tile gives to the keys of `span`: the same numbers however the keys are cut into spans.
    void add(const fastattn_attention &p, const TileRecord &record, const KeyBlock &block, Span span) const {
        const Widths wide(p);
        const int64_t lanes = record.tile.lanes(), begin = larger(block.begin, span.begin), end = smaller(block.begin + block.count, span.end);
        if (begin >= end) return;
        const int64_t at = (block.row + begin - block.begin) * lanes;
        const auto multiply_rows = [&](int64_t columns, const float *left, const float *right, float *target) {
            if (multiplies_pairs(p)) multiply_lane_words(end - begin, columns, lanes, left, right, target);
            else multiply(end - begin, columns / kLanes, lanes, {left, lanes, Layout::rows}, right, columns, target, columns, true);
        };
        multiply_rows(wide.v, record.scores + at, record.grad_rows, values + begin * wide.v);
        multiply_rows(wide.qk, record.grad_scores + at, record.query_rows, keys + begin * wide.qk);
    }

    void write(const fastattn_attention &p, const Sequence &sequence, int64_t head_kv, Span span) const {
        const Widths wide(p);
        const Rows k = key_rows(p, p.grad_k, sequence, head_kv), v = key_rows(p, p.grad_v, sequence, head_kv);
        const int64_t rows = span.end - span.begin;
        unpack_rows(keys + span.begin * wide.qk, wide.qk, rows, p.dim_qk, p.scale, (void *)k.at(span.begin, 0), p.dtype, k.stride);
        unpack_rows(values + span.begin * wide.v, wide.v, rows, p.dim_v, 1.0f, (void *)v.at(span.begin, 0), p.dtype, v.stride);
    }
};

// Softmax statistics of queries, from which p and ds follow: p = e * reciprocal, ds = p (dp - delta) + e * lse with e = e^(factor
// (score - maximum)), the maximum being that of scores without their softmax_factor().
struct Statistics {
    vfloat maximum[kMaxVectors], reciprocal[kMaxVectors], delta[kMaxVectors], lse[kMaxVectors];
};

// The same for all queries, kept where a second walk needs them.
struct StoredStatistics {
    float *maximum = nullptr, *reciprocal, *delta, *lse;

    static int64_t floats(const fastattn_attention &p) { return 4 * Pieces::padded(queries(p)); }
    void take(const fastattn_attention &p, Pieces &pieces) {
        maximum = pieces.take(queries(p)), reciprocal = pieces.take(queries(p)), delta = pieces.take(queries(p)), lse = pieces.take(queries(p));
    }

    void save(const fastattn_attention &p, const QueryTile &tile, const Statistics &from) const {
        each(p, tile, [&](int64_t query, int v, int lane) {
            maximum[query] = from.maximum[v][lane], reciprocal[query] = from.reciprocal[v][lane];
            delta[query] = from.delta[v][lane], lse[query] = from.lse[v][lane];
        });
    }

    Statistics load(const fastattn_attention &p, const QueryTile &tile) const {
        Statistics to = {};
        each(p, tile, [&](int64_t query, int v, int lane) {
            to.maximum[v][lane] = maximum[query], to.reciprocal[v][lane] = reciprocal[query];
            to.delta[v][lane] = delta[query], to.lse[v][lane] = lse[query];
        });
        return to;
    }

  private:
    static int64_t queries(const fastattn_attention &p) { return p.cu_seqlens_q ? p.heads_q * p.rows_q : p.batch * p.heads_q * p.len_q; }
    template <class F>
    static void each(const fastattn_attention &p, const QueryTile &tile, F &&f) {
        const int64_t first = tile.row(p);
        for (int64_t lane = 0; lane < tile.count; lane++) f(first + lane, (int)(lane / kLanes), (int)(lane % kLanes));
    }
};

// Where the gradient of the bias goes: strides 0 in the dimensions that it is summed over.
struct BiasGradient {
    float *data;
    int64_t batch, head, query, key;  // strides; key is 1 or 0

    explicit BiasGradient(const fastattn_attention &p)
        : data((float *)p.grad_bias.data),
          batch(p.grad_bias.stride[0]),
          head(p.grad_bias.stride[1]),
          query(p.grad_bias.stride[2]),
          key(p.grad_bias.stride[3]) {}

    // Whether several tiles add to one element: they then do so in a walk of their own.
    bool is_shared(const fastattn_attention &p) const {
        return (batch == 0 && p.batch > 1) || (head == 0 && p.heads_q > 1) || (query == 0 && p.len_q > 1);
    }

    // Adds ds(key, lane) of one block.
    void add(const QueryTile &tile, const KeyBlock &block, const float *ds) const {
        float *target = data + tile.batch * batch + tile.head * head + tile.begin * query + block.begin * key;
        const int64_t lanes = tile.lanes();
        if (query == 0) {
            for (int64_t row = 0; row < block.count; row++) {
                vfloat total = zero();
                for (int64_t at = row * lanes; at < (row + 1) * lanes; at += kLanes) total += load(ds + at);
                target[row * key] += sum(total);
            }
            return;
        }
        for (int64_t first = 0; first < tile.count; first += kLanes) {
            if (key == 0) {
                vfloat total = zero();
                for (int64_t row = 0; row < block.count; row++) total += load(ds + row * lanes + first);
                for (int lane = 0; lane < lanes_left(first, tile.count); lane++) target[(first + lane) * query] += total[lane];
                continue;
            }
            for (int64_t row = 0; row < block.count; row += kLanes) {
                const int width = lanes_left(row, block.count);
                vfloat square[kLanes];
                for (int i = 0; i < kLanes; i++) square[i] = i < width ? load(ds + (row + i) * lanes + first) : zero();
                transpose(square);
                for (int lane = 0; lane < lanes_left(first, tile.count); lane++) {
                    float *to = target + (first + lane) * query + row;
                    store_part(to, load_part(to, width) + square[lane], width);
                }
            }
        }
    }
};

// Scratch of one thread.
struct TileBuffers {
    static int64_t floats(const fastattn_attention &p) {
        return kMaxLanes * (lane_rows(p.dim_qk) + lane_rows(p.dim_v) + p.dim_qk) + kKeyBlock * (kMaxLanes + Widths(p).both() + seen_width(p)) +
               WordBlocks::floats(p, WordBlocks::rows, p.dim_qk) + WordBlocks::floats(p, WordBlocks::columns, p.dim_qk) +
               WordBlocks::floats(p, WordBlocks::rows, p.dim_v) + 7 * 16;
    }
    TileBuffers(const fastattn_attention &p, Pieces &pieces)
        : queries(pieces.take(lane_rows(p.dim_qk) * kMaxLanes)),
          grads(pieces.take(lane_rows(p.dim_v) * kMaxLanes)),
          grad_queries(pieces.take(p.dim_qk * kMaxLanes)),
          keep(pieces.take(kKeyBlock * kMaxLanes)),
          keys(pieces.take(kKeyBlock * Widths(p).qk)),
          values(pieces.take(kKeyBlock * Widths(p).v)),
          seen(pieces.take(kKeyBlock * seen_width(p))),
          key_words(p, WordBlocks::rows, p.dim_qk, pieces),
          key_columns(p, WordBlocks::columns, p.dim_qk, pieces),
          value_words(p, WordBlocks::rows, p.dim_v, pieces) {
        key_words.clear();
        key_columns.clear();
        value_words.clear();
    }
    float *queries, *grads, *grad_queries;  // (column, lane), the first two of pairs (word, lane)
    float *keep, *keys, *values, *seen;
    WordBlocks key_words, key_columns, value_words;
};

// The products of one query tile with blocks of its keys.
class TileBackward {
  public:
    TileBackward(const fastattn_attention &p, const QueryTile &tile, TileBuffers &buffers)
        : p_(p),
          tile_(tile),
          buffers_(buffers),
          lanes_(tile.lanes()),
          k_(key_rows(p, p.k, tile, tile.head_kv(p))),
          v_(key_rows(p, p.v, tile, tile.head_kv(p))) {
        if (scores_of_pairs()) pack_query_words(tile_rows(p.q), tile.count, p.dim_qk, buffers.queries, lanes_);
        else pack_transposed(tile_rows(p.q), tile.count, p.dim_qk, p.scale, buffers.queries, lanes_, tile.vectors);
        if (grads_of_pairs()) pack_query_words(tile_rows(p.grad_out), tile.count, p.dim_v, buffers.grads, lanes_);
        else pack_transposed(tile_rows(p.grad_out), tile.count, p.dim_v, 1.0f, buffers.grads, lanes_, tile.vectors);
    }

    // Fills the record, writes grad_q, adds to `bias` and to `keys` where they are given; returns the tile's part of grad_sink.
    float run(TileRecord &record, const StoredStatistics *stored, const BiasGradient *bias, const KeyGradients *keys) {
        pack_lanes(tile_rows(p_.q), p_.dim_qk, record.query_rows, Widths(p_).qk);
        pack_lanes(tile_rows(p_.grad_out), p_.dim_v, record.grad_rows, Widths(p_).v);
        TileMask mask(p_, tile_);
        Statistics statistics;
        for (int v = 0; v < kMaxVectors; v++) statistics.maximum[v] = broadcast(-kInf);
        for (int64_t row = 0; mask.next(); row += mask.block().count) {
            KeyBlock &block = record.blocks[record.n_blocks++] = mask.block();
            block.row = row;
            float *target = record.scores + row * lanes_;
            scores(mask, target, record.slope ? record.slope + row * lanes_ : nullptr);
            raise(statistics.maximum, target, block.count);
        }
        vfloat total[kMaxVectors] = {}, delta[kMaxVectors] = {};
        for (int64_t i = 0; i < record.n_blocks; i++) probabilities(record, record.blocks[i], statistics.maximum, total, delta);
        const float sink = normalise(total, delta, statistics);
        if (stored) stored->save(p_, tile_, statistics);
        memset(buffers_.grad_queries, 0, (size_t)(p_.dim_qk * lanes_) * 4);
        for (int64_t i = 0; i < record.n_blocks; i++) {
            const KeyBlock &block = record.blocks[i];
            float *p = record.scores + block.row * lanes_, *ds = record.grad_scores + block.row * lanes_;
            score_gradients(statistics, block.count, p, ds);
            if (bias) bias->add(tile_, block, ds);
            if (record.strips) sum_diagonals(ds, block.count, tile_.vectors, record.diagonals(i));
            if (record.slope) scale_by(ds, record.slope + block.row * lanes_, block.count * lanes_);
            if (p_.dropout.threshold) drop(block, p);
            if (scores_of_pairs()) {
                // The factors of dropout have been used: their place takes the pairs.
                pack_key_pairs(ds, block.count, lanes_, buffers_.keep);
                multiply_column_words(words(buffers_.key_columns, k_, block, buffers_.keys), block, p_.dim_qk,
                                      tile_.vectors, buffers_.keep, buffers_.grad_queries, true);
            } else {
                multiply_columns(k_, block, p_.dim_qk, tile_.vectors, ds, buffers_.keys, buffers_.grad_queries, true);
            }
            if (keys) keys->add(p_, record, block, {0, tile_.len_k});
        }
        write_queries();
        return sink;
    }

    // scores(key, lane) of the mask's block; `slope`, if given, receives the derivative of the softcap.
    void scores(const TileMask &mask, float *target, float *slope) const {
        const KeyBlock &block = mask.block();
        const Left keys = scores_of_pairs() ? words(buffers_.key_words, k_, block, buffers_.keys) : load_block(k_, block, p_.dim_qk, Layout::rows, buffers_.keys);
        score_tile(p_, tile_, mask, keys, buffers_.queries, target, slope);
    }

    // dp(key, lane), dropout included.
    void value_products(const KeyBlock &block, float *target) const {
        const bool pairs = grads_of_pairs();
        const Left values = pairs ? words(buffers_.value_words, v_, block, buffers_.values) : load_block(v_, block, p_.dim_v, Layout::rows, buffers_.values);
        multiply_blocked(block.count, tile_.vectors, pairs ? words_of_elements(p_.dim_v) : p_.dim_v, values, buffers_.grads, target);
        if (p_.dropout.threshold) drop(block, target);
    }

    // e^(score - maximum) -> p, dp -> ds (before the softcap).
    void score_gradients(const Statistics &s, int64_t count, float *term, float *grad) const {
        for (int64_t row = 0; row < count; row++)
            for (int64_t v = 0; v < tile_.vectors; v++) {
                const int64_t at = row * lanes_ + v * kLanes;
                const vfloat e = load(term + at), p = e * s.reciprocal[v];
                vfloat ds = p * (load(grad + at) - s.delta[v]);
                if (p_.grad_lse) ds += e * s.lse[v];
                // Or it sees nothing; its e may be NaN where keys are not finite. Beside a sink that leaves it nothing a query still has an lse.
                const vint padding = (vint)(s.reciprocal[v] == 0.0f) & (vint)(s.lse[v] == 0.0f);
                store(term + at, select(padding, zero(), p));
                store(grad + at, select(padding, zero(), ds));
            }
    }

  private:
    Left words(WordBlocks &kept, Rows source, const KeyBlock &block, float *scratch) const {
        return kept.words(tile_, tile_.head_kv(p_), source, block, {scratch, buffers_.seen});
    }

    // As the forward's.
    bool scores_of_pairs() const { return multiplies_pairs(p_); }
    bool grads_of_pairs() const { return multiplies_pairs(p_) && p_.dim_v % 2 == 0; }

    Rows tile_rows(const fastattn_tensor &t) const {
        const Rows rows = query_rows(p_, t, tile_);
        return {rows.at(tile_.begin, 0), rows.dtype, rows.stride};
    }

    // Rows of the tile, those of the padding lanes 0.
    void pack_lanes(Rows source, int64_t columns, float *target, int64_t ld) const {
        if (scores_of_pairs()) return pack_lane_words(source, tile_.count, columns, lanes_, target, ld);
        pack_rows(source, tile_.count, columns, 1.0f, target, ld);
        memset(target + tile_.count * ld, 0, (size_t)((lanes_ - tile_.count) * ld) * 4);
    }

    void raise(vfloat (&maximum)[kMaxVectors], const float *scores, int64_t count) const {
        for (int64_t v = 0; v < tile_.vectors; v++)
            for (int64_t row = 0; row < count; row++) maximum[v] = max(maximum[v], load(scores + row * lanes_ + v * kLanes));
    }

    // scores -> e^(score - maximum), their sums, dp and the sums of both.
    void probabilities(TileRecord &record, const KeyBlock &block, const vfloat (&maximum)[kMaxVectors], vfloat (&total)[kMaxVectors],
                       vfloat (&delta)[kMaxVectors]) const {
        float *score = record.scores + block.row * lanes_, *grad = record.grad_scores + block.row * lanes_;
        const float rate = softmax_factor(p_) * kLog2e;
        value_products(block, grad);
        for (int64_t v = 0; v < tile_.vectors; v++) {
            const vfloat base = softmax_base(maximum[v]);
            vfloat block_total = zero(), block_delta = zero();
            for (int64_t at = v * kLanes; at < block.count * lanes_; at += lanes_) {
                const vfloat term = softmax_term(load(score + at), base, rate);
                block_total += term;
                block_delta += term * load(grad + at);
                store(score + at, term);
            }
            total[v] += block_total;
            delta[v] += block_delta;
        }
    }

    // delta becomes the mean of dp, lse the factor that grad_lse gives every term.
    float normalise(const vfloat (&total)[kMaxVectors], const vfloat (&delta)[kMaxVectors], Statistics &s) const {
        float sink_sum = 0;
        for (int v = 0; v < kMaxVectors; v++) s.reciprocal[v] = s.delta[v] = s.lse[v] = zero();  // sees nothing, or padding: every ds is 0
        for (int64_t lane = 0; lane < tile_.count; lane++) {
            const int64_t v = lane / kLanes, at = lane % kLanes;
            if (total[v][at] == 0.0f) continue;
            const float sink = p_.sinks ? __builtin_expf(p_.sinks[tile_.head] - s.maximum[v][at] * softmax_factor(p_)) : 0.0f;
            const float reciprocal = 1.0f / (total[v][at] + sink), mean = delta[v][at] * reciprocal;
            if (p_.sinks && sink < kInf) sink_sum -= sink * reciprocal * mean;
            s.reciprocal[v][at] = reciprocal;
            s.delta[v][at] = mean;
            if (p_.grad_lse) s.lse[v][at] = p_.grad_lse[tile_.row(p_) + lane] / total[v][at];
        }
        return sink_sum;
    }

    void drop(const KeyBlock &block, float *target) const {
        keep_tile(p_, tile_, block.begin, block.count, buffers_.keep);
        scale_by(target, buffers_.keep, block.count * lanes_);
    }

    void write_queries() const {
        float scale[kMaxLanes];
        for (int64_t lane = 0; lane < lanes_; lane++) scale[lane] = p_.scale;
        const Rows target = tile_rows(p_.grad_q);
        unpack_transposed(buffers_.grad_queries, lanes_, tile_.count, p_.dim_qk, scale, (void *)target.data, p_.dtype, target.stride);
    }

    const fastattn_attention &p_;
    QueryTile tile_;
    TileBuffers &buffers_;
    int64_t lanes_;
    Rows k_, v_;
};

FASTATTN_NAMESPACE_END
