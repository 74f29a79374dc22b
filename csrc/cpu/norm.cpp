// LayerNorm and RMSNorm over rows: z = dropout(x) + residual, y = (z - mean) * rstd * (offset + weight) + bias.
//
// Numerics: a row is held as float32; the variance is taken about the mean in a second pass over it (no E[z^2] - E[z]^2 cancellation); one
//   rounding at the end. z is rounded to its own dtype before the statistics, so that backward, which reads z, sees the row that was normalised.
// Backward, with g = grad_y (offset + weight) and h = (z - mean) rstd:
//   grad_z' = rstd (g - mean(g) - h mean(g h)) + grad_z     (RMS: without mean(g))
//   grad_x = dropout'(grad_z'), grad_residual = grad_z', grad_weight = sum over rows of grad_y h, grad_bias = sum over rows of grad_y
// Algorithm: a few passes over a row that lies in the level-1 cache; each knows its dtypes when compiled, and only its last vector asks for lanes.
//
// Ladder, ms on 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-26, float32, 1,024 x 768, LayerNorm / with residual / RMSNorm / forward and backward
// with residual; torch in the same runs 0.154 / 0.26 / 0.20 / 1.35.
//   0.332 / 0.667 / 0.294 / 1.57  dtypes and lanes asked for at every vector
//   0.167 / 0.287 / 0.129 / 1.35  as above
//   0.167 / 0.252 / 0.129 / 1.30  x and residual in one pass, into z itself where that is float32
// LayerNorm's backward in float32, ms at 1,024 x 768, 8,192 x 768, 1,024 x 4,096 on 2 cores of an AMD EPYC (Zen 5, AVX-512, VM), 2026-11-27; torch in the
// same runs 0.125, 1.64, 1.32:
//   0.097, 1.73, 1.84  through rows of scratch
//   0.089, 1.45, 1.15  backward_plain
#include "kernels.h"
#include "norm.h"
#include "philox.h"
#include "rows.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

bool drops(const fastattn_norm &p) { return p.dropout.threshold != 0; }

// The row buffers of one thread.
struct RowBuffers {
    explicit RowBuffers(const fastattn_norm &p)
        : width(round_up(p.width, kLanes)),
          scratch(2 * Scratch::padded(width) + Scratch::padded(round_up(p.width, kKeepPadding) / 2)),
          row(scratch.take(width)),
          other(scratch.take(width)),
          keep((int16_t *)scratch.take(round_up(p.width, kKeepPadding) / 2)) {}
    int64_t width;
    Scratch scratch;
    float *row, *other;
    int16_t *keep;
};

Affine affine_of(const fastattn_norm &p) { return {p.weight, p.bias, p.weight_dtype, p.bias_dtype, p.offset}; }

// row[c] = f(c, lanes, elements of that dtype from `source`); nothing is written past the row.
template <class F>
void over_elements(const void *source, int32_t source_dtype, int64_t width, float *row, F &&f) {
    with_dtype(source_dtype, [&]<int dtype>() {
        over_columns(width, [&](int64_t c, int lanes) {
            store_any(row + c, FASTATTN_FLOAT32, f(c, lanes, load_any(offset(source, dtype, c), dtype, lanes)), lanes);
        });
    });
}

// target = row of scratch, in that dtype.
void write_row(const float *row, int64_t width, void *target, int32_t dtype) { unpack_rows(row, 0, 1, width, 1.0f, target, dtype, 0); }

// z of one row as float32, also written to p.z: the row of x or of z itself where that will do.
const float *row_of_z(const fastattn_norm &p, int64_t row, RowBuffers &buffers) {
    const int64_t at = row * p.width;
    const void *x = offset(p.x, p.x_dtype, at), *residual = p.residual ? offset(p.residual, p.residual_dtype, at) : nullptr;
    void *kept = p.z ? offset(p.z, p.z_dtype, at) : nullptr;
    const bool dropped = drops(p);
    if (p.x_dtype == FASTATTN_FLOAT32 && !dropped && !residual && !kept) return (const float *)x;
    float *z = kept && p.z_dtype == FASTATTN_FLOAT32 ? (float *)kept : buffers.row;
    if (dropped) keep_row(p.dropout, row, p.width, buffers.keep);
    with_dtype(p.residual_dtype, [&]<int residual_dtype>() {
        over_elements(x, p.x_dtype, p.width, z, [&](int64_t c, int lanes, vfloat v) {
            if (dropped) v = drop(v, p.dropout, buffers.keep + c);
            if (residual) v += load_any(offset(residual, residual_dtype, c), residual_dtype, lanes);
            return v;
        });
    });
    if (kept && z == buffers.row) {  // rounded
        write_row(z, p.width, kept, p.z_dtype);
        pack_rows({kept, p.z_dtype, 0}, 1, p.width, 1.0f, z, buffers.width);
    }
    return z;
}

