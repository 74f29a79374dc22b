// Attention over a key-value cache: few queries per sequence against many keys, whose time is that of reading the cache once.
//
// Shapes: q (B,Hq,Sq,D), out (B,Hq,Sq,Dv), lse (B,Hq,Sq); the cache (B,Hkv,S,D) and (B,Hkv,S,Dv) through its strides, or in pages: (pages, page
//   size, Hkv, D), the n-th page of sequence b being block_table[b][n]. cache_lengths (B) counts the keys in use, those of the queries themselves
//   included: query i sits at position cache_length - Sq + i, and key j is visible to it by band, intervals (of key positions), bools and bias.
// Numerics: as forward.cpp; by the matrix unit, too, probabilities are rounded to bfloat16.
// Algorithm: a head group's queries go together, so that each key is read once for all of them. The keys of a sequence are cut into parts of
//   equal size, which are the unit of work: a few sequences then keep every core busy. Each part makes its own softmax; the parts are put together in
//   order (Flash-Decoding, Dao et al. 2023), so that the result does not depend on the thread count. Keys and values are read where they lie,
//   kBlock at a time, in whatever format; while the scores of a block are formed its values are fetched, and while the values are summed the next keys.
//
// Ladder, 8 sequences x 32 heads over 8 heads of keys x 4,096 keys x 128, float32 / bfloat16, GB/s of cache read, on 2 cores of an Intel Xeon with AMX
// (model 167, VM), 2026-11-22; in the same runs torch 2.13's scaled_dot_product_attention 8.5 / 7.5, torch.sum of the same caches 22 / 24.
//   15.9,  9.6  products of the micro-kernel, 64 keys at a time as float32
//   18.5, 13.9  keys and values read where they lie, two keys for all rows of a group at a time, the next block fetched into the level-1 cache
//   17.9, 14.5  fetched into the level-2 cache
// On 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-26; in the same runs torch 7.4 to 8.7 / 0.93, torch.sum 28 to 39, the caches in the level-1 cache
// on one core 25 / 14.
//   19.7, 13.7  as above
//   20.1, 16.5  conversions of one instruction, partial vectors without a call in the loop
//   22.3, 19.5  the next rows fetched in order and at the pace of those read; without any fetching 14.8, 11.6
//   23.3, 20.7  parts of 1,024 keys instead of 256: nobody fetches the first keys of a part
//   24.2, 21.2  twelve accumulators instead of eight, in blocks of 24 keys; sums lane by lane, a maximum looked for only where a score exceeds it
//   25.0, 22.0  parts of 384 keys again, for more cores than parts; each fetches the first keys of the next, and a thread takes several in a row
// Heads side by side instead of keys, as in pages of 16 keys: 18.5, 13.6; all heads of a part before the next part 20.7, 15.8.
// Slower there: rows fetched twice, or two blocks ahead (17.9); fetched by columns (15.4); blocks of 48 keys (equal).
// bfloat16 with AMX, several queries to a head of keys by the matrix unit (decode_tiles.h), times as fast as by vectors, medians of calls in turns, caches
// from memory, one core of an Intel Xeon (Emerald Rapids, VM, in use by others too), 2026-11-28; queries of a group 8, 16, 32 and 64:
//   4,096 keys x 128       0.94  1.56  2.3        a block's keys, then its product, then the block's values
//                          1.09  1.78  2.5  3.0   16 keys, or 64 columns of values, and their product; the next lines into the level-2 cache
//   2,048 keys x 80        1.06  1.67  2.2   2.4  in the end
// One query to a head of keys, 12 heads of 64, us of processor time a call at 128, 512 and 2,048 keys, least of 25 (AVX2: 40), the same Xeon, 2026-11-29;
// torch's bfloat16 21, 65, 366:
//   bfloat16, float32, AVX-512 and AMX    34, 114, 495    31, 163, 754    sums of 2 vectors at a time; five instructions widen 16 bfloat16
//                                         26,  83, 368    29, 159, 746    sums of 8 that do not wait for one another; one instruction
//   bfloat16, float32, AVX2               35, 112, 478    36, 157, 702    as above
//                                         33, 101, 460    33, 161, 745
// Tried: pairs by vectors (vdpbf16ps), 1.07 with one query, 1.01 with four, 0.80 to 0.93 with eight: the instruction is slow there.
#include "../kernels.h"
#include "decode_tiles.h"
#include "distance.h"
#include "words.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kPart = 384;                        // keys with a softmax of their own
constexpr int64_t kMostParts = 8;                     // that a thread takes at once: it fetches the next part's first keys during the last block of one
constexpr int64_t kFirstTileRow = 8;                  // queries of a group from which on the matrix unit is faster
static_assert(kPart % kBlock == 0);

