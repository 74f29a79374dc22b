// What an attention kernel is given: the call of library.h with every pointer as a span.
#pragma once
#include <primitives/memory.cuh>

#include "../elements.cuh"
#include "../library.h"
#include "../philox.cuh"

// A tensor (B,H,S,...) by its first three strides; what is behind them is contiguous, or has `inner` between its elements.
template <typename T>
struct Strided {
    Global<T> data;
    int64_t batch, head, row, inner;

    Strided() = default;
    template <typename U>
    Strided(const fastattn_tensor &tensor, U *pointer, int64_t b, int64_t h, int64_t s, int64_t d, int64_t inner_)
        : data(pointer, pointer && b * h * s * d > 0
                            ? 1 + (b - 1) * tensor.stride[0] + (h - 1) * tensor.stride[1] + (s - 1) * tensor.stride[2] + (d - 1) * inner_
                            : 0),
          batch(tensor.stride[0]),
          head(tensor.stride[1]),
          row(tensor.stride[2]),
          inner(inner_) {}

    __device__ __forceinline__ int64_t at(int64_t b, int64_t h, int64_t s) const { return b * batch + h * head + s * row; }
    // Whether 16-byte accesses reach every row of `width` elements.
    bool vectors(int64_t width) const {
        constexpr int64_t N = 16 / sizeof(T);
        const auto address = reinterpret_cast<uintptr_t>(data.address());
        return address % 16 == 0 && batch % N == 0 && head % N == 0 && row % N == 0 && width > 0;
    }
};

template <typename T>
Strided<T> strided(const fastattn_tensor &tensor, int64_t b, int64_t h, int64_t s, int64_t d, int64_t inner = 1) {
    return Strided<T>(tensor, static_cast<T *>(tensor.data), b, h, s, d, inner);
}

struct MaskParams {
    Global<const int32_t> key_start, key_end;  // (B)
    Global<const int64_t> key_bits;            // (B, key_words)
    int key_words;
    bool has_left, has_right;
    int64_t band_offset, band_left, band_right;
    int n_intervals;
    int64_t interval_stride;                  // between the intervals of a query
    Strided<const int32_t> intervals;         // (B,H,Sq), pairs behind
    Strided<const int32_t> row_ptr;           // (B,H), block rows behind
    Global<const int32_t> col, id;
    Global<const int64_t> bitmaps;
    Strided<const uint8_t> dense;             // (B,H,Sq), keys by `inner`
};

constexpr int MASK_BLOCK = 64;

template <typename T>
struct AttentionParams {
    Strided<const T> q, k, v;
    Strided<T> out;
    Global<float> lse;
    MaskParams mask;
    Elements bias;
    int64_t bias_stride[4];
    Global<const float> sinks;
    Dropout dropout;
    int heads_q, group;  // group = heads_q / heads_kv
    int entries;         // B * Hq
    int len_q, len_k, dim_qk, dim_v, q_tiles;
    float scale, softcap;
    bool q_vectors, k_vectors, v_vectors, out_vectors;
};

inline MaskParams mask_params(const fastattn_cuda_attention &call) {
    const fastattn_mask &mask = call.mask;
    const int64_t b = call.batch, h = call.heads_q, words = (call.len_k + MASK_BLOCK - 1) / MASK_BLOCK;
    const int64_t block_rows = (call.len_q + MASK_BLOCK - 1) / MASK_BLOCK;
    MaskParams p;
    p.key_start = Global<const int32_t>(mask.key_start, b);
    p.key_end = Global<const int32_t>(mask.key_end, b);
    p.key_bits = Global<const int64_t>(mask.key_bits, b * words);
    p.key_words = static_cast<int>(words);
    p.has_left = mask.band_has_left != 0;
    p.has_right = mask.band_has_right != 0;
    p.band_offset = mask.band_offset;
    p.band_left = mask.band_left;
    p.band_right = mask.band_right;
    p.n_intervals = static_cast<int>(mask.n_intervals);
    // (R,B,H,Sq) pairs: the strides of B, H and Sq follow that of R.
    fastattn_tensor pairs = {mask.intervals.data, {mask.intervals.stride[1], mask.intervals.stride[2], mask.intervals.stride[3], 0}};
    p.interval_stride = mask.intervals.stride[0];
    p.intervals = Strided<const int32_t>(pairs, static_cast<const int32_t *>(pairs.data), b, h, call.len_q,
                                         2 + (mask.n_intervals - 1) * p.interval_stride, 1);
    fastattn_tensor rows = {mask.blocks.row_ptr.data, {mask.blocks.row_ptr.stride[0], mask.blocks.row_ptr.stride[1], 1, 0}};
    p.row_ptr = Strided<const int32_t>(rows, static_cast<const int32_t *>(rows.data), b, h, block_rows + 1, 1, 1);
    p.col = Global<const int32_t>(mask.blocks.col, call.n_blocks);
    p.id = Global<const int32_t>(mask.blocks.id, call.n_blocks);
    p.bitmaps = Global<const int64_t>(mask.blocks.bitmaps, call.n_bitmaps * MASK_BLOCK);
    p.dense = strided<const uint8_t>(mask.dense, b, h, call.len_q, call.len_k, mask.dense.stride[3]);
    return p;
}

template <typename T>
AttentionParams<T> attention_params(const fastattn_cuda_attention &call, int tile_rows) {
    const int64_t b = call.batch, hq = call.heads_q, hkv = call.heads_kv, sq = call.len_q, skv = call.len_k;
    const fastattn_tensor &bias = call.bias;
    const int64_t bias_count = bias.data && b * hq * sq * skv > 0
                                   ? 1 + (b - 1) * bias.stride[0] + (hq - 1) * bias.stride[1] + (sq - 1) * bias.stride[2] + (skv - 1) * bias.stride[3]
                                   : 0;
    AttentionParams<T> p = {strided<const T>(call.q, b, hq, sq, call.dim_qk),
                            strided<const T>(call.k, b, hkv, skv, call.dim_qk),
                            strided<const T>(call.v, b, hkv, skv, call.dim_v),
                            strided<T>(call.out, b, hq, sq, call.dim_v),
                            Global<float>(call.lse, b * hq * sq),
                            mask_params(call),
                            Elements(bias.data, call.bias_dtype, bias_count),
                            {bias.stride[0], bias.stride[1], bias.stride[2], bias.stride[3]},
                            Global<const float>(call.sinks, hq),
                            Dropout(call.dropout),
                            static_cast<int>(hq),
                            static_cast<int>(hq / hkv),
                            static_cast<int>(b * hq),
                            static_cast<int>(sq),
                            static_cast<int>(skv),
                            static_cast<int>(call.dim_qk),
                            static_cast<int>(call.dim_v),
                            static_cast<int>((sq + tile_rows - 1) / tile_rows),
                            call.scale,
                            call.softcap,
                            false,
                            false,
                            false,
                            false};
    p.q_vectors = p.q.vectors(call.dim_qk);
    p.k_vectors = p.k.vectors(call.dim_qk);
    p.v_vectors = p.v.vectors(call.dim_v);
    p.out_vectors = p.out.vectors(call.dim_v) && call.dim_v % 8 == 0;
    return p;
}
