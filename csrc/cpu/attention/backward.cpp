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
// On 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-25: that window 1/17. With a table of 257 distances and its gradient, (4, 8, 1024, 64), forward
// and backward take 224 ms; without any bias 214; torch 490 with the bias as a dense tensor and its gradient, 227 without.
// bfloat16, forward and backward in ms at (1, 8, 1024, D) for D of 64 and 128 on 2 cores of an AMD EPYC (Zen 5, AVX-512 BF16, VM), 2026-11-27; torch in
// the same runs: its scaled_dot_product_attention 31, 55, products and softmax one after the other 17.5, 22:
//   18, 36      as float32 (measured in float32, which takes as long)
//   12.7, 22.2  products of pairs
// bfloat16 with AMX, times as fast as by float32, medians of calls in turns, one core of an Intel Xeon (Emerald Rapids, VM), 2026-11-28, at (2, 12, 512,
// 64), (1, 8, 1024, D) for D of 32, 64, 128 and 256, causal (1, 8, 4096, 64): 2.3, 2.0, 2.3, 2.6, 3.5, 2.5.
// Memory: the sums of one KV head and a strip of 2 floats (3 with a softcap) per query of a tile and key that it sees, for each thread.
#include <omp.h>

#include "../kernels.h"
#include "backward_tile.h"
#include "bias_gradient.h"
#include "distance_gradient.h"
#include "key_heads.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kRoundFloats = 1 << 18;  // a round holds about so much for each thread

class Backward {
  public:
    explicit Backward(const fastattn_attention &p)
        : p_(p),
          tiling_(p),
          heads_(p),
          bias_(p),
          second_walk_(bias_.data && bias_.is_shared(p)),
          shared_bias_(p, statistics_),
          distance_(p) {}

    int run() {
        if (tiling_.failed() || heads_.failed() || distance_.failed()) return FASTATTN_OUT_OF_MEMORY;
        measure();
        const int64_t thread_floats = round_up(TileBuffers::floats(p_) + (heads_.alone() ? record_floats_ + KeyGradients::floats(p_) : 0) +
                                                   (second_walk_ ? SharedBias::tile_floats() : 0), 1024);
        Scratch scratch(p_.n_threads * thread_floats + pool_floats_ + round_floats() + KeyGradients::floats(p_) +
                        (second_walk_ ? StoredStatistics::floats(p_) + shared_bias_.sum_floats() : 0) + sink_floats());
        if (scratch.failed()) return FASTATTN_OUT_OF_MEMORY;
        float *threads = scratch.take(p_.n_threads * thread_floats);
        pool_ = scratch.take(pool_floats_);
        round_ = (TileRecord *)scratch.take(round_floats());
        sinks_ = scratch.take(sink_floats());
        const KeyGradients shared(p_, scratch);
        if (second_walk_) statistics_.take(p_, scratch);
        float *bias_sums = second_walk_ ? scratch.take(shared_bias_.sum_floats()) : nullptr;
#pragma omp parallel num_threads(p_.n_threads) if (p_.n_threads > 1)
        {
            const MatrixUnit unit(multiplies_pairs(p_));
            Pieces own(threads + omp_get_thread_num() * thread_floats);
            TileBuffers buffers(p_, own);
            float *scores = second_walk_ ? own.take(SharedBias::tile_floats()) : nullptr;
            if (heads_.alone()) {
                const KeyGradients keys(p_, own);
                float *memory = own.take(record_floats_);
#pragma omp for schedule(dynamic)
                for (int64_t index = heads_.together(); index < heads_.count(); index++) head_alone(heads_.at(index), buffers, keys, memory);
            }
            for (int64_t index = 0; index < heads_.together(); index++) head_together(heads_.at(index), buffers, shared);
            if (second_walk_) {
#pragma omp for schedule(dynamic)
                for (int64_t item = 0; item < shared_bias_.items(); item++) shared_bias_.run(item, buffers, scores, bias_sums);
            }
#pragma omp for schedule(static)
            for (int64_t part = 0; part < distance_.parts(); part++) distance_.finish(part);
        }
        if (second_walk_) shared_bias_.finish(bias_sums);
        if (p_.cu_seqlens_q) clear_unowned();
        sum_sinks();
        return FASTATTN_OK;
    }

  private:
    // Sizes of what is held for the largest batch entry.
    void measure() {
        for (int64_t b = 0; b < (p_.cu_seqlens_q ? p_.batch : smaller(1, p_.batch)); b++) {
            const Sequence sequence = sequence_at(p_, b);
            const QueryTiles tiles(p_, sequence.len_q);
            head_tiles_ = larger(head_tiles_, heads_.group() * tiles.count);
            record_floats_ = larger(record_floats_, TileRecord::floats(p_, tiles.lanes(), sequence.len_k));
        }
        pool_floats_ = heads_.together() ? p_.n_threads * larger(kRoundFloats, record_floats_) : 0;
    }

    void run_tile(TileRecord &record, TileBuffers &buffers, const KeyGradients *keys) const {
        TileBackward backward(p_, record.tile, buffers);
        const float sink = backward.run(record, second_walk_ ? &statistics_ : nullptr, bias_.data && !second_walk_ ? &bias_ : nullptr, keys);
        if (p_.grad_sinks) sinks_[tiling_.index(record.tile)] = sink;
    }

