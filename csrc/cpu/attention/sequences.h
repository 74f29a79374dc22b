// The batch entries of a call, and their queries in tiles: entries of one length each after the other, or the sequences of a packed batch.
#pragma once
#include "../micro.h"
#include "../pack.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int kMaxVectors = 4;  // query vectors in a tile
constexpr int64_t kMaxLanes = kMaxVectors * kLanes;

// Whether products are of pairs of bfloat16 (pair_tile.h).
static inline bool multiplies_pairs(const fastattn_attention &p) { return kBfloat16Parts > 0 && p.dtype == FASTATTN_BFLOAT16 && p.dim_qk % 2 == 0; }
// Words along k of so many elements.
static inline int64_t words_of_elements(int64_t elements) { return round_up((elements + 1) / 2, kWordDepth); }
// Rows of a tile's queries or output gradients as (column, lane) of floats, or of words.
static inline int64_t lane_rows(int64_t columns) { return larger(columns, kWordDepth); }

// Half-open: of keys or rows.
struct Span {
    int64_t begin, end;
};

// One batch entry: its first row of q and of k, counted from where its batch stride leads, and how many it has; aligned at its end, query i sits
// at key position i + offset.
struct Sequence {
    int64_t batch;
    int64_t first_q, first_k;
    int64_t len_q, len_k;
    int64_t offset;
};

// The rows of sequence b, cut off at the longest length and at the end of the tensor.
FASTATTN_INLINE Span owned_rows(const int32_t *cu_seqlens, int64_t b, int64_t longest, int64_t rows) {
    const int64_t begin = larger(0, smaller(cu_seqlens[b], rows));
    return {begin, larger(begin, smaller(smaller(cu_seqlens[b + 1], rows), begin + longest))};
}

static inline Sequence sequence_at(const fastattn_attention &p, int64_t b) {
    if (!p.cu_seqlens_q) return {b, 0, 0, p.len_q, p.len_k, p.len_k - p.len_q};
    const Span q = owned_rows(p.cu_seqlens_q, b, p.len_q, p.rows_q), k = owned_rows(p.cu_seqlens_k, b, p.len_k, p.rows_k);
    const auto whole = [&](const int32_t *cu_seqlens) { return (int64_t)cu_seqlens[b + 1] - cu_seqlens[b]; };  // also where it is cut off
    return {b, q.begin, k.begin, q.end - q.begin, k.end - k.begin, whole(p.cu_seqlens_k) - whole(p.cu_seqlens_q)};
}

// Calls f(span) for the rows of a packed tensor that no sequence owns.
template <class F>
void for_unowned(const int32_t *cu_seqlens, int64_t batch, int64_t longest, int64_t rows, F &&f) {
    int64_t done = 0;
    for (int64_t b = 0; b < batch; b++) {
        const Span own = owned_rows(cu_seqlens, b, longest, rows);
        if (done < own.begin) f(Span{done, own.begin});
        done = larger(done, own.end);
    }
    if (done < rows) f(Span{done, rows});
}

static inline void clear_rows(const fastattn_tensor &t, int32_t dtype, int64_t heads, Span rows, int64_t columns) {
    for (int64_t h = 0; h < heads; h++)
        for (int64_t row = rows.begin; row < rows.end; row++)
            memset(offset(t.data, dtype, h * t.stride[1] + row * t.stride[2]), 0, (size_t)(columns * size_of(dtype)));
}

// Queries [begin, begin + count) of one head and sequence; lane l is query begin + l, lanes past `count` are padding.
struct QueryTile : Sequence {
    int64_t head;
    int64_t begin, count;
    int64_t vectors;

    int64_t lanes() const { return vectors * kLanes; }
    int64_t last() const { return begin + count - 1; }
    int64_t query(int64_t lane) const { return begin + smaller(lane, count - 1); }  // padding repeats the last query
    int64_t head_kv(const fastattn_attention &p) const { return head / (p.heads_q / p.heads_kv); }

    // Of its first query among the numbers that there are one each of for every query: (B,Hq,Sq), or (1,Hq,rows) in a packed batch.
    int64_t row(const fastattn_attention &p) const {
        return p.cu_seqlens_q ? head * p.rows_q + first_q + begin : (batch * p.heads_q + head) * p.len_q + begin;
    }
};

