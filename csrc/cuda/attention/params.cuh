// What an attention kernel is given: the call of library.h with every pointer as a span.
#pragma once
#include <primitives/memory.cuh>

#include "../elements.cuh"
#include "../library.h"
#include "../philox.cuh"

// How many elements a tensor of these sizes spans, `inner` between those of the last dimension; 0 where it is absent or has none.
inline int64_t extent_of(const fastattn_tensor &tensor, int64_t b, int64_t h, int64_t s, int64_t d, int64_t inner) {
    if (!tensor.data || b * h * s * d == 0) return 0;
    return 1 + (b - 1) * tensor.stride[0] + (h - 1) * tensor.stride[1] + (s - 1) * tensor.stride[2] + (d - 1) * inner;
}

// A tensor (B,H,S,...) by its first three strides; what is behind them is contiguous, or has `inner` between its elements.
template <typename T>
struct Strided {
    Global<T> data;
    int64_t batch, head, row, inner;

    Strided() = default;
    template <typename U>
    Strided(const fastattn_tensor &tensor, U *pointer, int64_t b, int64_t h, int64_t s, int64_t d, int64_t inner_)
        : data(pointer, extent_of(tensor, b, h, s, d, inner_)),
          batch(tensor.stride[0]),
          head(tensor.stride[1]),
          row(tensor.stride[2]),
          inner(inner_) {}

    __device__ __forceinline__ int64_t at(int64_t b, int64_t h, int64_t s) const { return b * batch + h * head + s * row; }
    // Whether 16-byte accesses reach every row of `width` elements.
    bool vectors(int64_t width) const {
        constexpr int64_t N = 16 / sizeof(T);
        const auto address = reinterpret_cast<uintptr_t>(data.address());
        return address % 16 == 0 && batch % N == 0 && head % N == 0 && row % N == 0 && width % N == 0;
    }
};

template <typename T>
Strided<T> strided(const fastattn_tensor &tensor, int64_t b, int64_t h, int64_t s, int64_t d, int64_t inner = 1) {
    return Strided<T>(tensor, static_cast<T *>(tensor.data), b, h, s, d, inner);
}

constexpr int FAR = 1 << 30;  // more than any length; the sum of FAR and a length fits an int

__device__ __forceinline__ int clamp(int64_t x, int low, int high) { return x < low ? low : x > high ? high : static_cast<int>(x); }
__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

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
constexpr int MAX_INTERVALS = 4;

// A bias of distance alone, as common/problem.h has it.
struct DistanceParams {
    Global<const float> table, slopes;
    int64_t table_stride, table_first, table_size, slopes_stride;
    bool top_left;

    __host__ __device__ explicit operator bool() const { return static_cast<bool>(table) || static_cast<bool>(slopes); }
};

// Where a packed batch's sequences begin and end; null pointers: every batch entry has its own rows, as many as all.
struct PackedParams {
    Global<const int32_t> cu_q, cu_k;  // (B + 1)
    int rows_q, rows_k;                // of all sequences
};

// Rows of one batch entry: where they begin in the tensors and how many there are.
struct Sequence {
    int first_q, first_k, len_q, len_k;
    int band_shift;      // of the band: len_k - len_q in a packed batch, else 0
    int distance_shift;  // query i sits at i + distance_shift for the distance biases
};