void forward_row(const fastattn_norm &p, int64_t row, RowBuffers &buffers) {
    const float *z = row_of_z(p, row, buffers);
    const float mean = p.is_rms ? 0.0f : mean_of(z, p.width);
    const float rstd = rstd_of(z, p.width, mean, p.eps);
    if (p.mean) p.mean[row] = mean;
    if (p.rstd) p.rstd[row] = rstd;
    write_normal(z, p.width, mean, rstd, affine_of(p), offset(p.y, p.x_dtype, row * p.width), p.x_dtype);
}

void backward_row(const fastattn_norm &p, int64_t row, RowBuffers &buffers, float *weight_sum, float *bias_sum) {
    const float mean = p.is_rms ? 0.0f : p.mean[row], rstd = p.rstd[row];
    const int64_t at = row * p.width;
    const Affine affine = affine_of(p);
    float *h_row = buffers.row, *g_row = buffers.other;  // past the row they hold anything
    over_elements(offset((const void *)p.z, p.z_dtype, at), p.z_dtype, p.width, h_row, [&](int64_t, int, vfloat z) { return (z - mean) * rstd; });
    vfloat g_total = zero(), gh_total = zero();
    const void *grad_y = offset(p.grad_y, p.x_dtype, at);
    with_dtype(p.x_dtype, [&]<int dtype>() {
        with_dtype(affine.weight_dtype, [&]<int weight>() {
            over_columns(p.width, [&](int64_t c, int lanes) {
                const vfloat grad = load_any(offset(grad_y, dtype, c), dtype, lanes), h = load_any(h_row + c, FASTATTN_FLOAT32, lanes);
                const vfloat g = grad * affine.scale<weight>(c, lanes);
                store(g_row + c, g);
                g_total += g;
                gh_total += g * h;
                if (weight_sum) add_to(weight_sum + c, grad * h);
                if (bias_sum) add_to(bias_sum + c, grad);
            });
        });
    });
    const float g_mean = p.is_rms ? 0.0f : sum(g_total) / (float)p.width, gh_mean = sum(gh_total) / (float)p.width;
    over_columns(p.width, [&](int64_t c, int) { store(h_row + c, rstd * (load(g_row + c) - g_mean - load(h_row + c) * gh_mean)); });
    float *grad = h_row;
    if (p.grad_z)
        over_elements(offset(p.grad_z, p.z_dtype, at), p.z_dtype, p.width, grad, [&](int64_t c, int, vfloat v) { return load(grad + c) + v; });
    if (p.grad_residual) write_row(grad, p.width, offset(p.grad_residual, p.residual_dtype, at), p.residual_dtype);
    if (drops(p)) {
        keep_row(p.dropout, row, p.width, buffers.keep);
        over_columns(p.width, [&](int64_t c, int) { store(grad + c, drop(load(grad + c), p.dropout, buffers.keep + c)); });
    }
    write_row(grad, p.width, offset(p.grad_x, p.x_dtype, at), p.x_dtype);
}

