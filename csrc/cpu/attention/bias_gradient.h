// The gradient of a bias that batch entries, heads or queries share: ds summed over them, in a walk of its own.
//
// Several tiles, perhaps on several threads, would add to one element during the main walk, in an order that changes from run to run. Here one work
// item owns an element of the bias: it walks all tiles that add to it, in order, and forms their ds again from the statistics that the main walk
// has kept. That costs two of its five products a second time and no memory but the bias itself. Where the queries share it too, an
// item has every kShares-th tile and a sum of its own, added in order at the end.
#pragma once
#include "backward_tile.h"

FASTATTN_NAMESPACE_BEGIN

class SharedBias {
  public:
    SharedBias(const fastattn_attention &p, const StoredStatistics &statistics)
        : p_(p),
          target_(p),
          statistics_(statistics),
          tiles_(p, p.len_q),
          slots_b_(target_.batch ? p.batch : smaller(1, p.batch)),
          slots_h_(target_.head ? p.heads_q : smaller(1, p.heads_q)),
          parts_(target_.query || p.len_q == 1 ? tiles_.count : smaller(kShares, tiles_.count)) {}

    static int64_t tile_floats() { return 2 * kKeyBlock * kMaxLanes; }
    int64_t sum_floats() const { return is_summed() ? items() * sum_stride() : 0; }

    int64_t items() const { return slots_b_ * slots_h_ * parts_; }

    void run(int64_t item, TileBuffers &buffers, float *tile_scratch, float *sums) const {
        const int64_t part = item % parts_, slot = item / parts_, h = slot % slots_h_, b = slot / slots_h_;
        BiasGradient target = target_;
        if (is_summed()) {
            target.data = sums + item * sum_stride();
            target.batch = target.head = 0;
            memset(target.data, 0, (size_t)sum_stride() * 4);
        }
        const int64_t all_b = p_.batch / slots_b_, all_h = p_.heads_q / slots_h_;  // either 1 or all of them
        for (int64_t batch = b; batch < b + all_b; batch++) {
            // Tiles as those of the longest sequence, whatever the length: the item's elements of the bias are then its own.
            const Sequence sequence = sequence_at(p_, batch);
            for (int64_t head = h; head < h + all_h; head++)
                for (int64_t index = part; index < tiles_.count && tiles_.begin(index) < sequence.len_q; index += parts_)
                    add_tile(tiles_.tile(sequence, head, index), target, buffers, tile_scratch);
        }
    }

    // The items' sums into the bias; for one thread.
    void finish(const float *sums) const {
        if (!is_summed()) return;
        for (int64_t slot = 0; slot < slots_b_ * slots_h_; slot++) {
            float *target = target_.data + slot / slots_h_ * target_.batch + slot % slots_h_ * target_.head;
            for (int64_t part = 0; part < parts_; part++)
                for (int64_t j = 0; j < keys(); j++) target[j] += sums[(slot * parts_ + part) * sum_stride() + j];
        }
    }

  private:
    static constexpr int64_t kShares = 16;

    bool is_summed() const { return target_.query == 0 && parts_ > 1; }
    int64_t keys() const { return target_.key ? p_.len_k : 1; }
    int64_t sum_stride() const { return Pieces::padded(keys()); }

    void add_tile(const QueryTile &tile, const BiasGradient &target, TileBuffers &buffers, float *tile_scratch) const {
        const TileBackward backward(p_, tile, buffers);
        const Statistics statistics = statistics_.load(p_, tile);
        float *scores = tile_scratch, *grads = tile_scratch + kKeyBlock * kMaxLanes;
        TileMask mask(p_, tile);
        while (mask.next()) {
            const KeyBlock &block = mask.block();
            backward.scores(mask, scores, nullptr);
            for (int64_t row = 0; row < block.count; row++)
                for (int64_t v = 0; v < tile.vectors; v++) {
                    float *score = scores + (row * tile.vectors + v) * kLanes;
                    store(score, softmax_term(load(score), softmax_base(statistics.maximum[v]), kLog2e));  // with a bias the factor is 1
                }
            backward.value_products(block, grads);
            backward.score_gradients(statistics, block.count, scores, grads);
            target.add(tile, block, grads);
        }
    }

    const fastattn_attention &p_;
    BiasGradient target_;
    const StoredStatistics &statistics_;
    QueryTiles tiles_;
    int64_t slots_b_, slots_h_, parts_;
};

FASTATTN_NAMESPACE_END
