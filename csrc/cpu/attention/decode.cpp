// Attention over a key-value cache: few queries per sequence against many keys, whose time is that of reading the cache once.
//
// Shapes: q (B,Hq,Sq,D), out (B,Hq,Sq,Dv), lse (B,Hq,Sq); the cache (B,Hkv,S,D) and (B,Hkv,S,Dv) through its strides, or in pages: (pages, page
//   size, Hkv, D), the n-th page of sequence b being block_table[b][n]. cache_lengths (B) counts the keys in use, those of the queries themselves
//   included: query i sits at position cache_length - Sq + i, and key j is visible to it by band, intervals (of key positions) and bias.
// Numerics: as forward.cpp.
// Algorithm: a head group's queries go together, so that each key is read once for all of them. The keys of a sequence are cut into parts of
//   kPart keys, which are the unit of work: a few sequences then keep every core busy. Each part makes its own softmax; the parts are put together in
//   order (Flash-Decoding, Dao et al. 2023), so that the result does not depend on the thread count. Keys and values are read where they lie,
//   kBlock at a time, in whatever format; while the scores of a block are formed its values are fetched, and while the values are summed the next keys.
//
// Ladder, 8 sequences x 32 heads over 8 heads of keys x 4,096 keys x 128, float32 / bfloat16, GB/s of cache read, on 2 cores of an Intel Xeon with AMX
// (model 167, VM), 2026-11-22; in the same runs torch 2.13's scaled_dot_product_attention 8.5 / 7.5, torch.sum of the same caches 22 / 24.
//   15.9,  9.6  products of the micro-kernel, 64 keys at a time as float32
//   18.5, 13.9  keys and values read where they lie, two keys for all rows of a group at a time, the next block fetched into the level-1 cache
//   17.9, 14.5  fetched into the level-2 cache
// On 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-25: 18.8, 7.7 (torch 5.7, 0.6; torch.sum 28).
#include "../kernels.h"
#include "../pack.h"
#include "distance.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

constexpr int64_t kPart = 256;       // keys in one unit of work
constexpr int64_t kBlock = 32;    // keys whose scores are formed together: their keys and values fit the level-1 cache
constexpr int kRows = kLanes == 16 ? 8 : 4, kKeys = 2;  // dot products at a time
constexpr int kSumVectors = 2;                          // of a row's output at a time

// The queries of one head group and one sequence, and the keys that some of them may see.
struct Group {
    int64_t batch, head_kv, rows, cache_length;
    Span span;
};

struct Shape {
    int64_t heads_per_group, rows, width_qk, width_v, parts;
    explicit Shape(const fastattn_decode &p)
        : heads_per_group(p.heads_q / p.heads_kv),
          rows(heads_per_group * p.len_q),
          width_qk(round_up(p.dim_qk, kLanes)),
          width_v(round_up(p.dim_v, kLanes)),
          parts((p.max_length + kPart - 1) / kPart) {}
    int64_t partial_floats() const { return rows * (width_v + 2); }
};

int64_t query_of(const fastattn_decode &p, int64_t row) { return row % p.len_q; }
int64_t head_of(const fastattn_decode &p, const Group &group, int64_t row) { return group.head_kv * (p.heads_q / p.heads_kv) + row / p.len_q; }
int64_t position_of(const fastattn_decode &p, const Group &group, int64_t row) { return group.cache_length - p.len_q + query_of(p, row); }

// Visible keys of one query: its share of the band, and of each interval, within the cache.
struct RowKeys {
    Span band;
    Span interval[kMaxIntervals];
    int64_t intervals;