// The queries of one head group and one sequence, and the keys that some of them may see.
struct Group {
    int64_t batch, head_kv, cache_length;
    Span span;
};

struct Shape {
    int64_t heads_per_group, rows, width_qk, width_v, parts;
    bool in_tiles;  // by the matrix unit
    explicit Shape(const fastattn_decode &p)
        : heads_per_group(p.heads_q / p.heads_kv),
          rows(heads_per_group * p.len_q),
          width_qk(round_up(p.dim_qk, kLanes)),
          width_v(round_up(p.dim_v, kLanes)),
          parts(parts_of(p.max_length)),
          in_tiles(DecodeTiles::kAreThere && p.dtype == FASTATTN_BFLOAT16 && rows >= kFirstTileRow) {
        if (in_tiles) width_qk = DecodeTiles::width(p.dim_qk) / 2, width_v = DecodeTiles::width(p.dim_v);
    }
    static int64_t parts_of(int64_t keys) { return (keys + kPart - 1) / kPart; }
    int64_t rows_held() const { return in_tiles ? DecodeTiles::held(rows) : rows; }
    int64_t partial_floats() const { return rows_held() * width_v + 2 * rows; }
};

// One query of a group, and its visible keys: its share of the band, and of each interval, within the cache.
struct Query {
    int64_t head, index, position;
    Span band;
    int64_t intervals;
    Span interval[kMaxIntervals];

    Query(const fastattn_decode &p, const Group &group, int64_t row)
        : head(group.head_kv * (p.heads_q / p.heads_kv) + row / p.len_q),
          index(row % p.len_q),
          position(group.cache_length - p.len_q + index),
          band{0, group.cache_length},
          intervals(p.n_intervals) {
        if (p.band_has_left) band.begin = larger(band.begin, position - p.band_left);
        if (p.band_has_right) band.end = smaller(band.end, position + p.band_right + 1);
        const fastattn_tensor &t = p.intervals;
        for (int64_t r = 0; r < intervals; r++) {
            const int32_t *bounds = (const int32_t *)t.data + r * t.stride[0] + group.batch * t.stride[1] + head * t.stride[2] + index * t.stride[3];
            interval[r] = {larger(band.begin, bounds[0]), smaller(band.end, bounds[1])};
        }
    }

    Span span() const {
        if (!intervals) return band;
        Span all{INT64_MAX, 0};
        for (int64_t r = 0; r < intervals; r++)
            if (interval[r].begin < interval[r].end) all = {smaller(all.begin, interval[r].begin), larger(all.end, interval[r].end)};
        return all;
    }

    bool covers(int64_t begin, int64_t end) const {
        for (int64_t r = 0; r < intervals; r++)
            if (interval[r].begin <= begin && end <= interval[r].end) return true;
        return !intervals && band.begin <= begin && end <= band.end;
    }

    // Bit i: key begin + i, of `count`, is visible by band, intervals and bools, and no bias of -inf hides it.
    uint64_t word(const fastattn_decode &p, const Group &group, int64_t begin, int64_t count) const {
        uint64_t seen = intervals ? 0 : bits_between(band.begin - begin, band.end - begin);
        for (int64_t r = 0; r < intervals; r++) seen |= bits_between(interval[r].begin - begin, interval[r].end - begin);
        if (p.dense.data) seen &= word_of_bools((const uint8_t *)p.dense.data + at(p.dense, group, begin), p.dense.stride[3], count);
        if (p.bias.data) seen &= word_of_finite(bias(p, group, begin), p.bias_dtype, p.bias.stride[3], count);
        return seen & bits_below(count);
    }

    const void *bias(const fastattn_decode &p, const Group &group, int64_t key) const {
        return offset((const void *)p.bias.data, p.bias_dtype, at(p.bias, group, key));
    }

