// Attention backward: gradients of q, k, v, of the bias and of the sinks.
//
//   p = softmax(s), with the sink in its denominator;  dp = dropout'(grad_out v^T);  delta = sum over keys of p dp
//   ds = p (dp - delta) + grad_lse softmax(s), the last one without the sink;  grad_bias = ds, summed where the bias is broadcast
//   grad_q = scale ds k,  grad_k = scale ds^T q,  grad_v = dropout(p)^T grad_out,  grad_sink = - sum over queries of p_sink sum(p dp)
// With a softcap ds is also multiplied by 1 - tanh^2 before the products. Numerics as in forward.cpp.
//
// Algorithm: the same transposed tiles as forward, five products each (backward_tile.h). A thread takes whole KV heads as long as there are enough
//   for all of them. The remaining heads are shared by all threads: in rounds they first work on several query tiles at once, then on
//   ranges of keys, to which they add what the tiles of the round left. Either way a key's gradient is the sum over query tiles in their order, so
//   the results do not depend on the number of threads.
//
// Measured, float32, GFLOP/s (2.5 times forward's operations) on 2 cores of an Intel Xeon (model 167, VM), 2026-11-22, torch 2.13 in the same run in
// brackets: (B, H, S, D) = (8, 12, 360, 32) 220 (171), (1, 8, 2048, 64) 281 (254). One head of 8,192 queries and keys: 342 ms on one thread,
// 178 ms on two; with a causal window of 256 keys 14.5 and 8.7 ms. That window at 8 heads, forward and backward: 1/31 of torch's time with the
// mask as a bool tensor.
// Memory: the sums of one KV head and a strip of 2 floats (3 with a softcap) per query of a tile and key that it sees, for each thread.
#include <omp.h>

#include "../kernels.h"
#include "backward_tile.h"
#include "bias_gradient.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kRoundFloats = 1 << 18;  // a round holds about so much for each thread

class Backward {
  public:
    explicit Backward(const fastattn_attention &p)
        : p_(p),
          tiles_(p),
          bias_(p),
          heads_(p.batch * p.heads_kv),
          head_tiles_(p.heads_kv ? p.heads_q / p.heads_kv * tiles_.count : 0),
          alone_(p.n_threads == 1 ? heads_ : heads_ / p.n_threads * p.n_threads),
          second_walk_(bias_.data && bias_.is_shared(p)),
          shared_bias_(p, statistics_),
          strip_floats_(TileRecord::floats(p, tiles_.vectors * kLanes, p.len_k)),
          pool_floats_(alone_ == heads_ ? 0 : p.n_threads * larger(kRoundFloats, strip_floats_)),
          thread_floats_(round_up(TileBuffers::floats(p) + (alone_ ? strip_floats_ + KeyGradients::floats(p) : 0) +
                                      (second_walk_ ? SharedBias::tile_floats() : 0), 1024)),
          scratch_(p.n_threads * thread_floats_ + pool_floats_ + round_floats() + KeyGradients::floats(p) +
                   (second_walk_ ? StoredStatistics::floats(p) + shared_bias_.sum_floats() : 0) + sink_floats()) {}

    int run() {
        if (scratch_.failed()) return FASTATTN_OUT_OF_MEMORY;
        float *threads = scratch_.take(p_.n_threads * thread_floats_);
        pool_ = scratch_.take(pool_floats_);
        round_ = (TileRecord *)scratch_.take(round_floats());
        sinks_ = scratch_.take(sink_floats());
        const KeyGradients shared(p_, scratch_);
        if (second_walk_) statistics_.take(p_, scratch_);
        float *bias_sums = second_walk_ ? scratch_.take(shared_bias_.sum_floats()) : nullptr;
#pragma omp parallel num_threads(p_.n_threads) if (p_.n_threads > 1)
        {
            Pieces own(threads + omp_get_thread_num() * thread_floats_);
            TileBuffers buffers(p_, own);
            float *scores = second_walk_ ? own.take(SharedBias::tile_floats()) : nullptr;
            if (alone_) {
                const KeyGradients keys(p_, own);
                float *strip = own.take(strip_floats_);
#pragma omp for schedule(dynamic)
                for (int64_t head = 0; head < alone_; head++) head_alone(head, buffers, keys, strip);
            }
            for (int64_t head = alone_; head < heads_; head++) head_together(head, buffers, shared);
            if (second_walk_) {
#pragma omp for schedule(dynamic)
                for (int64_t item = 0; item < shared_bias_.items(); item++) shared_bias_.run(item, buffers, scores, bias_sums);
            }
        }
        if (second_walk_) shared_bias_.finish(bias_sums);
        sum_sinks();
        return FASTATTN_OK;
    }

  private:
    // Query tile `index` of a KV head: the tiles of its first query head, of the next one, and so on.
    QueryTile tile_of(int64_t head, int64_t index) const {
        const int64_t group = p_.heads_q / p_.heads_kv, head_q = head % p_.heads_kv * group + index / tiles_.count;
        return tiles_.tile(head / p_.heads_kv, head_q, index % tiles_.count, p_.len_q);
    }

