// Attention backward: gradients of q, k, v and of the sinks.
//
//   p = softmax(s), with the sink in its denominator;  dp = dropout'(grad_out v^T);  delta = sum over keys of p dp
//   ds = p (dp - delta) + grad_lse softmax(s), the last one without the sink
//   grad_q = scale ds k,  grad_k = scale ds^T q,  grad_v = dropout(p)^T grad_out,  grad_sink = - sum over queries of p_sink sum(p dp)
// With a softcap ds is also multiplied by 1 - tanh^2. Numerics as in forward.cpp; every sum runs in a fixed order.
//
// Algorithm: the same transposed tiles as forward, five products each. For one query tile the scores and dp against all of its keys are held in
//   a strip (at most 48 x Skv floats each). That costs no product more than the usual recomputation from the saved log-sum-exp and output, and
//   it takes maximum, sum and delta from the float32 values themselves: a float32 lse or an output rounded to bfloat16 would put errors of
//   their own into p and delta, which show where the softmax is sharp or every score is finfo.min.
//   A work item is a KV head and a share of its query tiles; with several shares (fewer heads than threads) their grad_k and grad_v are added
//   afterwards, share by share.
#include "../kernels.h"
#include "tile.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

struct Buffers {
    explicit Buffers(const fastattn_attention &p)
        : wide_qk(round_up(p.dim_qk, kLanes)),
          wide_v(round_up(p.dim_v, kLanes)),
          strip(round_up(p.len_k, kKeyBlock) * kMaxLanes),
          scratch(kMaxLanes * (2 * p.dim_qk + p.dim_v + wide_qk + wide_v) + strip * (p.softcap > 0 ? 3 : 2) +
                  kKeyBlock * (kMaxLanes + wide_qk + wide_v) + p.len_k * (wide_qk + wide_v) + 16 * 16),
          queries(scratch.take(p.dim_qk * kMaxLanes)),
          query_rows(scratch.take(wide_qk * kMaxLanes)),
          grads(scratch.take(p.dim_v * kMaxLanes)),
          grad_rows(scratch.take(wide_v * kMaxLanes)),
          grad_queries(scratch.take(p.dim_qk * kMaxLanes)),
          scores(scratch.take(strip)),
          grad_scores(scratch.take(strip)),
          slope(p.softcap > 0 ? scratch.take(strip) : nullptr),
          keep(scratch.take(kKeyBlock * kMaxLanes)),
          keys(scratch.take(kKeyBlock * wide_qk)),
          values(scratch.take(kKeyBlock * wide_v)),
          grad_keys(scratch.take(p.len_k * wide_qk)),
          grad_values(scratch.take(p.len_k * wide_v)) {}
    int64_t wide_qk, wide_v, strip;
    Scratch scratch;
    float *queries, *query_rows, *grads, *grad_rows, *grad_queries;  // queries and grad_out: by lanes and by rows
    float *scores, *grad_scores, *slope;                             // strips
    float *keep, *keys, *values;
    float *grad_keys, *grad_values;
};

// One query tile against all of its keys.
class TileBackward {
  public:
    TileBackward(const fastattn_attention &p, const QueryTile &tile, Buffers &buffers)
        : p_(p),
          tile_(tile),
          buffers_(buffers),
          lanes_(tile.lanes()),
          k_(rows_of(p.k, p.dtype, tile.batch, tile.head / (p.heads_q / p.heads_kv))),
          v_(rows_of(p.v, p.dtype, tile.batch, tile.head / (p.heads_q / p.heads_kv))),
          mask_(p.mask, tile, p.len_k) {}

    // Leaves grad_q in buffers.grad_queries and adds to grad_keys and grad_values; returns the tile's part of grad_sink.
    float run() {
        pack_queries();
        for (int v = 0; v < kMaxVectors; v++) maximum_[v] = broadcast(-kInf), total_[v] = delta_[v] = zero();
        each_block([&](int64_t begin, int64_t count, Coverage coverage) { scores(begin, count, coverage); });
        each_block([&](int64_t begin, int64_t count, Coverage) { probabilities(begin, count); });
        const float sink = normalise();
        memset(buffers_.grad_queries, 0, (size_t)(p_.dim_qk * lanes_) * 4);
        each_block([&](int64_t begin, int64_t count, Coverage) { products(begin, count); });
        return sink;
    }