    // Where the element of a key is in a tensor (B,Hq,Sq,S).
    int64_t at(const fastattn_tensor &t, const Group &group, int64_t key) const {
        return group.batch * t.stride[0] + head * t.stride[1] + index * t.stride[2] + key * t.stride[3];
    }
};

Group group_at(const fastattn_decode &p, const Shape &shape, int64_t index) {
    Group group{index / p.heads_kv, index % p.heads_kv, 0, {INT64_MAX, 0}};
    group.cache_length = p.cache_lengths ? larger(0, smaller(p.max_length, p.cache_lengths[group.batch])) : p.max_length;
    for (int64_t row = 0; row < shape.rows; row++) {
        const Span span = Query(p, group, row).span();
        if (span.begin < span.end) group.span = {smaller(group.span.begin, span.begin), larger(group.span.end, span.end)};
    }
    return group;
}

// What one thread works with; `totals` are the softmax sums of a part, lane by lane.
struct DecodeBuffers {
    DecodeBuffers(const fastattn_decode &p, const Shape &shape)
        : tile_floats(shape.in_tiles ? DecodeTiles::floats(shape.rows, p.dim_qk, p.dim_v) : 0),
          scratch(Scratch::padded(shape.rows * kQueryFloats) + Scratch::padded(shape.rows * shape.width_qk) + shape.rows_held() * kBlock +
                  Scratch::padded(shape.rows * kLanes) + shape.width_v + tile_floats + 64),
          query((Query *)scratch.take(shape.rows * kQueryFloats)),
          queries(scratch.take(shape.rows * shape.width_qk)),
          scores(scratch.take(shape.rows_held() * kBlock)),
          totals(scratch.take(shape.rows * kLanes)),
          sums(scratch.take(shape.width_v)),
          tiles(shape.rows, p.dim_qk, p.dim_v, scratch.take(tile_floats)) {}
    static constexpr int64_t kQueryFloats = sizeof(Query) / sizeof(float);
    int64_t tile_floats;
    Scratch scratch;
    Query *query;
    float *queries, *scores, *totals, *sums;
    DecodeTiles tiles;
};

// Keys [begin, begin + count); bit i of `seen` says that some query of the group sees key begin + i.
struct KeyBlock {
    int64_t begin = 0, count = 0;
    uint64_t seen = 0;
};

// Calls f.template operator()<dtype, Rows>(first row) until all rows are done.
template <class F>
void for_rows(int32_t dtype_at_run, int64_t rows, F &&f) {
    with_dtype(dtype_at_run, [&]<int dtype>() {
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows) f.template operator()<dtype, kRows>(row);
        if (row + 4 <= rows) f.template operator()<dtype, 4>(row), row += 4;
        if (row + 2 <= rows) f.template operator()<dtype, 2>(row), row += 2;
        if (row < rows) f.template operator()<dtype, 1>(row);
    });
}

// Where the rows of a block of keys, or of values, lie; for those that nobody sees zeros, because NaN may lie there.
BlockRows block_rows(const fastattn_decode &p, const fastattn_tensor &cache, const Group &group, const KeyBlock &block) {
    constexpr int64_t kMaxDim = 256;
    alignas(64) static constexpr char kZeros[kMaxDim * 4] = {};
    BlockRows rows;
    const int64_t begin = block.begin, count = block.count;
    const int64_t head_stride = p.block_table ? cache.stride[2] : cache.stride[1];
    const int64_t row_bytes = (p.block_table ? cache.stride[1] : cache.stride[2]) * size_of(p.dtype);
    for (int64_t i = 0; i < count;) {
        int64_t outer = group.batch, within = begin + i, run = count - i;
        if (p.block_table) {
            outer = p.block_table[group.batch * p.block_table_stride + within / p.page_size];
            within %= p.page_size;
            run = smaller(run, p.page_size - within);
        }
        const char *at = (const char *)offset((const void *)cache.data, p.dtype, outer * cache.stride[0] + group.head_kv * head_stride) + within * row_bytes;
        for (; run > 0; run--, at += row_bytes) rows.row[i++] = at;
    }
    for (uint64_t hidden = bits_below(count) & ~block.seen; hidden; hidden &= hidden - 1) rows.row[__builtin_ctzll(hidden)] = kZeros;
    for (int64_t i = count; i < kBlock; i++) rows.row[i] = kZeros;  // read; by vectors never used
    return rows;
}

