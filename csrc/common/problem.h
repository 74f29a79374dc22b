// The calls of both native libraries, described as plain C data: pointers, sizes, strides in elements. Nothing here knows torch or Python.
//
// Every shape follows the Python operators: q (B,Hq,Sq,D), k (B,Hkv,Skv,D), v (B,Hkv,Skv,Dv), last dimension contiguous.
// A null pointer means "not given". Functions return 0, or a fastattn_status whose text fastattn_status_text() gives.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fastattn_dtype { FASTATTN_FLOAT32 = 0, FASTATTN_BFLOAT16 = 1, FASTATTN_FLOAT16 = 2 };

enum fastattn_activation {
    FASTATTN_ACT_NONE = 0,
    FASTATTN_ACT_RELU = 1,
    FASTATTN_ACT_GELU = 2,        // x Phi(x), through erf
    FASTATTN_ACT_GELU_TANH = 3,   // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    FASTATTN_ACT_SILU = 4,        // x sigmoid(x)
    FASTATTN_ACT_QUICK_GELU = 5,  // x sigmoid(1.702 x)
    FASTATTN_ACT_RELU2 = 6        // max(x, 0)^2
};

enum fastattn_status { FASTATTN_OK = 0, FASTATTN_OUT_OF_MEMORY = 1 };

// A tensor of up to four dimensions; strides count elements, outermost first, unused ones are 0.
typedef struct {
    void *data;
    int64_t stride[4];
} fastattn_tensor;

// Blocks of 64 queries x 64 keys, sparse by rows: those of block row r are entries row_ptr[r] to row_ptr[r + 1] of col and id.
typedef struct {
    fastattn_tensor row_ptr;  // int32 (B,H,nq + 1): two strides, the last dimension contiguous; or null
    const int32_t *col;       // block column, ascending within a row
    const int32_t *id;        // 0: all visible, else the row of `bitmaps`
    const int64_t *bitmaps;   // (m, 64): bit c of word r says that query r sees key c
} fastattn_blocks;

// visible = keys and band and intervals and blocks and dense (DESIGN: masks become a lowered form).
typedef struct {
    const int32_t *key_start;  // (B) or null
    const int32_t *key_end;    // (B) or null
    const int64_t *key_bits;   // (B, ceil(Skv / 64)) or null: bit j % 64 of word j / 64
    int64_t band_offset;       // query i sits at key position i + band_offset
    int64_t band_left;         // keeps j >= i + offset - left;  negative: unbounded
    int64_t band_right;        // keeps j <= i + offset + right; only when band_has_right
    int32_t band_has_left;
    int32_t band_has_right;
    fastattn_tensor intervals;  // int32 (R,B,H,Sq,2): four strides, the last dimension contiguous
    int64_t n_intervals;        // R; 0 when there are none
    fastattn_blocks blocks;
    fastattn_tensor dense;  // bool (B,H,Sq,Skv), 1 = visible
} fastattn_mask;

// A bias that depends on distance d = j - position alone, where query i sits at position i + Lk - Lq (those of its batch entry), or at i with
// `top_left`: table[head][clamp(d - table_first, 0, table_size - 1)] - slopes[batch][head] |d|; either part may be null.
typedef struct {
    const float *table;     // (Hq, table_size) by table_stride, which is 0 where the heads share one row
    int64_t table_stride, table_first, table_size;
    const float *slopes;    // (B, Hq) by slopes_stride, which is 0 where the batch entries share one row
    int64_t slopes_stride;
    int32_t top_left;
    float *grad_table;      // of table's shape, rows of table_size one after the other, or null; backward only
    float *grad_slopes;     // of slopes' shape, or null; backward only
} fastattn_distance_bias;

typedef struct {
    uint64_t seed;       // Philox key
    uint32_t threshold;  // keep where the 16-bit lane >= threshold = round(65536 p); 0: no dropout
    float keep_scale;    // 65536 / (65536 - threshold)
} fastattn_dropout;

// A packed batch has cu_seqlens: q is (1,Hq,rows_q,D), k (1,Hkv,rows_k,D), lse (1,Hq,rows_q) and so on, all with batch stride 0, and sequence b
// owns the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q and likewise of k. len_q and len_k are then the longest lengths: what a
// sequence has beyond them, and rows of no sequence, give 0 and -inf. Masks, dense biases and dropout count within the sequence, as if the
// batch were padded to len_q and len_k, and the band is relative to its end: query i sits at i + band_offset + Lk - Lq.
typedef struct {
    int32_t dtype;  // of q, k, v, out and their gradients
    int32_t n_threads;
    int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (B + 1), not decreasing, or null
    int64_t rows_q, rows_k;                      // of a packed batch's tensors
    fastattn_tensor q, k, v, out;
    float *lse;  // (B,Hq,Sq) contiguous, natural log, without the sink
    fastattn_mask mask;
    fastattn_tensor bias;  // additive (B,Hq,Sq,Skv) through its strides, or null
    int32_t bias_dtype;
    fastattn_distance_bias distance;
    const float *sinks;  // (Hq) or null
    float scale;
    float softcap;  // 0: off
    fastattn_dropout dropout;
    // Backward only.
    fastattn_tensor grad_out, grad_q, grad_k, grad_v;
    const float *grad_lse;  // (B,Hq,Sq) contiguous or null
    float *grad_sinks;      // (Hq) or null
    fastattn_tensor grad_bias;  // float32, zeroed, strides 0 in the dimensions that it is summed over; or null
} fastattn_attention;

