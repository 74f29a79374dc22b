// How Python hands over tensors and masks: an address and strides, or nothing. Shared by the modules; no arithmetic here.
#pragma once
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/problem.h"

using View = std::optional<std::vector<int64_t>>;

inline fastattn_tensor tensor(const View &view) {
    fastattn_tensor result{};
    if (!view) return result;
    result.data = reinterpret_cast<void *>(view->at(0));
    for (size_t i = 1; i < view->size(); i++) result.stride[i - 1] = view->at(i);
    return result;
}

template <class T>
T *pointer(int64_t address) {
    return reinterpret_cast<T *>(address);
}

using Blocks = std::tuple<View, int64_t, int64_t, int64_t>;  // row_ptr, col, id, bitmaps
// key_start, key_end, key_bits, band_offset, band_left, band_right, intervals, their number, blocks, dense
using Mask = std::tuple<int64_t, int64_t, int64_t, int64_t, std::optional<int64_t>, std::optional<int64_t>, View, int64_t, std::optional<Blocks>, View>;

inline fastattn_blocks blocks(const Blocks &b) {
    const auto &[row_ptr, col, id, bitmaps] = b;
    return {tensor(row_ptr), pointer<int32_t>(col), pointer<int32_t>(id), pointer<int64_t>(bitmaps)};
}

inline fastattn_mask mask(const Mask &m) {
    const auto &[key_start, key_end, key_bits, offset, left, right, intervals, n_intervals, block_rows, dense] = m;
    fastattn_mask result{};
    result.key_start = pointer<int32_t>(key_start);
    result.key_end = pointer<int32_t>(key_end);
    result.key_bits = pointer<int64_t>(key_bits);
    result.band_offset = offset;
    result.band_left = left.value_or(0);
    result.band_right = right.value_or(0);
    result.band_has_left = left.has_value();
    result.band_has_right = right.has_value();
    result.intervals = tensor(intervals);
    result.n_intervals = n_intervals;
    if (block_rows) result.blocks = blocks(*block_rows);
    result.dense = tensor(dense);
    return result;
}

using Packed = std::array<int64_t, 4>;  // cu_seqlens_q, cu_seqlens_k, rows of q, rows of k; zeros where the batch is not packed
// table, its row stride, its first distance, its size, slopes, their row stride, top_left
using Distance = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

inline fastattn_distance_bias distance_bias(const Distance &d) {
    const auto &[table, table_stride, first, size, slopes, slopes_stride, top_left] = d;
    fastattn_distance_bias result{};
    result.table = pointer<float>(table), result.table_stride = table_stride, result.table_first = first, result.table_size = size;
    result.slopes = pointer<float>(slopes), result.slopes_stride = slopes_stride;
    result.top_left = top_left;
    return result;
}

using Sizes = std::array<int64_t, 7>;  // batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v

// batch, heads_q, heads_kv, len_q, dim_qk, dim_v, max_length
using DecodeSizes = std::array<int64_t, 7>;
using Band = std::tuple<std::optional<int64_t>, std::optional<int64_t>>;  // left, right
using Pages = std::tuple<int64_t, int64_t, int64_t>;                      // block_table, its row stride, page size

inline fastattn_decode decode(int dtype, const DecodeSizes &sizes, const View &q, const View &k, const View &v, const View &out, int64_t lse,
                              int64_t cache_lengths, const Pages &pages, const Band &band, const View &intervals, int64_t n_intervals, const View &bias,
                              int bias_dtype, const Distance &distance, int64_t sinks, float scale, float softcap) {
    fastattn_decode p{};
    p.dtype = dtype;
    p.batch = sizes[0], p.heads_q = sizes[1], p.heads_kv = sizes[2], p.len_q = sizes[3], p.dim_qk = sizes[4], p.dim_v = sizes[5];
    p.max_length = sizes[6];
    p.q = tensor(q), p.k = tensor(k), p.v = tensor(v), p.out = tensor(out);
    p.lse = pointer<float>(lse);
    p.cache_lengths = pointer<int32_t>(cache_lengths);
    p.block_table = pointer<int32_t>(std::get<0>(pages));
    p.block_table_stride = std::get<1>(pages), p.page_size = std::get<2>(pages);
    const auto &[left, right] = band;
    p.band_left = left.value_or(0), p.band_right = right.value_or(0);
    p.band_has_left = left.has_value(), p.band_has_right = right.has_value();
    p.intervals = tensor(intervals);
    p.n_intervals = n_intervals;
    p.bias = tensor(bias);
    p.bias_dtype = bias_dtype;
    p.distance = distance_bias(distance);
    p.sinks = pointer<float>(sinks);
    p.scale = scale;
    p.softcap = softcap;
    return p;
}