// One part of a group's keys: each row's softmax maximum and sum, and its weighted values.
class PartWorker {
  public:
    PartWorker(const fastattn_decode &p, const Shape &shape, const Group &group, DecodeBuffers &buffers, float *partial)
        : p_(p),
          shape_(shape),
          group_(group),
          buffers_(buffers),
          out_(partial),
          maximum_(partial + shape.rows_held() * shape.width_v),
          total_(maximum_ + shape.rows) {}

    void run(int64_t begin, int64_t end) {
        memset(out_, 0, (size_t)(shape_.rows_held() * shape_.width_v) * 4);
        memset(buffers_.totals, 0, (size_t)(shape_.rows * kLanes) * 4);
        for (int64_t row = 0; row < shape_.rows; row++) maximum_[row] = -kInf;
        pack_queries();
        const int64_t key_bytes = p_.dim_qk * size_of(p_.dtype), value_bytes = p_.dim_v * size_of(p_.dtype);
        KeyBlock block = next_block(begin, end);
        BlockRows keys = block_rows(p_, p_.k, group_, block);
        while (block.count) {
            const BlockRows values = block_rows(p_, p_.v, group_, block);
            NextRows ahead(values, value_bytes, block.count);
            form_scores(keys, block.count, ahead);
            ahead.rest();
            for (int64_t row = 0; row < shape_.rows; row++) {
                finish_scores(row, block.begin, block.count, buffers_.scores + row * kBlock);
                softmax(row, block.count, buffers_.scores + row * kBlock);
            }
            const KeyBlock next = next_block(block.begin + kBlock, end);
            const KeyBlock fetched = next.count ? next : block_at(end, group_.span.end);
            keys = block_rows(p_, p_.k, group_, fetched);
            ahead = NextRows(keys, key_bytes, fetched.count);
            add_values(values, block.count, ahead);
            ahead.rest();
            block = next;
        }
        for (int64_t row = 0; row < shape_.rows; row++) total_[row] = sum(load(buffers_.totals + row * kLanes));
        if (shape_.in_tiles) put_in_order(out_, shape_.rows * shape_.width_v);
    }

  private:
    void form_scores(const BlockRows &keys, int64_t count, NextRows &ahead) {
        if (shape_.in_tiles) return buffers_.tiles.form_scores(keys, p_.dim_qk, p_.scale, ahead, buffers_.scores);
        for_rows(p_.dtype, shape_.rows, [&]<int dtype, int Rows>(int64_t row) {
            block_scores<dtype, Rows>(buffers_.queries + row * shape_.width_qk, shape_.width_qk, p_.dim_qk, keys, count, ahead, buffers_.scores + row * kBlock);
        });
    }

    void add_values(const BlockRows &values, int64_t count, NextRows &ahead) {
        if (shape_.in_tiles) return buffers_.tiles.add_values(buffers_.scores, values, p_.dim_v, ahead, out_);
        for_rows(p_.dtype, shape_.rows, [&]<int dtype, int Rows>(int64_t row) {
            block_values<dtype, Rows>(buffers_.scores + row * kBlock, values, count, p_.dim_v, ahead, out_ + row * shape_.width_v, shape_.width_v);
        });
    }

    // The first block from `begin` on, whole blocks further, of which some query sees a key; of no keys where there is none before `end`.
    KeyBlock next_block(int64_t begin, int64_t end) const {
        for (; begin < end; begin += kBlock) {
            const KeyBlock block = block_at(begin, end);
            if (block.seen) return block;
        }
        return {};
    }

    KeyBlock block_at(int64_t begin, int64_t end) const {
        KeyBlock block{begin, larger(0, smaller(kBlock, end - begin)), 0};
        const uint64_t all = bits_below(block.count);
        for (int64_t row = 0; row < shape_.rows && block.seen != all; row++) block.seen |= buffers_.query[row].word(p_, group_, begin, block.count);
        return block;
    }