    void head_alone(const KeyHead &head, TileBuffers &buffers, const KeyGradients &keys, float *memory) const {
        const Span all = {0, head.sequence.len_k};
        keys.clear(p_, all);
        distance_.clear(head.sequence.batch, head.index);
        for (int64_t index = 0; index < head.tiles(); index++) {
            Pieces pieces(memory);
            TileRecord record(p_, head.tile(index), head.sequence.len_k, pieces);
            run_tile(record, buffers, &keys);
            distance_.add(record);
        }
        keys.write(p_, head.sequence, head.index, all);
    }

    void head_together(const KeyHead &head, TileBuffers &buffers, const KeyGradients &keys) {
        const int64_t parts = 4 * p_.n_threads;
        const Span all = {0, head.sequence.len_k};
#pragma omp single nowait
        distance_.clear(head.sequence.batch, head.index);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) keys.clear(p_, key_part(all, parts, part));
        for (int64_t first = 0, size; first < head.tiles(); first += size) {
#pragma omp single
            gather(head, first);
            size = round_size_;
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < size; i++) run_tile(round_[i], buffers, nullptr);
#pragma omp single nowait
            for (int64_t i = 0; i < size; i++) distance_.add(round_[i]);
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < parts; part++) {
                const Span span = key_part(round_keys(), parts, part);
                for (int64_t i = 0; i < size; i++)
                    for (int64_t block = 0; block < round_[i].n_blocks; block++) keys.add(p_, round_[i], round_[i].blocks[block], span);
            }
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) keys.write(p_, head.sequence, head.index, key_part(all, parts, part));
    }

    // The next round: as many tiles as the pool holds, one at least.
    void gather(const KeyHead &head, int64_t first) {
        Pieces pool(pool_);
        int64_t used = 0;
        round_size_ = 0;
        for (int64_t index = first; index < head.tiles(); index++) {
            const QueryTile tile = head.tile(index);
            const int64_t keys = TileMask(p_, tile).most_keys();
            used += TileRecord::floats(p_, tile.lanes(), keys);
            if (used > pool_floats_) break;
            round_[round_size_++] = TileRecord(p_, tile, keys, pool);
        }
    }

    // The keys that the tiles of the round see.
    Span round_keys() const {
        Span span = {INT64_MAX, 0};
        for (int64_t i = 0; i < round_size_; i++) {
            const TileRecord &record = round_[i];
            if (record.n_blocks == 0) continue;
            const KeyBlock &last = record.blocks[record.n_blocks - 1];
            span = {smaller(span.begin, record.blocks[0].begin), larger(span.end, last.begin + last.count)};
        }
        return span.end ? span : Span{0, 0};
    }

    static Span key_part(Span span, int64_t parts, int64_t part) {
        const int64_t keys = larger(0, span.end - span.begin), step = larger(kKeyBlock, round_up((keys + parts - 1) / parts, kTileRows));
        return {smaller(span.end, span.begin + part * step), smaller(span.end, span.begin + (part + 1) * step)};
    }

    // Rows of a packed batch that no sequence owns.
    void clear_unowned() const {
        for_unowned(p_.cu_seqlens_q, p_.batch, p_.len_q, p_.rows_q, [&](Span rows) { clear_rows(p_.grad_q, p_.dtype, p_.heads_q, rows, p_.dim_qk); });
        for_unowned(p_.cu_seqlens_k, p_.batch, p_.len_k, p_.rows_k, [&](Span rows) {
            clear_rows(p_.grad_k, p_.dtype, p_.heads_kv, rows, p_.dim_qk);
            clear_rows(p_.grad_v, p_.dtype, p_.heads_kv, rows, p_.dim_v);
        });
    }

    void sum_sinks() const {
        for (int64_t h = 0; p_.grad_sinks && h < p_.heads_q; h++) {
            p_.grad_sinks[h] = 0;
            for (int64_t b = 0; b < p_.batch; b++) {
                const int64_t tiles = (tiling_.before(b + 1) - tiling_.before(b)) / p_.heads_q;
                const float *sinks = sinks_ + tiling_.before(b) + h * tiles;
                for (int64_t i = 0; i < tiles; i++) p_.grad_sinks[h] += sinks[i];
            }
        }
    }

    int64_t round_floats() const { return heads_.together() ? Pieces::padded(head_tiles_ * (int64_t)(sizeof(TileRecord) / 4)) : 0; }
    int64_t sink_floats() const { return p_.grad_sinks ? Pieces::padded(tiling_.count()) : 0; }

    const fastattn_attention &p_;
    const Tiling tiling_;
    const KeyHeads heads_;
    const BiasGradient bias_;
    const bool second_walk_;  // for a bias that is shared
    StoredStatistics statistics_;
    const SharedBias shared_bias_;
    const DistanceGradient distance_;
    int64_t head_tiles_ = 0, record_floats_ = 0, pool_floats_ = 0;  // query tiles of a KV head, a tile's record, the records of a round: the most
    float *pool_, *sinks_;
    TileRecord *round_;  // the tiles that the threads work on together
    int64_t round_size_ = 0;
};

}  // namespace

int attention_backward(const fastattn_attention &p) { return Backward(p).run(); }

FASTATTN_NAMESPACE_END
