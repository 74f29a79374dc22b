// What the kernels of attention's backward are given.
#pragma once
#include "query_walk.cuh"

template <typename T>
struct AttentionGradientParams {
    AttentionParams<T> call;  // out and lse are what forward found
    MaskTranspose transpose;
    Strided<const T> grad_out;
    Strided<T> grad_q, grad_k, grad_v;
    Global<const float> grad_lse;          // as lse, or absent
    Global<float> norm, centre;            // as lse: by queries written, by keys read
    Global<float> sink_terms;              // as lse, or absent: what each query adds to the gradient of its head's sink
    float tolerance;
    int key_entries, k_tiles;              // B * Hkv; tiles of 64 keys
    bool grad_out_vectors, grad_q_vectors, grad_k_vectors, grad_v_vectors;
};

template <typename T>
AttentionGradientParams<T> gradient_params(const fastattn_cuda_attention_gradient &from, int tile_rows) {
    const fastattn_cuda_attention &call = from.call;
    const bool packed = call.cu_seqlens_q != nullptr;
    const int64_t b = call.batch, hq = call.heads_q, hkv = call.heads_kv, entries = packed ? 1 : b;
    const int64_t rows_q = packed ? call.rows_q : call.len_q, rows_k = packed ? call.rows_k : call.len_k, rows = entries * hq * rows_q;
    AttentionGradientParams<T> p;
    p.call = attention_params<T>(call, tile_rows);
    // (R,B,H,n,4): the strides of B, H and n follow that of R.
    const fastattn_tensor bounds = {from.bounds.data, {from.bounds.stride[1], from.bounds.stride[2], from.bounds.stride[3], 0}};
    p.transpose.bounds_stride = from.bounds.stride[0];
    p.transpose.bounds = Strided<const int32_t>(bounds, static_cast<const int32_t *>(bounds.data), b, hq, (call.len_q + MASK_BLOCK - 1) / MASK_BLOCK,
                                                4 + (call.mask.n_intervals - 1) * p.transpose.bounds_stride, 1);
    const fastattn_tensor columns = {from.col_ptr.data, {from.col_ptr.stride[0], from.col_ptr.stride[1], 1, 0}};
    const int64_t block_columns = (call.len_k + KEYS - 1) / KEYS;
    p.transpose.col_ptr = Strided<const int32_t>(columns, static_cast<const int32_t *>(columns.data), b, hq, block_columns + 1, 1, 1);
    p.transpose.row = Global<const int32_t>(from.block_row, call.n_blocks);
    p.transpose.row_id = Global<const int32_t>(from.block_row_id, call.n_blocks);
    p.grad_out = strided<const T>(from.grad_out, entries, hq, rows_q, call.dim_v);
    p.grad_q = strided<T>(from.grad_q, entries, hq, rows_q, call.dim_qk);
    p.grad_k = strided<T>(from.grad_k, entries, hkv, rows_k, call.dim_qk);
    p.grad_v = strided<T>(from.grad_v, entries, hkv, rows_k, call.dim_v);
    p.grad_lse = Global<const float>(from.grad_lse, rows);
    p.norm = Global<float>(from.norm, rows);
    p.centre = Global<float>(from.centre, rows);
    p.sink_terms = Global<float>(from.sink_terms, rows);
    p.tolerance = from.tolerance;
    p.key_entries = static_cast<int>(b * hkv);
    p.k_tiles = static_cast<int>(block_columns);
    p.grad_out_vectors = p.grad_out.vectors(call.dim_v);
    p.grad_q_vectors = p.grad_q.vectors(call.dim_qk);
    p.grad_k_vectors = p.grad_k.vectors(call.dim_qk);
    p.grad_v_vectors = p.grad_v.vectors(call.dim_v);
    return p;
}