    void pack_queries() {
        for (int64_t row = 0; row < shape_.rows; row++) buffers_.query[row] = Query(p_, group_, row);
        for (int64_t g = 0; g < shape_.heads_per_group; g++) {
            const int64_t head = group_.head_kv * shape_.heads_per_group + g;
            const Rows q{offset((const void *)p_.q.data, p_.dtype, group_.batch * p_.q.stride[0] + head * p_.q.stride[1]), p_.dtype, p_.q.stride[2]};
            float *target = buffers_.queries + g * p_.len_q * shape_.width_qk;
            if (shape_.in_tiles) copy_rows(q, p_.len_q, p_.dim_qk, target, shape_.width_qk);
            else pack_rows(q, p_.len_q, p_.dim_qk, p_.scale, target, shape_.width_qk);
        }
        if (shape_.in_tiles) buffers_.tiles.take_queries(buffers_.queries);
    }

    // Softcap, bias and mask; -inf past the last key up to a whole vector.
    void finish_scores(int64_t row, int64_t key, int64_t count, float *scores) {
        const Query &query = buffers_.query[row];
        if (p_.softcap > 0)
            for (int64_t c = 0; c < count; c += kLanes) store(scores + c, tanh(load(scores + c) * (1.0f / p_.softcap)) * p_.softcap);
        if (p_.bias.data) {
            const int64_t stride = p_.bias.stride[3];
            const void *bias = query.bias(p_, group_, key);
            for (int64_t c = 0; c < count; c += kLanes) {
                vfloat added = zero();
                if (stride == 1) added = load_any(offset(bias, p_.bias_dtype, c), p_.bias_dtype, lanes_left(c, count));
                else
                    for (int lane = 0; lane < lanes_left(c, count); lane++) added[lane] = load_scalar(offset(bias, p_.bias_dtype, (c + lane) * stride), p_.bias_dtype);
                store(scores + c, select((vint)(added == -kInf), added, load(scores + c) + added));
            }
        }
        if (is_given(p_.distance)) {
            float strip[kBlock];
            expand_distances<1>(p_.distance, group_.batch, query.head, key - query.position, count, strip);
            for (int64_t c = 0; c < count; c += kLanes) {
                const vfloat score = load(scores + c);
                store(scores + c, select((vint)(score == -kInf), score, add_finite(score, load(strip + c))));
            }
        }
        if (p_.dense.data || !query.covers(key, key + count)) {
            const uint64_t seen = query.word(p_, group_, key, count);
            for (int64_t c = 0; c < count; c += kLanes) {
                const vuint bits = (uint32_t)(seen >> c) - vuint{};
                store(scores + c, select((vint)((bits >> (vuint)lane_index() & 1u) != 0), load(scores + c), broadcast(-kInf)));
            }
        }
        for (int64_t c = count; c < round_up(count, kLanes); c++) scores[c] = -kInf;
    }

    // Scores to probabilities, for tiles in words of two, against the running maximum; what was summed before is brought to it.
    void softmax(int64_t row, int64_t count, float *scores) {
        float *totals = buffers_.totals + row * kLanes;
        vfloat highest = load(scores);
        for (int64_t c = kLanes; c < count; c += kLanes) highest = max(highest, load(scores + c));
        if (any((vint)(highest > maximum_[row]))) raise_maximum(row, highest);
        const float base = maximum_[row] == -kInf ? 0.0f : maximum_[row];
        vfloat total = load(totals);
        for (int64_t c = 0; c < count; c += kLanes) {
            const vfloat probability = exp2((load(scores + c) - base) * kLog2e);
            store(scores + c, probability);
            total += probability;
        }
        store(totals, total);
        if (shape_.in_tiles) narrow_in_place(scores, count, kBlock);
    }

    void raise_maximum(int64_t row, vfloat highest) {
        float top = maximum_[row];
        for (int lane = 0; lane < kLanes; lane++) top = highest[lane] > top ? highest[lane] : top;
        const float correction = __builtin_expf(maximum_[row] - top);
        float *out = out_ + row * shape_.width_v, *totals = buffers_.totals + row * kLanes;
        for (int64_t c = 0; c < shape_.width_v; c += kLanes) store(out + c, load(out + c) * correction);
        store(totals, load(totals) * correction);
        maximum_[row] = top;
    }

    const fastattn_decode &p_;
    const Shape &shape_;
    const Group &group_;
    DecodeBuffers &buffers_;
    float *out_, *maximum_, *total_;
};

// One part of a group, in the order of memory: where the heads of a key lie side by side, all heads of a part come before the next part.
struct Unit {
    int64_t group, part;

