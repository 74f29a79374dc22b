// A transformer encoder layer in inference, from x to y in one call; see fastattn_encoder_layer.
#include "kernels.h"
#include "pack.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

int64_t buffer_floats(const fastattn_encoder_layer &p, int64_t columns) { return Scratch::padded((p.rows * columns * size_of(p.dtype) + 3) / 4); }

// c (rows, n) = act(a (rows, k) W^T + b), c with a row stride of its own.
int linear(const fastattn_encoder_layer &p, const fastattn_linear &layer, const void *a, int64_t k, void *c, int64_t ldc, int64_t n,
           int32_t activation = FASTATTN_ACT_NONE) {
    fastattn_gemm g{};
    g.dtype = g.bias_dtype = p.dtype;
    g.n_threads = p.n_threads;
    g.m = p.rows, g.n = n, g.k = k;
    g.a = {(void *)a, {k, 1}};
    g.b = {(void *)layer.weight, {1, k}};
    g.c = {c, {ldc}};
    g.bias = layer.bias;
    g.activation = activation;
    return gemm(g);
}

// y = norm(x + residual); x and residual (rows, embed), residual may be null.
int norm(const fastattn_encoder_layer &p, const fastattn_layer_norm &layer, const void *x, const void *residual, void *y) {
    fastattn_norm n{};
    n.n_threads = p.n_threads;
    n.rows = p.rows, n.width = p.embed;
    n.x_dtype = n.residual_dtype = n.z_dtype = p.dtype;
    n.weight_dtype = layer.weight_dtype, n.bias_dtype = layer.bias_dtype;
    n.x = x, n.residual = residual;
    n.weight = layer.weight, n.bias = layer.bias;
    n.y = y;
    n.eps = layer.eps;
    return norm_forward(n);
}

// target = a + b, element by element.
void add(const fastattn_encoder_layer &p, const void *a, const void *b, void *target) {
    const int64_t elements = p.rows * p.embed;
    for (int64_t i = 0; i < elements; i += kLanes) {
        const int width = lanes_left(i, elements);
        store_any(offset(target, p.dtype, i), p.dtype, load_any(offset(a, p.dtype, i), p.dtype, width) + load_any(offset(b, p.dtype, i), p.dtype, width), width);
    }
}

// out (rows, embed) = attention among q, k and v, which lie side by side in rows of 3 embed.
int attend(const fastattn_encoder_layer &p, void *qkv, void *out, float *lse) {
    fastattn_attention a{};
    a.dtype = p.dtype;
    a.n_threads = p.n_threads;
    a.heads_q = a.heads_kv = p.heads;
    a.dim_qk = a.dim_v = p.embed / p.heads;
    a.scale = p.scale;
    a.mask = p.mask;
    a.lse = lse;
    const auto call = [&](int64_t first, int64_t batch, int64_t len) {
        a.batch = batch;
        a.len_q = a.len_k = len;
        const int64_t row = 3 * p.embed;
        const auto part = [&](int64_t index) {
            return fastattn_tensor{offset(qkv, p.dtype, first * row + index * p.embed), {len * row, a.dim_qk, row, 1}};
        };
        a.q = part(0), a.k = part(1), a.v = part(2);
        a.out = {offset(out, p.dtype, first * p.embed), {len * p.embed, a.dim_qk, p.embed, 1}};
        return attention_forward(a);
    };
    if (!p.cu_seqlens) return call(0, p.batch, p.len);
    int status = FASTATTN_OK;
    for (int64_t b = 0; b < p.batch && status == FASTATTN_OK; b++) status = call(p.cu_seqlens[b], 1, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
    return status;
}

}  // namespace

int encoder_layer_forward(const fastattn_encoder_layer &p) {
    if (p.rows == 0) return FASTATTN_OK;
    const int64_t wide = buffer_floats(p, larger(3 * p.embed, p.hidden)), narrow = buffer_floats(p, p.embed);
    Scratch scratch(wide + 2 * narrow + Scratch::padded(p.batch * p.heads * p.len));
    if (scratch.failed()) return FASTATTN_OUT_OF_MEMORY;
    float *qkv = scratch.take(wide), *hidden = qkv, *middle = scratch.take(narrow), *branch = scratch.take(narrow);
    float *lse = scratch.take(0);
    int status = FASTATTN_OK;
    const auto then = [&](auto &&step) { if (status == FASTATTN_OK) status = step(); };
    const int64_t e = p.embed;
    const void *input = p.x;
    if (p.norm_first) {
        then([&] { return norm(p, p.norm1, p.x, nullptr, branch); });
        input = branch;
    }
    const fastattn_linear *projections[3] = {&p.q, &p.k, &p.v};
    for (int64_t i = 0; i < 3; i++) then([&] { return linear(p, *projections[i], input, e, offset((void *)qkv, p.dtype, i * e), 3 * e, e); });
    then([&] { return attend(p, qkv, p.y, lse); });
    then([&] { return linear(p, p.out, p.y, e, branch, e, e); });
    if (p.norm_first) {
        add(p, p.x, branch, middle);
        then([&] { return norm(p, p.norm2, middle, nullptr, branch); });
        then([&] { return linear(p, p.up, branch, e, hidden, p.hidden, p.hidden, p.activation); });
        then([&] { return linear(p, p.down, hidden, p.hidden, branch, e, e); });
        add(p, middle, branch, p.y);
    } else {
        then([&] { return norm(p, p.norm1, branch, p.x, middle); });
        then([&] { return linear(p, p.up, middle, e, hidden, p.hidden, p.hidden, p.activation); });
        then([&] { return linear(p, p.down, hidden, p.hidden, branch, e, e); });
        then([&] { return norm(p, p.norm2, branch, middle, p.y); });
    }
    return status;
}

FASTATTN_NAMESPACE_END