// Rows of float32 that need no dropout: their sums in one pass over each, then all of them column by column, so that the sums of the columns are read
// and written once for them all. Nothing is kept in between: loads cost less than stores do. (Halves, converted twice then, take 1.3 times as long.)
template <int weight, int Rows>
void backward_plain_rows(const fastattn_norm &p, int64_t first, float *weight_sum, float *bias_sum) {
    const Affine affine = affine_of(p);
    const float *z[Rows], *grad_y[Rows], *grad_z[Rows];
    float *grad_x[Rows];
    float mean[Rows], rstd[Rows], g_mean[Rows], gh_mean[Rows];
    for (int r = 0; r < Rows; r++) {
        const int64_t at = (first + r) * p.width;
        z[r] = (const float *)p.z + at;
        grad_y[r] = (const float *)p.grad_y + at;
        grad_z[r] = p.grad_z ? (const float *)p.grad_z + at : nullptr;
        grad_x[r] = (float *)p.grad_x + at;
        mean[r] = p.is_rms ? 0.0f : p.mean[first + r];
        rstd[r] = p.rstd[first + r];
        vfloat g_total = zero(), gh_total = zero();
        over_columns(p.width, [&](int64_t c, int lanes) {
            const vfloat g = load_any(grad_y[r] + c, FASTATTN_FLOAT32, lanes) * affine.scale<weight>(c, lanes);
            g_total += g;
            gh_total += g * ((load_any(z[r] + c, FASTATTN_FLOAT32, lanes) - mean[r]) * rstd[r]);
        });
        g_mean[r] = p.is_rms ? 0.0f : sum(g_total) / (float)p.width;
        gh_mean[r] = sum(gh_total) / (float)p.width;
    }
    over_columns(p.width, [&](int64_t c, int lanes) {
        const vfloat scale = affine.scale<weight>(c, lanes);
        vfloat weight_total = weight_sum ? load(weight_sum + c) : zero(), bias_total = bias_sum ? load(bias_sum + c) : zero();
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) {
            const vfloat grad = load_any(grad_y[r] + c, FASTATTN_FLOAT32, lanes);
            const vfloat h = (load_any(z[r] + c, FASTATTN_FLOAT32, lanes) - mean[r]) * rstd[r];
            weight_total += grad * h;
            bias_total += grad;
            vfloat dz = rstd[r] * (grad * scale - g_mean[r] - h * gh_mean[r]);
            if (grad_z[r]) dz += load_any(grad_z[r] + c, FASTATTN_FLOAT32, lanes);
            store_any(grad_x[r] + c, FASTATTN_FLOAT32, dz, lanes);
        }
        if (weight_sum) store(weight_sum + c, weight_total);
        if (bias_sum) store(bias_sum + c, bias_total);
    });
}

bool is_plain(const fastattn_norm &p) {
    return p.x_dtype == FASTATTN_FLOAT32 && p.z_dtype == FASTATTN_FLOAT32 && !p.grad_residual && !drops(p);
}

constexpr int kRowsTogether = 4;
constexpr int64_t kTogetherFrom = 2048;  // columns whose sums the level-1 cache does not keep beside a row; narrow rows come best one by one

void backward_plain(const fastattn_norm &p, int64_t begin, int64_t end, float *weight_sum, float *bias_sum) {
    with_dtype(p.weight_dtype, [&]<int weight>() {
        int64_t row = begin;
        if (p.width >= kTogetherFrom)
            for (; row + kRowsTogether <= end; row += kRowsTogether) backward_plain_rows<weight, kRowsTogether>(p, row, weight_sum, bias_sum);
        for (; row < end; row++) backward_plain_rows<weight, 1>(p, row, weight_sum, bias_sum);
    });
}

}  // namespace

int norm_forward(const fastattn_norm &p) {
    int status = FASTATTN_OK;
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        RowBuffers buffers(p);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; row++)
            if (!buffers.scratch.failed()) forward_row(p, row, buffers);
    }
    return status;
}

int norm_backward(const fastattn_norm &p) {
    const RowChunks chunks(p.rows);
    const ColumnSums sums(2, p.grad_weight || p.grad_bias ? chunks.count : 0, p.width);
    if (sums.failed()) return FASTATTN_OUT_OF_MEMORY;
    int status = FASTATTN_OK;
#pragma omp parallel for num_threads(p.n_threads) schedule(static) if (p.n_threads > 1)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        float *weight_sum = p.grad_weight ? sums.row(0, chunk) : nullptr, *bias_sum = p.grad_bias ? sums.row(1, chunk) : nullptr;
        if (is_plain(p)) {
            backward_plain(p, chunks.begin(chunk), chunks.begin(chunk + 1), weight_sum, bias_sum);
            continue;
        }
        RowBuffers buffers(p);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
            continue;
        }
        for (int64_t row = chunks.begin(chunk); row < chunks.begin(chunk + 1); row++)
            backward_row(p, row, buffers, weight_sum, bias_sum);
    }
    if (p.grad_weight) sums.write(0, p.width, p.grad_weight);
    if (p.grad_bias) sums.write(1, p.width, p.grad_bias);
    return status;
}

FASTATTN_NAMESPACE_END