template <typename T>
struct AttentionParams {
    Strided<const T> q, k, v;
    Strided<T> out;
    Global<float> lse;
    MaskParams mask;
    Elements bias;
    int64_t bias_stride[4];
    DistanceParams distance;
    PackedParams packed;
    Global<const float> sinks;
    Dropout dropout;
    int heads_q, group;  // group = heads_q / heads_kv
    int entries;         // B * Hq
    int batch, len_q, len_k, dim_qk, dim_v, q_tiles;  // of a packed batch: the longest lengths
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

template <typename Call>  // of attention or of decoding
DistanceParams distance_params(const Call &call) {
    const fastattn_distance_bias &d = call.distance;
    const int64_t table = (call.heads_q - 1) * d.table_stride + d.table_size, slopes = (call.batch - 1) * d.slopes_stride + call.heads_q;
    return {Global<const float>(d.table, d.table ? table : 0),
            Global<const float>(d.slopes, d.slopes ? slopes : 0),
            d.table_stride,
            d.table_first,
            d.table_size,
            d.slopes_stride,
            d.top_left != 0};
}

template <typename T>
AttentionParams<T> attention_params(const fastattn_cuda_attention &call, int tile_rows) {
    const int64_t b = call.batch, hq = call.heads_q, hkv = call.heads_kv, sq = call.len_q, skv = call.len_k;
    const bool packed = call.cu_seqlens_q != nullptr;
    // Batch entries and rows of the tensors themselves.
    const int64_t entries = packed ? 1 : b, rows_q = packed ? call.rows_q : sq, rows_k = packed ? call.rows_k : skv;
    const fastattn_tensor &bias = call.bias;
    const int64_t tiles = (sq + tile_rows - 1) / tile_rows;
    AttentionParams<T> p = {strided<const T>(call.q, entries, hq, rows_q, call.dim_qk),
                            strided<const T>(call.k, entries, hkv, rows_k, call.dim_qk),
                            strided<const T>(call.v, entries, hkv, rows_k, call.dim_v),
                            strided<T>(call.out, entries, hq, rows_q, call.dim_v),
                            Global<float>(call.lse, entries * hq * rows_q),
                            mask_params(call),
                            Elements(bias.data, call.bias_dtype, extent_of(bias, b, hq, sq, skv, bias.stride[3])),
                            {bias.stride[0], bias.stride[1], bias.stride[2], bias.stride[3]},
                            distance_params(call),
                            {Global<const int32_t>(call.cu_seqlens_q, packed ? b + 1 : 0),
                             Global<const int32_t>(call.cu_seqlens_k, packed ? b + 1 : 0),
                             static_cast<int>(rows_q), static_cast<int>(rows_k)},
                            Global<const float>(call.sinks, hq),
                            Dropout(call.dropout),
                            static_cast<int>(hq),
                            static_cast<int>(hq / hkv),
                            static_cast<int>(b * hq),
                            static_cast<int>(b),
                            static_cast<int>(sq),
                            static_cast<int>(skv),
                            static_cast<int>(call.dim_qk),
                            static_cast<int>(call.dim_v),
                            // A packed batch has a first tile even where no sequence has a query: it sees to the rows of no sequence.
                            static_cast<int>(packed && tiles == 0 ? 1 : tiles),
                            call.scale,
                            call.softcap,
                            false,
                            false,
                            false,
                            false};
    p.q_vectors = p.q.vectors(call.dim_qk);
    p.k_vectors = p.k.vectors(call.dim_qk);
    p.v_vectors = p.v.vectors(call.dim_v);
    p.out_vectors = p.out.vectors(call.dim_v);
    return p;
}

// Whether the sizes fit the kernels' ints, `blocks` being those of the grid.
inline bool fits(const fastattn_cuda_attention &call, int64_t blocks) {
    return blocks <= INT32_MAX && call.rows_q <= INT32_MAX && call.rows_k <= INT32_MAX;
}

// The rows of batch entry b. Whatever cu_seqlens holds, they lie within the tensors.
template <typename T>
__device__ __forceinline__ Sequence sequence_of(const AttentionParams<T> &p, int b) {
    if (!p.packed.cu_q) return {0, 0, p.len_q, p.len_k, 0, p.distance.top_left ? 0 : p.len_k - p.len_q};
    const int64_t begin_q = p.packed.cu_q.get(b), end_q = p.packed.cu_q.get(b + 1), begin_k = p.packed.cu_k.get(b), end_k = p.packed.cu_k.get(b + 1);
    const int first_q = clamp(begin_q, 0, p.packed.rows_q), first_k = clamp(begin_k, 0, p.packed.rows_k);
    const int len_q = smaller(clamp(end_q, first_q, p.packed.rows_q) - first_q, p.len_q);
    const int len_k = smaller(clamp(end_k, first_k, p.packed.rows_k) - first_k, p.len_k);
    const int shift = clamp((end_k - begin_k) - (end_q - begin_q), -FAR, FAR);  // also of a sequence that is cut off
    return {first_q, first_k, len_q, len_k, shift, p.distance.top_left ? 0 : shift};
}

// Where the sequence's rows of head h begin in lse, and in whatever lies as lse does.
template <typename T>
__device__ __forceinline__ int64_t lse_head(const AttentionParams<T> &p, int b, int h, const Sequence &sequence) {
    return (static_cast<int64_t>(p.packed.cu_q ? 0 : b) * p.heads_q + h) * p.packed.rows_q + sequence.first_q;
}
