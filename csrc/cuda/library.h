// The C interface of libfastattn_cuda.so: device pointers, shapes, a device and a stream. Nothing here knows torch or Python.
//
// Functions return a cudaError_t as int, 0 for success; fastattn_cuda_error_text() names it. Each sets the device it is given
// and restores the one that was current, launches on the given stream only and allocates nothing, so a graph may capture it.
#pragma once
#include <stdint.h>

#include "../common/problem.h"

#define FASTATTN_CUDA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    char name[256];
    int32_t capability_major, capability_minor;
    int32_t multiprocessors;
    int64_t memory_bytes;
} fastattn_cuda_device;

typedef struct {
    const int64_t *seed;  // on the device
    uint32_t threshold;   // keep where the 16-bit lane >= threshold = round(65536 p); 0: no dropout
    float keep_scale;     // 65536 / (65536 - threshold)
} fastattn_cuda_dropout;

// h = dropout(act(g) * u) with g = gate + gate_bias, u = up + up_bias; all (rows, cols) contiguous, of one dtype; arithmetic in float32.
typedef struct {
    int32_t device;
    void *stream;
    int32_t dtype;
    int32_t activation;
    int64_t rows, cols;
    const void *gate;
    const void *gate_bias;  // (cols) or null
    const void *up;         // null: u = 1
    const void *up_bias;    // (cols) or null
    void *h;                // may be gate or up itself
    void *gate_out;         // receives g; may be gate itself; null: not wanted
    void *up_out;           // receives u; may be up itself; null: not wanted
    fastattn_cuda_dropout dropout;
} fastattn_cuda_activation;

// grad_gate = grad_h u act'(g), grad_up = grad_h act(g), h = act(g) u; all (rows, cols) contiguous, of one dtype.
typedef struct {
    int32_t device;
    void *stream;
    int32_t dtype;
    int32_t activation;
    int64_t rows, cols;
    const void *grad_h;
    const void *gate;        // g; null for activation none
    const void *up;          // u; null: 1
    void *grad_gate;         // each of these: null, not wanted
    void *grad_up;
    void *h;
    float *grad_gate_parts;  // (fastattn_cuda_activation_backward_parts(), cols): their sum over rows is that of grad_gate
    float *grad_up_parts;
    fastattn_cuda_dropout dropout;  // of h: grad_h is behind it
} fastattn_cuda_activation_gradient;

// y = norm(z) with z = dropout(x) + residual; rows x width, contiguous.
typedef struct {
    int32_t device;
    void *stream;
    int32_t is_rms;
    int64_t rows, width;
    int32_t x_dtype, residual_dtype, z_dtype, weight_dtype, bias_dtype;
    const void *x, *residual, *weight, *bias;  // residual, weight, bias may be null
    void *z, *y;                               // z null: z is x; y of x_dtype
    float *mean, *rstd;                        // (rows); mean null for RMS
    float eps, offset;
    fastattn_cuda_dropout dropout;
} fastattn_cuda_norm;

typedef struct {
    int32_t device;
    void *stream;
    int32_t is_rms;
    int64_t rows, width;
    int32_t x_dtype, z_dtype, weight_dtype;
    const void *grad_y;         // x_dtype
    const void *grad_z;         // z_dtype or null
    const void *z, *weight;     // weight may be null
    const float *mean, *rstd;   // (rows); mean null for RMS
    void *grad_x;               // x_dtype
    void *grad_residual;        // z_dtype; null: not wanted
    void *grad_weight;          // (width); null: not wanted
    void *grad_bias;
    int32_t grad_weight_dtype, grad_bias_dtype;
    int64_t parts;              // fastattn_cuda_norm_backward_parts()
    float *parts_of_sums;       // room for (parts, width) of each of grad_weight and grad_bias that is wanted
    float offset;
    fastattn_cuda_dropout dropout;
} fastattn_cuda_norm_gradient;