// Rows of a sequence's head, the first one first.
FASTATTN_INLINE Rows rows_of(const fastattn_tensor &t, int32_t dtype, int64_t batch, int64_t head, int64_t first) {
    return {offset((const void *)t.data, dtype, batch * t.stride[0] + head * t.stride[1] + first * t.stride[2]), dtype, t.stride[2]};
}
FASTATTN_INLINE Rows query_rows(const fastattn_attention &p, const fastattn_tensor &t, const QueryTile &tile) {
    return rows_of(t, p.dtype, tile.batch, tile.head, tile.first_q);
}
FASTATTN_INLINE Rows key_rows(const fastattn_attention &p, const fastattn_tensor &t, const Sequence &sequence, int64_t head_kv) {
    return rows_of(t, p.dtype, sequence.batch, head_kv, sequence.first_k);
}

// `len` queries as tiles of nearly equal size instead of full ones and a small rest. With block masks every 64 queries by themselves, so that a tile
// lies within a row of blocks.
class QueryTiles {
  public:
    int64_t count;

    QueryTiles(const fastattn_attention &p, int64_t len) {
        if (p.mask.blocks.row_ptr.data) {
            constexpr int64_t kWidest = kLanes == 16 ? kMaxVectors : kTileVectors;
            vectors_ = smaller(kWidest, (smaller(len, kBlockRows) + kLanes - 1) / kLanes);
            group_ = kBlockRows;
            per_group_ = (kBlockRows + kWidest * kLanes - 1) / (kWidest * kLanes);
            count = len / group_ * per_group_ + (vectors_ ? (len % group_ + lanes() - 1) / lanes() : 0);
        } else {
            const int64_t widest = (kWordBlocks && multiplies_pairs(p) ? kMaxVectors : kTileVectors) * kLanes;
            count = (len + widest - 1) / widest;
            vectors_ = count ? ((len + count - 1) / count + kLanes - 1) / kLanes : 0;
            group_ = lanes();
            per_group_ = 1;
        }
    }

    int64_t lanes() const { return vectors_ * kLanes; }  // of the widest tile
    int64_t begin(int64_t index) const { return index / per_group_ * group_ + index % per_group_ * lanes(); }
    int64_t index(int64_t begin) const { return begin / group_ * per_group_ + begin % group_ / lanes(); }
    QueryTile tile(const Sequence &sequence, int64_t head, int64_t index) const {
        const int64_t first = begin(index), count = smaller(smaller(lanes(), group_ - first % group_), sequence.len_q - first);
        return {sequence, head, first, count, per_group_ == 1 ? vectors_ : (count + kLanes - 1) / kLanes};
    }

  private:
    static constexpr int64_t kBlockRows = 64;
    int64_t vectors_, group_, per_group_;  // in every `group_` queries so many tiles
};

// All query tiles of a call in order: by batch entry, then by head, then by query.
class Tiling {
  public:
    explicit Tiling(const fastattn_attention &p)
        : p_(p), padded_(QueryTiles(p, p.len_q).count), before_(p.cu_seqlens_q ? (int64_t *)malloc((size_t)(p.batch + 1) * sizeof(int64_t)) : nullptr) {
        if (!before_) return;
        before_[0] = 0;
        for (int64_t b = 0; b < p.batch; b++) before_[b + 1] = before_[b] + p.heads_q * QueryTiles(p, sequence_at(p, b).len_q).count;
    }
    ~Tiling() { free(before_); }
    Tiling(const Tiling &) = delete;
    Tiling &operator=(const Tiling &) = delete;

    bool failed() const { return p_.cu_seqlens_q && !before_; }
    int64_t count() const { return before(p_.batch); }
    // Tiles of the batch entries before this one.
    int64_t before(int64_t batch) const { return p_.cu_seqlens_q ? before_[batch] : batch * p_.heads_q * padded_; }
    int64_t index(const QueryTile &tile) const { return before(tile.batch) + tile.head * tiles(tile).count + tiles(tile).index(tile.begin); }

    // Tile `item`, the tiles of a head counted from its last: those of a causal mask are the longest, which should start first.
    QueryTile from_last(int64_t item) const {
        int64_t low = 0, high = p_.batch;  // before(low) <= item < before(high)
        if (!p_.cu_seqlens_q) {
            low = item / (p_.heads_q * padded_);
        } else {
            while (low + 1 < high) {
                const int64_t middle = (low + high) / 2;
                if (before_[middle] <= item) low = middle;
                else high = middle;
            }
        }
        const Sequence sequence = sequence_at(p_, low);
        const QueryTiles tiles = this->tiles(sequence);
        const int64_t within = item - before(low);
        return tiles.tile(sequence, within / tiles.count, tiles.count - 1 - within % tiles.count);
    }

  private:
    QueryTiles tiles(const Sequence &sequence) const { return QueryTiles(p_, sequence.len_q); }

    const fastattn_attention &p_;
    int64_t padded_;  // tiles of a head, when not packed
    int64_t *before_;
};

FASTATTN_NAMESPACE_END