  private:
    template <class F>
    void each_block(F &&f) {
        for (int64_t begin = mask_.span().begin; begin < mask_.span().end; begin += kKeyBlock) {
            const int64_t count = smaller(kKeyBlock, mask_.span().end - begin);
            const Coverage coverage = mask_.look(begin, count);
            if (coverage != Coverage::empty) f(begin, count, coverage);
        }
    }

    float *in_strip(float *strip, int64_t begin) const { return strip ? strip + (begin - mask_.span().begin) * lanes_ : nullptr; }

    void pack_queries() {
        const Rows q = rows_of(p_.q, p_.dtype, tile_.batch, tile_.head), grad = rows_of(p_.grad_out, p_.dtype, tile_.batch, tile_.head);
        const Rows q_tile{q.at(tile_.begin, 0), q.dtype, q.stride}, grad_tile{grad.at(tile_.begin, 0), grad.dtype, grad.stride};
        pack_transposed(q_tile, tile_.count, p_.dim_qk, p_.scale, buffers_.queries, lanes_, tile_.vectors);
        pack_transposed(grad_tile, tile_.count, p_.dim_v, 1.0f, buffers_.grads, lanes_, tile_.vectors);
        pack_lanes(q_tile, p_.dim_qk, buffers_.query_rows, buffers_.wide_qk);
        pack_lanes(grad_tile, p_.dim_v, buffers_.grad_rows, buffers_.wide_v);
    }

    // Rows of the tile, those of the padding lanes 0.
    void pack_lanes(Rows source, int64_t columns, float *target, int64_t ld) const {
        pack_rows(source, tile_.count, columns, 1.0f, target, ld);
        memset(target + tile_.count * ld, 0, (size_t)((lanes_ - tile_.count) * ld) * 4);
    }

    void scores(int64_t begin, int64_t count, Coverage coverage) {
        const Left keys = load_block(k_, begin, count, p_.dim_qk, mask_.visible_rows(), Layout::rows, buffers_.keys);
        float *target = in_strip(buffers_.scores, begin);
        score_tile(p_, tile_, mask_, coverage, keys, buffers_.queries, begin, count, target, in_strip(buffers_.slope, begin));
        for (int64_t v = 0; v < tile_.vectors; v++)
            for (int64_t row = 0; row < count; row++) maximum_[v] = max(maximum_[v], load(target + row * lanes_ + v * kLanes));
    }

    // scores -> e^(score - maximum), their sums, dp and the sums of both.
    void probabilities(int64_t begin, int64_t count) {
        const Left values = load_block(v_, begin, count, p_.dim_v, mask_.visible_rows(), Layout::rows, buffers_.values);
        float *score = in_strip(buffers_.scores, begin), *grad = in_strip(buffers_.grad_scores, begin);
        multiply_blocked(count, tile_.vectors, p_.dim_v, values, buffers_.grads, lanes_, grad);
        if (p_.dropout.threshold) drop(begin, count, grad);
        for (int64_t v = 0; v < tile_.vectors; v++) {
            const vfloat base = softmax_base(maximum_[v]);
            vfloat total = zero(), delta = zero();
            for (int64_t at = v * kLanes; at < count * lanes_; at += lanes_) {
                const vfloat term = softmax_term(load(score + at), base);
                total += term;
                delta += term * load(grad + at);
                store(score + at, term);
            }
            total_[v] += total;
            delta_[v] += delta;
        }
    }