// Scaled dot-product attention forward; what the fields mean: fastattn_attention in common/problem.h. Data is float16 or bfloat16.
typedef struct {
    int32_t device;
    void *stream;
    int32_t kernels;  // 80: mma.sync, on every device; 90: wgmma, on those of compute capability 9.0 alone, where there is such a kernel
    int32_t dtype;
    int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;  // of a packed batch, or null
    int64_t rows_q, rows_k;
    fastattn_tensor q, k, v, out;  // last dimension contiguous, three strides
    float *lse;                    // (B,Hq,Sq) contiguous
    fastattn_mask mask;
    int64_t n_blocks, n_bitmaps;  // extents of mask.blocks
    fastattn_tensor bias;
    int32_t bias_dtype;
    fastattn_distance_bias distance;
    const float *sinks;
    float scale, softcap;
    fastattn_cuda_dropout dropout;
} fastattn_cuda_attention;

// Its gradients. norm and centre are room for what the kernels tell each other of each row; every pointer of `call` is read only.
typedef struct {
    fastattn_cuda_attention call;  // out and lse: forward's results
    fastattn_tensor bounds;        // int32 (R,B,Hq,ceil(Sq / 64),4) of mask.intervals, per 64 queries the least and greatest start and end; or null
    fastattn_tensor col_ptr;       // of mask.blocks, the transpose: int32 (B,Hq,ceil(Skv / 64) + 1), two strides
    const int32_t *block_row, *block_row_id;
    fastattn_tensor grad_out, grad_q, grad_k, grad_v;
    const float *grad_lse;         // (B,Hq,Sq) contiguous, or null
    float *norm, *centre;          // (B,Hq,Sq) contiguous
    float *sink_terms;             // likewise, summed over B and Sq the gradient of the sinks; null: not wanted
    float tolerance;               // how far an estimated centre may be off, relative to the largest row of |ds|, before it is worked out again
} fastattn_cuda_attention_gradient;

// Attention over a key-value cache, in float16 or bfloat16. The keys that the band leaves of a sequence are cut into `parts` of part_keys each, as
// many as hold them whatever the lengths are; each has a softmax of its own.
typedef struct {
    int32_t device;
    void *stream;
    fastattn_decode problem;  // n_threads is not used
    int64_t entries;          // pages that there are, or batch entries of a contiguous cache: entries of block_table are clamped to them
    int64_t parts, part_keys;
    float *sums;        // room for (parts, B,Hq,Sq, Dv); null with one part
    float *statistics;  // room for (parts, B,Hq,Sq, 2)
} fastattn_cuda_decode;

FASTATTN_CUDA_API const char *fastattn_cuda_error_text(int error);
// The architectures of the compiled kernels, comma-separated: "sm_80,compute_80" is machine code for 8.x and PTX for what came later.
FASTATTN_CUDA_API const char *fastattn_cuda_architectures(void);
FASTATTN_CUDA_API int fastattn_cuda_device_count(int *count);
FASTATTN_CUDA_API int fastattn_cuda_device_query(int index, fastattn_cuda_device *device);
FASTATTN_CUDA_API int fastattn_cuda_activation_forward(const fastattn_cuda_activation *call);
FASTATTN_CUDA_API int64_t fastattn_cuda_activation_backward_parts(int64_t rows, int64_t cols);
FASTATTN_CUDA_API int fastattn_cuda_activation_backward(const fastattn_cuda_activation_gradient *call);
FASTATTN_CUDA_API int fastattn_cuda_attention_forward(const fastattn_cuda_attention *call);
// Writes the gradients of the rows of sequences; of a packed batch the others are left as they are.
FASTATTN_CUDA_API int fastattn_cuda_attention_backward(const fastattn_cuda_attention_gradient *from);
FASTATTN_CUDA_API int fastattn_cuda_attention_decode(const fastattn_cuda_decode *call);
FASTATTN_CUDA_API int fastattn_cuda_norm_forward(const fastattn_cuda_norm *call);
FASTATTN_CUDA_API int64_t fastattn_cuda_norm_backward_parts(int64_t rows, int64_t width, int32_t multiprocessors);
FASTATTN_CUDA_API int fastattn_cuda_norm_backward(const fastattn_cuda_norm_gradient *call);

#ifdef __cplusplus
}
#endif