// Attention of few queries over a key-value cache. Contiguous: k (B,Hkv,S,D) by stride[0..2]; in pages: k (pages, page_size, Hkv, D) by
// stride[0..2] and page n of sequence b at block_table[b * block_table_stride + n].
typedef struct {
    int32_t dtype;
    int32_t n_threads;
    int64_t batch, heads_q, heads_kv, len_q, dim_qk, dim_v;
    int64_t max_length;  // keys that the cache has room for, per sequence
    fastattn_tensor q, k, v, out;
    float *lse;                    // (B,Hq,Sq) contiguous
    const int32_t *cache_lengths;  // (B); null: max_length for all
    const int32_t *block_table;    // or null: contiguous
    int64_t block_table_stride, page_size;
    int64_t band_left, band_right;  // about position cache_length - Sq + i; either may be negative
    int32_t band_has_left, band_has_right;
    fastattn_tensor intervals;  // int32 (R,B,Hq,Sq,2) as in fastattn_mask
    int64_t n_intervals;
    fastattn_tensor dense;  // bool (B,Hq,Sq,max_length), as in fastattn_mask, or null; CPU only
    fastattn_tensor bias;   // additive (B,Hq,Sq,max_length), or null
    int32_t bias_dtype;
    fastattn_distance_bias distance;
    const float *sinks;  // (Hq) or null
    float scale;
    float softcap;  // 0: off
} fastattn_decode;

// C = dropout(act(A B + bias) * multiplier) over float32 accumulators; A (m,k), B (k,n), C (m,n), all of one dtype.
// Either stride of A and of B may be 1 (so that transposes cost nothing); C, pre and multiplier are row-major.
typedef struct {
    int32_t dtype;
    int32_t n_threads;
    int64_t m, n, k;
    fastattn_tensor a;           // stride[0] over m, stride[1] over k
    fastattn_tensor b;           // stride[0] over k, stride[1] over n
    fastattn_tensor c;           // stride[0] over m
    const void *bias;            // (n) or null
    int32_t bias_dtype;
    int32_t activation;
    fastattn_tensor pre;         // receives A B + bias before the activation, or null
    fastattn_tensor multiplier;  // multiplied after the activation, or null
    fastattn_dropout dropout;    // of C, by row and column
    int32_t rounds_float32;      // whether float32 of A and B may be rounded to bfloat16; C and the sums may not
    const void *packed;          // B as `pack` wrote it, or null; read where that is faster than B
} fastattn_gemm;

// B of a product as its kernel multiplies by it, to be kept from call to call. packed_bytes writes how much memory that takes: 0 where the kernel
// would not read it, as with few rows. pack writes it; any number of rows of A may then be multiplied by it.
typedef struct {
    const fastattn_gemm *product;  // whose a and c need no data
    int64_t *bytes;                // packed_bytes only
    void *packed;                  // pack only; aligned to 64 bytes
} fastattn_packing;

// Elementwise backward of h = dropout(act(gate) * up) (up null: 1), rows x cols, all contiguous, one dtype.
typedef struct {
    int32_t dtype;
    int32_t n_threads;
    int32_t activation;
    int64_t rows, cols;
    const void *grad_h, *gate, *up;
    void *grad_gate;       // may be null when only column sums are wanted
    void *grad_up;         // null without up
    void *h;               // recomputed h, or null
    float *grad_gate_sum;  // (cols) sum over the rows of grad_gate, or null
    float *grad_up_sum;    // (cols), or null
    fastattn_dropout dropout;
} fastattn_activation_backward;

// y = norm(z) with z = dropout(x) + residual; rows x width, rows contiguous.
typedef struct {
    int32_t n_threads;
    int32_t is_rms;
    int64_t rows, width;
    int32_t x_dtype, residual_dtype, z_dtype, weight_dtype, bias_dtype;
    const void *x, *residual, *weight, *bias;  // residual, weight, bias may be null
    void *z, *y;                               // z null: z is x
    float *mean, *rstd;                        // (rows); mean null for RMS, both may be null in forward
    float eps, offset;
    fastattn_dropout dropout;
    // Backward only.
    const void *grad_y;  // x_dtype
    const void *grad_z;  // z_dtype or null
    void *grad_x;        // x_dtype
    void *grad_residual;  // residual_dtype; null: not wanted
    float *grad_weight, *grad_bias;  // (width) or null
} fastattn_norm;

// A linear layer of the call's dtype: weight (out, in) by rows, bias (out) or null, and the weight as `pack` wrote it, or null.
typedef struct {
    const void *weight, *bias, *packed;
} fastattn_linear;

// The numbers of a LayerNorm; weight and bias (width) may be null.
typedef struct {
    const void *weight, *bias;
    int32_t weight_dtype, bias_dtype;
    float eps;
} fastattn_layer_norm;

// A transformer encoder layer in inference, on rows x (rows, embed), each row a token:
//   norm last:  h = norm1(x + out(attend(x))),  y = norm2(h + down(act(up(h))))
//   norm first: h = x + out(attend(norm1(x))),  y = h + down(act(up(norm2(h))))
// attend() is multi-head attention among the rows of each sequence, heads side by side in q, k and v. The sequences follow each other: `batch`
// of them, each of `len` rows, or sequence b of rows cu_seqlens[b] to cu_seqlens[b + 1] (then len is the longest, and there is no mask).
typedef struct {
    int32_t dtype;
    int32_t n_threads;
    int32_t activation;
    int32_t norm_first;
    int32_t rounds_float32;  // as in fastattn_gemm; attention is exact
    int64_t batch, len, rows, heads, embed, hidden;
    const int32_t *cu_seqlens;  // (batch + 1) or null
    const void *x;              // (rows, embed) contiguous
    void *y;                    // likewise, not x
    fastattn_linear q, k, v, out, up, down;
    fastattn_layer_norm norm1, norm2;
    float scale;
    fastattn_mask mask;
} fastattn_encoder_layer;

#ifdef __cplusplus
}
#endif
