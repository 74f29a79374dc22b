// LayerNorm and RMSNorm over rows: z = dropout(x) + residual, y = (z - mean) * rstd * (offset + weight) + bias.
//
// Numerics: a row is held as float32; the variance is taken about the mean in a second pass over it (no E[z^2] - E[z]^2 cancellation); one
//   rounding at the end. z is rounded to its own dtype before the statistics, so that backward, which reads z, sees the row that was normalised.
// Backward, with g = grad_y (offset + weight) and h = (z - mean) rstd:
//   grad_z' = rstd (g - mean(g) - h mean(g h)) + grad_z     (RMS: without mean(g))
//   grad_x = dropout'(grad_z'), grad_residual = grad_z', grad_weight = sum over rows of grad_y h, grad_bias = sum over rows of grad_y
#include "kernels.h"
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

vfloat scaled_weight(const fastattn_norm &p, int64_t c, int width) {
    return p.weight ? load_any(offset(p.weight, p.weight_dtype, c), p.weight_dtype, width) + p.offset : broadcast(1.0f);
}

// z of one row as float32, also written to p.z.
void gather_row(const fastattn_norm &p, int64_t row, RowBuffers &buffers) {
    if (drops(p)) keep_row(p.dropout, row, p.width, buffers.keep);
    for (int64_t c = 0; c < p.width; c += kLanes) {
        const int width = lanes_left(c, p.width);
        const int64_t at = row * p.width + c;
        vfloat z = load_any(offset(p.x, p.x_dtype, at), p.x_dtype, width);
        if (drops(p)) z = drop(z, p.dropout, buffers.keep + c);
        if (p.residual) z += load_any(offset(p.residual, p.residual_dtype, at), p.residual_dtype, width);
        if (p.z) {
            store_any(offset(p.z, p.z_dtype, at), p.z_dtype, z, width);
            if (p.z_dtype != FASTATTN_FLOAT32) z = load_any(offset(p.z, p.z_dtype, at), p.z_dtype, width);
        }
        store(buffers.row + c, z);
    }
}

float mean_of(const float *row, int64_t width, float shift, bool squared) {
    vfloat total[4] = {};
    int64_t c = 0;
    const auto term = [&](vfloat v) { return squared ? (v - shift) * (v - shift) : v; };
    for (; c + 4 * kLanes <= width; c += 4 * kLanes)
        for (int i = 0; i < 4; i++) total[i] += term(load(row + c + i * kLanes));
    for (; c + kLanes <= width; c += kLanes) total[0] += term(load(row + c));
    float result = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; c < width; c++) result += squared ? (row[c] - shift) * (row[c] - shift) : row[c];
    return result / (float)width;
}

void forward_row(const fastattn_norm &p, int64_t row, RowBuffers &buffers) {
    gather_row(p, row, buffers);
    const float mean = p.is_rms ? 0.0f : mean_of(buffers.row, p.width, 0.0f, false);
    const float rstd = 1.0f / __builtin_sqrtf(mean_of(buffers.row, p.width, mean, true) + p.eps);
    if (p.mean) p.mean[row] = mean;
    if (p.rstd) p.rstd[row] = rstd;
    for (int64_t c = 0; c < p.width; c += kLanes) {
        const int width = lanes_left(c, p.width);
        vfloat y = (load(buffers.row + c) - mean) * rstd * scaled_weight(p, c, width);
        if (p.bias) y += load_any(offset(p.bias, p.bias_dtype, c), p.bias_dtype, width);
        store_any(offset(p.y, p.x_dtype, row * p.width + c), p.x_dtype, y, width);
    }
}

void backward_row(const fastattn_norm &p, int64_t row, RowBuffers &buffers, float *weight_sum, float *bias_sum) {
    const float mean = p.is_rms ? 0.0f : p.mean[row], rstd = p.rstd[row];
    vfloat g_total = zero(), gh_total = zero();
    for (int64_t c = 0; c < p.width; c += kLanes) {
        const int width = lanes_left(c, p.width);
        const int64_t at = row * p.width + c;
        const vfloat grad_y = load_any(offset(p.grad_y, p.x_dtype, at), p.x_dtype, width);
        const vfloat h = (load_any(offset((const void *)p.z, p.z_dtype, at), p.z_dtype, width) - mean) * rstd;
        const vfloat g = grad_y * scaled_weight(p, c, width);  // 0 in the lanes past the row
        store(buffers.row + c, h);
        store(buffers.other + c, g);
        g_total += g;
        gh_total += g * h;
        if (weight_sum) add_to(weight_sum + c, grad_y * h);
        if (bias_sum) add_to(bias_sum + c, grad_y);
    }
    const float g_mean = p.is_rms ? 0.0f : sum(g_total) / (float)p.width, gh_mean = sum(gh_total) / (float)p.width;
    if (drops(p)) keep_row(p.dropout, row, p.width, buffers.keep);
    for (int64_t c = 0; c < p.width; c += kLanes) {
        const int width = lanes_left(c, p.width);
        const int64_t at = row * p.width + c;
        vfloat grad = rstd * (load(buffers.other + c) - g_mean - load(buffers.row + c) * gh_mean);
        if (p.grad_z) grad += load_any(offset(p.grad_z, p.z_dtype, at), p.z_dtype, width);
        if (p.grad_residual) store_any(offset(p.grad_residual, p.residual_dtype, at), p.residual_dtype, grad, width);
        if (drops(p)) grad = drop(grad, p.dropout, buffers.keep + c);
        store_any(offset(p.grad_x, p.x_dtype, at), p.x_dtype, grad, width);
    }
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
        RowBuffers buffers(p);
        if (buffers.scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
            continue;
        }
        for (int64_t row = chunks.begin(chunk); row < chunks.begin(chunk + 1); row++)
            backward_row(p, row, buffers, p.grad_weight ? sums.row(0, chunk) : nullptr, p.grad_bias ? sums.row(1, chunk) : nullptr);
    }
    if (p.grad_weight) sums.write(0, p.width, p.grad_weight);
    if (p.grad_bias) sums.write(1, p.width, p.grad_bias);
    return status;
}

FASTATTN_NAMESPACE_END