    RowKeys(const fastattn_decode &p, const Group &group, int64_t row) : band{0, group.cache_length}, intervals(p.n_intervals) {
        const int64_t i = query_of(p, row), position = position_of(p, group, row);
        if (p.band_has_left) band.begin = larger(band.begin, position - p.band_left);
        if (p.band_has_right) band.end = smaller(band.end, position + p.band_right + 1);
        const fastattn_tensor &t = p.intervals;
        for (int64_t r = 0; r < intervals; r++) {
            const int32_t *bounds =
                (const int32_t *)t.data + r * t.stride[0] + group.batch * t.stride[1] + head_of(p, group, row) * t.stride[2] + i * t.stride[3];
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

    bool sees(int64_t key) const {
        for (int64_t r = 0; r < intervals; r++)
            if (interval[r].begin <= key && key < interval[r].end) return true;
        return !intervals && band.begin <= key && key < band.end;
    }
};

Group group_at(const fastattn_decode &p, const Shape &shape, int64_t index) {
    Group group{index / p.heads_kv, index % p.heads_kv, shape.rows, 0, {INT64_MAX, 0}};
    group.cache_length = larger(0, smaller(p.max_length, p.cache_lengths[group.batch]));
    for (int64_t row = 0; row < shape.rows; row++) {
        const Span span = RowKeys(p, group, row).span();
        if (span.begin < span.end) group.span = {smaller(group.span.begin, span.begin), larger(group.span.end, span.end)};
    }
    return group;
}

// What one thread works with.
struct DecodeBuffers {
    explicit DecodeBuffers(const Shape &shape)
        : scratch(Scratch::padded(shape.rows * shape.width_qk) + Scratch::padded(shape.rows * kBlock) + shape.width_v + 64),
          queries(scratch.take(shape.rows * shape.width_qk)),
          scores(scratch.take(shape.rows * kBlock)),
          sums(scratch.take(shape.width_v)) {}
    Scratch scratch;
    float *queries, *scores, *sums;
};

// Where the rows of a block of keys, or of values, lie.
struct BlockRows {
    const char *row[kBlock];

    BlockRows(const fastattn_decode &p, const fastattn_tensor &cache, const Group &group, int64_t begin, int64_t count) {
        const int64_t page_size = p.block_table ? p.page_size : INT64_MAX;
        const int64_t row_stride = p.block_table ? cache.stride[1] : cache.stride[2], head_stride = p.block_table ? cache.stride[2] : cache.stride[1];
        for (int64_t i = 0; i < count;) {
            const int64_t within = (begin + i) % page_size, run = smaller(count - i, page_size - within);
            const int64_t outer = p.block_table ? p.block_table[group.batch * p.block_table_stride + (begin + i) / page_size] : group.batch;
            const int64_t start = outer * cache.stride[0] + group.head_kv * head_stride + within * row_stride;
            for (int64_t r = 0; r < run; r++) row[i + r] = (const char *)offset((const void *)cache.data, p.dtype, start + r * row_stride);
            i += run;
        }
        for (int64_t i = count; i < kBlock; i++) row[i] = row[count - 1];  // read, never used
    }

    void fetch(int64_t first, int64_t count, int64_t bytes) const {
        for (int64_t i = first; i < first + count; i++)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row[i] + at, 0, 2);
    }
};

// scores(row, key) = q(row) . k(key) for Rows queries and the block's keys; `values` are fetched meanwhile.
template <int dtype, int Rows>
void block_scores(const float *queries, int64_t width, int64_t dim, const BlockRows &keys, int64_t count, const BlockRows *values, int64_t value_bytes,
                  float *scores) {
    for (int64_t first = 0; first < count; first += kLanes) {
        vfloat products[Rows][kLanes];
        for (int64_t key = 0; key < kLanes; key += kKeys) {
            vfloat acc[Rows][kKeys] = {};
            for (int64_t c = 0; c < dim; c += kLanes) {
                vfloat k[kKeys];
#pragma GCC unroll 2
                for (int i = 0; i < kKeys; i++) k[i] = load_any(offset((const void *)keys.row[first + key + i], dtype, c), dtype, lanes_left(c, dim));
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++) {
                    const vfloat q = load(queries + r * width + c);
#pragma GCC unroll 2
                    for (int i = 0; i < kKeys; i++) acc[r][i] += q * k[i];
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
                for (int i = 0; i < kKeys; i++) products[r][key + i] = acc[r][i];
            if (values) values->fetch(first + key, kKeys, value_bytes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) store(scores + r * kBlock + first, sums(products[r]));
    }
}

// out(row) += sum over the block of p(row, key) v(key) for Rows queries; `keys`, the next block's, are fetched meanwhile.
template <int dtype, int Rows>
void block_values(const float *probabilities, const BlockRows &values, int64_t count, int64_t dim, const BlockRows *keys, int64_t key_bytes, float *out,
                  int64_t width) {
    int64_t fetched = 0;
    for (int64_t c = 0; c < dim; c += kSumVectors * kLanes) {
        const int last = lanes_left(c + (kSumVectors - 1) * kLanes, dim);
        const bool whole = c + kSumVectors * kLanes <= dim;
        vfloat acc[Rows][kSumVectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < kSumVectors; v++) acc[r][v] = whole || c + v * kLanes < dim ? load(out + r * width + c + v * kLanes) : zero();
        const auto add = [&](int64_t key, const vfloat(&value)[kSumVectors]) {
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
                for (int v = 0; v < kSumVectors; v++) acc[r][v] += probabilities[r * kBlock + key] * value[v];
        };
        for (int64_t key = 0; key < count; key++) {
            vfloat value[kSumVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kSumVectors; v++) {
                const int64_t at = c + v * kLanes;
                value[v] = whole ? load_any(offset((const void *)values.row[key], dtype, at), dtype, kLanes)
                           : at < dim ? load_any(offset((const void *)values.row[key], dtype, at), dtype, v + 1 < kSumVectors ? lanes_left(at, dim) : last) : zero();
            }
            add(key, value);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < kSumVectors; v++)
                if (whole || c + v * kLanes < dim) store(out + r * width + c + v * kLanes, acc[r][v]);
        if (keys) {
            const int64_t upto = dim <= c + kSumVectors * kLanes ? kBlock : kBlock * (c + kSumVectors * kLanes) / dim;
            keys->fetch(fetched, upto - fetched, key_bytes);
            fetched = upto;
        }
    }
}

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

// One part of a group's keys: each row's softmax maximum and sum, and its weighted values.
class PartWorker {
  public:
    PartWorker(const fastattn_decode &p, const Shape &shape, const Group &group, DecodeBuffers &buffers, float *partial)
        : p_(p), shape_(shape), group_(group), buffers_(buffers), out_(partial), maximum_(partial + shape.rows * shape.width_v), total_(maximum_ + shape.rows) {}

    void run(int64_t begin, int64_t end) {
        memset(out_, 0, (size_t)(shape_.rows * shape_.width_v) * 4);
        for (int64_t row = 0; row < shape_.rows; row++) maximum_[row] = -kInf, total_[row] = 0;
        pack_queries();
        const int64_t key_bytes = p_.dim_qk * size_of(p_.dtype), value_bytes = p_.dim_v * size_of(p_.dtype);
        BlockRows keys(p_, p_.k, group_, begin, smaller(kBlock, end - begin));
        for (int64_t key = begin; key < end; key += kBlock) {
            const int64_t count = smaller(kBlock, end - key), next = smaller(kBlock, end - key - kBlock);
            const BlockRows values(p_, p_.v, group_, key, count);
            for_rows(p_.dtype, shape_.rows, [&]<int dtype, int Rows>(int64_t row) {
                block_scores<dtype, Rows>(buffers_.queries + row * shape_.width_qk, shape_.width_qk, p_.dim_qk, keys, count, row ? nullptr : &values, value_bytes,
                                          buffers_.scores + row * kBlock);
            });
            for (int64_t row = 0; row < shape_.rows; row++) {
                finish_scores(row, key, count, buffers_.scores + row * kBlock);
                softmax(row, count, buffers_.scores + row * kBlock);
            }
            if (next > 0) keys = BlockRows(p_, p_.k, group_, key + kBlock, next);
            for_rows(p_.dtype, shape_.rows, [&]<int dtype, int Rows>(int64_t row) {
                block_values<dtype, Rows>(buffers_.scores + row * kBlock, values, count, p_.dim_v, row || next <= 0 ? nullptr : &keys, key_bytes,
                                          out_ + row * shape_.width_v, shape_.width_v);
            });
        }
    }

  private:
    void pack_queries() {
        for (int64_t g = 0; g < shape_.heads_per_group; g++) {
            const int64_t head = group_.head_kv * shape_.heads_per_group + g;
            const Rows q{offset((const void *)p_.q.data, p_.dtype, group_.batch * p_.q.stride[0] + head * p_.q.stride[1]), p_.dtype, p_.q.stride[2]};
            pack_rows(q, p_.len_q, p_.dim_qk, p_.scale, buffers_.queries + g * p_.len_q * shape_.width_qk, shape_.width_qk);
        }
    }

    // Softcap, bias and mask; -inf past the last key up to a whole vector.
    void finish_scores(int64_t row, int64_t key, int64_t count, float *scores) {
        if (p_.softcap > 0)
            for (int64_t c = 0; c < count; c += kLanes) store(scores + c, tanh(load(scores + c) * (1.0f / p_.softcap)) * p_.softcap);
        if (p_.bias.data) {
            const fastattn_tensor &t = p_.bias;
            const int64_t base =
                group_.batch * t.stride[0] + head_of(p_, group_, row) * t.stride[1] + query_of(p_, row) * t.stride[2] + key * t.stride[3];
            const auto at = [&](int64_t c) { return offset((const void *)t.data, p_.bias_dtype, base + c * t.stride[3]); };
            if (t.stride[3] == 1)
                for (int64_t c = 0; c < count; c += kLanes) add_to(scores + c, load_any(at(c), p_.bias_dtype, lanes_left(c, count)));
            else
                for (int64_t c = 0; c < count; c++) scores[c] += load_scalar(at(c), p_.bias_dtype);
        }
        if (is_given(p_.distance)) {
            float strip[kBlock];
            expand_distances<1>(p_.distance, group_.batch, head_of(p_, group_, row), key - position_of(p_, group_, row), count, strip);
            for (int64_t c = 0; c < count; c += kLanes) store(scores + c, add_finite(load(scores + c), load(strip + c)));
        }
        const RowKeys visible(p_, group_, row);
        if (!visible.covers(key, key + count))
            for (int64_t c = 0; c < count; c++)
                if (!visible.sees(key + c)) scores[c] = -kInf;
        for (int64_t c = count; c < round_up(count, kLanes); c++) scores[c] = -kInf;
    }

    // Scores to probabilities against the running maximum; what was summed before is brought to it.
    void softmax(int64_t row, int64_t count, float *scores) {
        vfloat highest = broadcast(maximum_[row]);
        for (int64_t c = 0; c < count; c += kLanes) highest = max(highest, load(scores + c));
        float top = highest[0];
        for (int lane = 1; lane < kLanes; lane++) top = highest[lane] > top ? highest[lane] : top;
        const float base = top == -kInf ? 0.0f : top;
        if (top > maximum_[row]) {
            const float correction = __builtin_expf(maximum_[row] - base);
            total_[row] *= correction;
            for (int64_t c = 0; c < shape_.width_v; c += kLanes) store(out_ + row * shape_.width_v + c, load(out_ + row * shape_.width_v + c) * correction);
            maximum_[row] = top;
        }
        vfloat total = zero();
        for (int64_t c = 0; c < count; c += kLanes) {
            const vfloat probability = exp2((load(scores + c) - base) * kLog2e);
            store(scores + c, probability);
            total += probability;
        }
        total_[row] += sum(total);
    }

    const fastattn_decode &p_;
    const Shape &shape_;
    const Group &group_;
    DecodeBuffers &buffers_;
    float *out_, *maximum_, *total_;
};

// Puts the parts of one row together, in order.
void combine(const fastattn_decode &p, const Shape &shape, const Group &group, const float *partials, int64_t parts, int64_t row, float *sums) {
    const auto maximum = [&](int64_t part) { return partials[part * shape.partial_floats() + shape.rows * shape.width_v + row]; };
    const auto total = [&](int64_t part) { return partials[part * shape.partial_floats() + shape.rows * (shape.width_v + 1) + row]; };
    float top = -kInf, all = 0;
    for (int64_t part = 0; part < parts; part++) top = maximum(part) > top ? maximum(part) : top;
    const float base = top == -kInf ? 0.0f : top;
    memset(sums, 0, (size_t)shape.width_v * 4);
    for (int64_t part = 0; part < parts; part++) {
        const float weight = __builtin_expf(maximum(part) - base);
        if (weight == 0.0f) continue;
        all += total(part) * weight;
        const float *source = partials + part * shape.partial_floats() + row * shape.width_v;
        for (int64_t c = 0; c < shape.width_v; c += kLanes) add_to(sums + c, load(source + c) * weight);
    }
    const int64_t head = head_of(p, group, row), i = query_of(p, row);
    const float sink = p.sinks ? __builtin_expf(p.sinks[head] - base) : 0.0f, norm = all == 0.0f ? 0.0f : 1.0f / (all + sink);
    p.lse[(group.batch * p.heads_q + head) * p.len_q + i] = all == 0.0f ? -kInf : base + __builtin_logf(all);
    const int64_t at = group.batch * p.out.stride[0] + head * p.out.stride[1] + i * p.out.stride[2];
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
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        DecodeBuffers buffers(shape);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
        }
        // Parts count from the first key that the group sees, so that a window costs its width.
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < groups * shape.parts; item++) {
            const Group group = group_at(p, shape, item / shape.parts);
            const int64_t part = item % shape.parts, begin = group.span.begin == INT64_MAX ? 0 : group.span.begin + part * kPart;
            if (begin >= group.span.end || buffers.scratch.failed()) continue;
            PartWorker(p, shape, group, buffers, partials + item / shape.parts * group_floats + part * shape.partial_floats())
                .run(begin, smaller(begin + kPart, group.span.end));
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < groups; index++) {
            if (buffers.scratch.failed()) continue;
            const Group group = group_at(p, shape, index);
            const int64_t keys = group.span.begin == INT64_MAX ? 0 : group.span.end - group.span.begin;
            for (int64_t row = 0; row < shape.rows; row++)
                combine(p, shape, group, partials + index * group_floats, (keys + kPart - 1) / kPart, row, buffers.sums);
        }
    }
    return status;
}

FASTATTN_NAMESPACE_END