    void run_tile(TileRecord &record, TileBuffers &buffers, const KeyGradients *keys) const {
        const QueryTile &tile = record.tile;
        TileBackward backward(p_, tile, buffers);
        const float sink = backward.run(record, second_walk_ ? &statistics_ : nullptr, bias_.data && !second_walk_ ? &bias_ : nullptr, keys);
        if (p_.grad_sinks) sinks_[(tile.batch * p_.heads_q + tile.head) * tiles_.count + tile.begin / tile.lanes()] = sink;
    }

    void head_alone(int64_t head, TileBuffers &buffers, const KeyGradients &keys, float *strip) const {
        keys.clear(p_, {0, p_.len_k});
        for (int64_t index = 0; index < head_tiles_; index++) {
            Pieces pieces(strip);
            TileRecord record(p_, tile_of(head, index), p_.len_k, pieces);
            run_tile(record, buffers, &keys);
        }
        keys.write(p_, head / p_.heads_kv, head % p_.heads_kv, {0, p_.len_k});
    }

    void head_together(int64_t head, TileBuffers &buffers, const KeyGradients &keys) {
        const int64_t parts = 4 * p_.n_threads;
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) keys.clear(p_, key_part({0, p_.len_k}, parts, part));
        for (int64_t first = 0, size; first < head_tiles_; first += size) {
#pragma omp single
            gather(head, first);
            size = round_size_;
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < size; i++) run_tile(round_[i], buffers, nullptr);
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < parts; part++) {
                const KeySpan span = key_part(round_keys(), parts, part);
                for (int64_t i = 0; i < size; i++)
                    for (int64_t block = 0; block < round_[i].n_blocks; block++) keys.add(p_, round_[i], round_[i].blocks[block], span);
            }
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) keys.write(p_, head / p_.heads_kv, head % p_.heads_kv, key_part({0, p_.len_k}, parts, part));
    }

    // The next round: as many tiles as the pool holds, one at least.
    void gather(int64_t head, int64_t first) {
        Pieces pool(pool_);
        int64_t used = 0;
        round_size_ = 0;
        for (int64_t index = first; index < head_tiles_; index++) {
            const QueryTile tile = tile_of(head, index);
            const int64_t keys = TileMask(p_, tile).most_keys();
            used += TileRecord::floats(p_, tile.lanes(), keys);
            if (used > pool_floats_) break;
            round_[round_size_++] = TileRecord(p_, tile, keys, pool);
        }
    }

    // The keys that the tiles of the round see.
    KeySpan round_keys() const {
        KeySpan span = {p_.len_k, 0};
        for (int64_t i = 0; i < round_size_; i++) {
            const TileRecord &record = round_[i];
            if (record.n_blocks == 0) continue;
            const KeyBlock &last = record.blocks[record.n_blocks - 1];
            span = {smaller(span.begin, record.blocks[0].begin), larger(span.end, last.begin + last.count)};
        }
        return span;
    }

    static KeySpan key_part(KeySpan span, int64_t parts, int64_t part) {
        const int64_t keys = larger(0, span.end - span.begin), step = larger(kKeyBlock, round_up((keys + parts - 1) / parts, kTileRows));
        return {smaller(span.end, span.begin + part * step), smaller(span.end, span.begin + (part + 1) * step)};
    }

    void sum_sinks() const {
        for (int64_t h = 0; p_.grad_sinks && h < p_.heads_q; h++) {
            p_.grad_sinks[h] = 0;
            for (int64_t b = 0; b < p_.batch; b++)
                for (int64_t i = 0; i < tiles_.count; i++) p_.grad_sinks[h] += sinks_[(b * p_.heads_q + h) * tiles_.count + i];
        }
    }

    int64_t round_floats() const { return alone_ == heads_ ? 0 : Pieces::padded(head_tiles_ * (int64_t)(sizeof(TileRecord) / 4)); }
    int64_t sink_floats() const { return p_.grad_sinks ? Pieces::padded(p_.batch * p_.heads_q * tiles_.count) : 0; }

    const fastattn_attention &p_;
    QueryTiles tiles_;
    BiasGradient bias_;
    int64_t heads_, head_tiles_, alone_;  // KV heads, query tiles of one, how many heads are worked on by a single thread
    bool second_walk_;                    // for a bias that is shared
    StoredStatistics statistics_;
    SharedBias shared_bias_;
    int64_t strip_floats_, pool_floats_, thread_floats_;
    Scratch scratch_;
    float *pool_, *sinks_;
    TileRecord *round_;  // the tiles that the threads work on together
    int64_t round_size_ = 0;
};

}  // namespace

int attention_backward(const fastattn_attention &p) { return Backward(p).run(); }

FASTATTN_NAMESPACE_END
