// What the decode kernels are given: the call of library.h with every pointer as a span.
#pragma once
#include <algorithm>

#include "params.cuh"

template <typename T>
struct DecodeParams {
    Strided<const T> q, k, v;  // of caches: batch entry or page, head, key within it
    Strided<T> out;
    Global<float> lse;
    Global<float> sums, statistics;        // of the parts; not there where there is one
    Global<const int32_t> cache_lengths;   // (B)
    Global<const int32_t> block_table;     // by table_stride; absent: the cache is contiguous
    int64_t table_stride;
    int page_size, pages;
    int band_low, band_high;               // a query at position i sees keys [i + band_low, i + band_high)
    int n_intervals;
    int64_t interval_stride;               // between the intervals of a query
    Strided<const int32_t> intervals;      // (B,H,Sq), pairs behind
    Elements bias;
    int64_t bias_stride[4];
    DistanceParams distance;
    Global<const float> sinks;
    int batch, heads_q, heads_kv, len_q;
    int group, rows, tiles;                // heads and rows of a head group, blocks that share the rows
    int room, parts, part_keys;
    int dim_qk, dim_v;
    float scale, softcap;
    bool q_vectors, k_vectors, v_vectors, out_vectors;

    // Rows of all head groups, numbered as those of lse.
    __host__ __device__ __forceinline__ int64_t all_rows() const { return static_cast<int64_t>(batch) * heads_kv * rows; }
};

// Whether every number that the kernels count in an int fits one; FAR is added to positions.
inline bool fits(const fastattn_cuda_decode &call, int tile_rows) {
    const fastattn_decode &p = call.problem;
    const int64_t rows = p.heads_q / p.heads_kv * p.len_q, tiles = (rows + tile_rows - 1) / tile_rows, entries = p.batch * p.heads_kv;
    const bool lengths = p.max_length < FAR && p.len_q < FAR && p.page_size < FAR && call.entries <= INT32_MAX;
    return lengths && call.parts > 0 && call.part_keys < FAR && entries <= INT32_MAX && rows <= INT32_MAX && entries * rows <= INT32_MAX &&
           call.parts <= INT32_MAX / (entries * tiles);
}

template <typename T>
DecodeParams<T> decode_params(const fastattn_cuda_decode &call, int tile_rows) {
    const fastattn_decode &d = call.problem;
    const int64_t b = d.batch, hq = d.heads_q, hkv = d.heads_kv, sq = d.len_q, n = b * hq * sq;
    const bool paged = d.block_table != nullptr;
    // Pages (pages, page size, Hkv, D), seen as (pages, Hkv, page size, D).
    const auto cache = [&](const fastattn_tensor &tensor, int64_t dim) {
        const fastattn_tensor seen = {tensor.data, {tensor.stride[0], tensor.stride[paged ? 2 : 1], tensor.stride[paged ? 1 : 2], 0}};
        return strided<const T>(seen, call.entries, hkv, paged ? d.page_size : d.max_length, dim);
    };
    const int64_t within = 2 + (d.n_intervals - 1) * d.intervals.stride[0];  // the pairs of a query, from its first one on
    const fastattn_tensor pairs = {d.intervals.data, {d.intervals.stride[1], d.intervals.stride[2], d.intervals.stride[3], 0}};
    const auto near = [](int64_t offset) { return std::max<int64_t>(-FAR, std::min<int64_t>(offset, FAR)); };

    DecodeParams<T> p;
    p.q = strided<const T>(d.q, b, hq, sq, d.dim_qk);
    p.k = cache(d.k, d.dim_qk);
    p.v = cache(d.v, d.dim_v);
    p.out = strided<T>(d.out, b, hq, sq, d.dim_v);
    p.lse = Global<float>(d.lse, n);
    p.sums = Global<float>(call.sums, call.parts * n * d.dim_v);
    p.statistics = Global<float>(call.statistics, call.parts * n * 2);
    p.cache_lengths = Global<const int32_t>(d.cache_lengths, b);
    p.block_table = Global<const int32_t>(d.block_table, paged && d.page_size > 0 ? (b - 1) * d.block_table_stride + d.max_length / d.page_size : 0);
    p.table_stride = d.block_table_stride;
    p.page_size = static_cast<int>(d.page_size);
    p.pages = static_cast<int>(call.entries);
    p.band_low = d.band_has_left ? static_cast<int>(-near(d.band_left)) : -FAR;
    p.band_high = d.band_has_right ? static_cast<int>(near(near(d.band_right) + 1)) : FAR;
    p.n_intervals = static_cast<int>(d.n_intervals);
    p.interval_stride = d.intervals.stride[0];
    p.intervals = Strided<const int32_t>(pairs, static_cast<const int32_t *>(pairs.data), b, hq, sq, within, 1);
    p.bias = Elements(d.bias.data, d.bias_dtype, extent_of(d.bias, b, hq, sq, d.max_length, d.bias.stride[3]));
    for (int i = 0; i < 4; i++) p.bias_stride[i] = d.bias.stride[i];
    p.distance = distance_params(d);
    p.sinks = Global<const float>(d.sinks, hq);
    p.batch = static_cast<int>(b), p.heads_q = static_cast<int>(hq), p.heads_kv = static_cast<int>(hkv), p.len_q = static_cast<int>(sq);
    p.group = static_cast<int>(hq / hkv);
    p.rows = static_cast<int>(hq / hkv * sq);
    p.tiles = (p.rows + tile_rows - 1) / tile_rows;
    p.room = static_cast<int>(d.max_length);
    p.parts = static_cast<int>(call.parts), p.part_keys = static_cast<int>(call.part_keys);
    p.dim_qk = static_cast<int>(d.dim_qk), p.dim_v = static_cast<int>(d.dim_v);
    p.scale = d.scale, p.softcap = d.softcap;
    p.q_vectors = p.q.vectors(d.dim_qk), p.k_vectors = p.k.vectors(d.dim_qk);
    p.v_vectors = p.v.vectors(d.dim_v), p.out_vectors = p.out.vectors(d.dim_v);
    return p;
}