    // total_ becomes the reciprocal of the denominator, delta_ the mean of dp, and lse_ the factor that grad_lse gives every term.
    float normalise() {
        float sink_sum = 0;
        for (int64_t lane = 0; lane < lanes_; lane++) {
            const int64_t v = lane / kLanes, at = lane % kLanes;
            const float total = total_[v][at];
            lse_[v][at] = 0;
            if (total == 0.0f || lane >= tile_.count) {  // sees nothing, or padding: every ds is 0
                total_[v][at] = delta_[v][at] = 0;
                continue;
            }
            const float sink = p_.sinks ? __builtin_expf(p_.sinks[tile_.head] - maximum_[v][at]) : 0.0f;
            const float reciprocal = 1.0f / (total + sink), mean = delta_[v][at] * reciprocal;
            if (p_.sinks && sink < kInf) sink_sum -= sink * reciprocal * mean;
            total_[v][at] = reciprocal;
            delta_[v][at] = mean;
            if (p_.grad_lse) lse_[v][at] = p_.grad_lse[(tile_.batch * p_.heads_q + tile_.head) * p_.len_q + tile_.begin + lane] / total;
        }
        return sink_sum;
    }

    void products(int64_t begin, int64_t count) {
        float *score = in_strip(buffers_.scores, begin), *grad = in_strip(buffers_.grad_scores, begin);
        const float *slope = in_strip(buffers_.slope, begin);
        for (int64_t row = 0; row < count; row++)
            for (int64_t v = 0; v < tile_.vectors; v++) {
                const int64_t at = row * lanes_ + v * kLanes;
                const vfloat term = load(score + at), p = term * total_[v];
                vfloat ds = p * (load(grad + at) - delta_[v]);
                if (p_.grad_lse) ds += term * lse_[v];
                if (slope) ds *= load(slope + at);
                store(score + at, p);
                store(grad + at, ds);
            }
        if (p_.dropout.threshold) drop(begin, count, score);
        const Left keys = load_block(k_, begin, count, p_.dim_qk, mask_.visible_rows(), Layout::columns, buffers_.keys);
        multiply(p_.dim_qk, tile_.vectors, count, keys, grad, lanes_, buffers_.grad_queries, lanes_, true);
        const int64_t wide_qk = buffers_.wide_qk, wide_v = buffers_.wide_v;
        multiply(count, wide_v / kLanes, lanes_, {score, lanes_, Layout::rows}, buffers_.grad_rows, wide_v, buffers_.grad_values + begin * wide_v, wide_v, true);
        multiply(count, wide_qk / kLanes, lanes_, {grad, lanes_, Layout::rows}, buffers_.query_rows, wide_qk, buffers_.grad_keys + begin * wide_qk, wide_qk,
                 true);
    }

    void drop(int64_t begin, int64_t count, float *target) const {
        keep_tile(p_, tile_, begin, count, buffers_.keep);
        for (int64_t at = 0; at < count * lanes_; at += kLanes) store(target + at, load(target + at) * load(buffers_.keep + at));
    }

    const fastattn_attention &p_;
    const QueryTile &tile_;
    Buffers &buffers_;
    int64_t lanes_;
    Rows k_, v_;
    TileMask mask_;
    vfloat maximum_[kMaxVectors], total_[kMaxVectors], delta_[kMaxVectors], lse_[kMaxVectors];
};

void write_queries(const fastattn_attention &p, const QueryTile &tile, const Buffers &buffers) {
    float scale[kMaxLanes];
    for (int64_t lane = 0; lane < tile.lanes(); lane++) scale[lane] = p.scale;
    const Rows target = rows_of(p.grad_q, p.dtype, tile.batch, tile.head);
    unpack_transposed(buffers.grad_queries, tile.lanes(), tile.count, p.dim_qk, scale, (void *)target.at(tile.begin, 0), p.dtype, target.stride);
}