    Unit(const fastattn_decode &p, const Shape &shape, int64_t index) : group(index / shape.parts), part(index % shape.parts) {
        const int64_t head_stride = p.block_table ? p.k.stride[2] : p.k.stride[1], key_stride = p.block_table ? p.k.stride[1] : p.k.stride[2];
        if (head_stride >= key_stride) return;
        group = index / (shape.parts * p.heads_kv) * p.heads_kv + index % p.heads_kv;
        part = index / p.heads_kv % shape.parts;
    }
};

// Puts the parts of one row together, in order.
void combine(const fastattn_decode &p, const Shape &shape, const Group &group, const float *partials, int64_t parts, int64_t row, float *sums) {
    const int64_t after = shape.rows_held() * shape.width_v;
    const auto maximum = [&](int64_t part) { return partials[part * shape.partial_floats() + after + row]; };
    const auto total = [&](int64_t part) { return partials[part * shape.partial_floats() + after + shape.rows + row]; };
    float top = -kInf, all = 0;
    for (int64_t part = 0; part < parts; part++) top = maximum(part) > top ? maximum(part) : top;
    const float base = top == -kInf ? 0.0f : top;
    memset(sums, 0, (size_t)shape.width_v * 4);
    for (int64_t part = 0; part < parts; part++) {
        if (total(part) == 0.0f) continue;  // nothing was visible
        // Without a maximum the scores of the part were NaN, and so is its total.
        const float weight = maximum(part) == -kInf ? 1.0f : __builtin_expf(maximum(part) - base);
        all += total(part) * weight;
        const float *source = partials + part * shape.partial_floats() + row * shape.width_v;
        for (int64_t c = 0; c < shape.width_v; c += kLanes) add_to(sums + c, load(source + c) * weight);
    }
    const Query query(p, group, row);
    const float sink = p.sinks ? __builtin_expf(p.sinks[query.head] - base) : 0.0f, norm = all == 0.0f ? 0.0f : 1.0f / (all + sink);
    p.lse[(group.batch * p.heads_q + query.head) * p.len_q + query.index] = all == 0.0f ? -kInf : base + __builtin_logf(all);
    const int64_t at = group.batch * p.out.stride[0] + query.head * p.out.stride[1] + query.index * p.out.stride[2];
    for (int64_t c = 0; c < p.dim_v; c += kLanes)
        store_any(offset(p.out.data, p.dtype, at + c), p.dtype, load(sums + c) * norm, lanes_left(c, p.dim_v));
}

}  // namespace

int attention_decode(const fastattn_decode &p) {
    const Shape shape(p);
    const int64_t groups = p.batch * p.heads_kv;
    if (groups == 0 || shape.rows == 0) return FASTATTN_OK;
    Scratch scratch(larger(1, groups * shape.parts * Scratch::padded(shape.partial_floats())));
    if (scratch.failed()) return FASTATTN_OUT_OF_MEMORY;
    float *partials = scratch.take(0);
    const int64_t group_floats = shape.parts * shape.partial_floats();
    int status = FASTATTN_OK;
    const int64_t items = groups * shape.parts, chunk = larger(1, smaller(kMostParts, items / (8 * p.n_threads)));
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const MatrixUnit unit(shape.in_tiles);
        DecodeBuffers buffers(p, shape);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
        }
        // Parts count from the first key that the group sees, so that a window costs its width.
#pragma omp for schedule(dynamic, chunk)
        for (int64_t item = 0; item < items; item++) {
            const Unit unit(p, shape, item);
            const Group group = group_at(p, shape, unit.group);
            const int64_t begin = group.span.begin == INT64_MAX ? 0 : group.span.begin + unit.part * kPart;
            if (begin >= group.span.end || buffers.scratch.failed()) continue;
            PartWorker(p, shape, group, buffers, partials + unit.group * group_floats + unit.part * shape.partial_floats())
                .run(begin, smaller(begin + kPart, group.span.end));
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < groups; index++) {
            if (buffers.scratch.failed()) continue;
            const Group group = group_at(p, shape, index);
            const int64_t keys = group.span.begin == INT64_MAX ? 0 : group.span.end - group.span.begin;
            for (int64_t row = 0; row < shape.rows; row++)
                combine(p, shape, group, partials + index * group_floats, Shape::parts_of(keys), row, buffers.sums);
        }
    }
    return status;
}

FASTATTN_NAMESPACE_END