// grad_k and grad_v of one KV head from their float32 sums.
void write_keys(const fastattn_attention &p, int64_t batch, int64_t head_kv, const float *keys, int64_t wide_qk, const float *values, int64_t wide_v) {
    const Rows k = rows_of(p.grad_k, p.dtype, batch, head_kv), v = rows_of(p.grad_v, p.dtype, batch, head_kv);
    unpack_rows(keys, wide_qk, p.len_k, p.dim_qk, p.scale, (void *)k.data, p.dtype, k.stride);
    unpack_rows(values, wide_v, p.len_k, p.dim_v, 1.0f, (void *)v.data, p.dtype, v.stride);
}

// Every `shares`-th query tile of the heads of one KV head: under a causal mask all shares then have equal work.
// Returns nothing through grad_sinks but this share's part of each head's sum.
void run_item(const fastattn_attention &p, int64_t batch, int64_t head_kv, int64_t share, int64_t shares, Buffers &buffers, float *sinks) {
    const int64_t group = p.heads_q / p.heads_kv;
    const QueryTiles tiles(p.len_q);
    memset(buffers.grad_keys, 0, (size_t)(p.len_k * buffers.wide_qk) * 4);
    memset(buffers.grad_values, 0, (size_t)(p.len_k * buffers.wide_v) * 4);
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; head++) {
        float sink = 0;
        for (int64_t index = share; index < tiles.count; index += shares) {
            const QueryTile tile = tiles.tile(batch, head, index, p.len_q);
            sink += TileBackward(p, tile, buffers).run();
            write_queries(p, tile, buffers);
        }
        if (sinks) sinks[batch * p.heads_q + head] = sink;
    }
}

}  // namespace

int attention_backward(const fastattn_attention &p) {
    const int64_t heads = p.batch * p.heads_kv, heads_q = p.batch * p.heads_q;
    const int64_t shares = heads == 0 ? 1 : larger(1, smaller((p.n_threads + heads - 1) / heads, QueryTiles(p.len_q).count));
    const int64_t key_floats = p.len_k * (round_up(p.dim_qk, kLanes) + round_up(p.dim_v, kLanes));
    Scratch partials(shares > 1 ? shares * heads * key_floats : 0), sink_terms(p.grad_sinks ? shares * heads_q : 0);
    if (partials.failed() || sink_terms.failed()) return FASTATTN_OUT_OF_MEMORY;
    float *partial = partials.take(0), *sinks = sink_terms.take(0);
    int status = FASTATTN_OK;
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        Buffers buffers(p);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < heads * shares; item++) {
            if (buffers.scratch.failed()) continue;
            const int64_t share = item % shares, head = item / shares;
            run_item(p, head / p.heads_kv, head % p.heads_kv, share, shares, buffers, p.grad_sinks ? sinks + share * heads_q : nullptr);
            if (shares == 1) {
                write_keys(p, head / p.heads_kv, head % p.heads_kv, buffers.grad_keys, buffers.wide_qk, buffers.grad_values, buffers.wide_v);
                continue;
            }
            float *target = partial + (share * heads + head) * key_floats;
            memcpy(target, buffers.grad_keys, (size_t)(p.len_k * buffers.wide_qk) * 4);
            memcpy(target + p.len_k * buffers.wide_qk, buffers.grad_values, (size_t)(p.len_k * buffers.wide_v) * 4);
        }
#pragma omp for schedule(static)
        for (int64_t head = 0; head < (shares > 1 ? heads : 0); head++) {
            float *total = partial + head * key_floats;
            for (int64_t share = 1; share < shares; share++)
                for (int64_t at = 0; at < key_floats; at += kLanes) add_to(total + at, load(total + share * heads * key_floats + at));
            write_keys(p, head / p.heads_kv, head % p.heads_kv, total, buffers.wide_qk, total + p.len_k * buffers.wide_qk, buffers.wide_v);
        }
    }
    for (int64_t h = 0; p.grad_sinks && h < p.heads_q; h++) {
        p.grad_sinks[h] = 0;
        for (int64_t i = 0; i < shares * p.batch; i++) p.grad_sinks[h] += sinks[i * p.heads_q + h];
    }
    return status;
}

FASTATTN_NAMESPACE_END
