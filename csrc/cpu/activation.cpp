// Backward of h = dropout(act(gate) * up), element by element, with the sums over rows that are the biases' gradients, and h again for the gradient
// of the projection after it (cheaper to recompute than to keep).
#include "activation.h"
#include "kernels.h"
#include "philox.h"
#include "rows.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

template <int activation>
void backward_row(const fastattn_activation_backward &p, int64_t row, float *gate_sum, float *up_sum, int16_t *keep) {
    const bool drops = p.dropout.threshold != 0;
    if (drops) keep_row(p.dropout, row, p.cols, keep);
    for (int64_t c = 0; c < p.cols; c += kLanes) {
        const int width = lanes_left(c, p.cols);
        const int64_t at = row * p.cols + c;
        vfloat grad = load_any(offset(p.grad_h, p.dtype, at), p.dtype, width);
        if (drops) grad = drop(grad, p.dropout, keep + c);
        // Without an activation the derivative is 1 and the gate itself is not needed.
        const vfloat gate = p.gate ? load_any(offset(p.gate, p.dtype, at), p.dtype, width) : zero();
        const vfloat up = p.up ? load_any(offset(p.up, p.dtype, at), p.dtype, width) : broadcast(1.0f);
        const vfloat grad_gate = grad * up * activate_derivative<activation>(gate);
        if (p.grad_gate) store_any(offset(p.grad_gate, p.dtype, at), p.dtype, grad_gate, width);
        if (gate_sum) add_to(gate_sum + c, grad_gate);
        if (!p.up && !p.h) continue;
        const vfloat activated = activate<activation>(gate);
        const vfloat h = activated * up;
        if (p.h) store_any(offset(p.h, p.dtype, at), p.dtype, drops ? drop(h, p.dropout, keep + c) : h, width);
        if (p.grad_up) store_any(offset(p.grad_up, p.dtype, at), p.dtype, grad * activated, width);
        if (up_sum) add_to(up_sum + c, grad * activated);
    }
}

}  // namespace

int activation_backward(const fastattn_activation_backward &p) {
    const RowChunks chunks(p.rows);
    const ColumnSums sums(2, p.grad_gate_sum || p.grad_up_sum ? chunks.count : 0, p.cols);
    const int64_t masks = round_up(p.cols, kKeepPadding) / 2;  // two to a float
    if (sums.failed()) return FASTATTN_OUT_OF_MEMORY;
    int status = FASTATTN_OK;
#pragma omp parallel for num_threads(p.n_threads) schedule(static) if (p.n_threads > 1)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        Scratch scratch(p.dropout.threshold ? masks : 0);
        if (scratch.failed()) {
#pragma omp atomic write
            status = FASTATTN_OUT_OF_MEMORY;
            continue;
        }
        int16_t *keep = (int16_t *)scratch.take(masks);
        with_activation(p.activation, [&]<int activation>() {
            for (int64_t row = chunks.begin(chunk); row < chunks.begin(chunk + 1); row++)
                backward_row<activation>(p, row, p.grad_gate_sum ? sums.row(0, chunk) : nullptr, p.grad_up_sum ? sums.row(1, chunk) : nullptr, keep);
        });
    }
    if (p.grad_gate_sum) sums.write(0, p.cols, p.grad_gate_sum);
    if (p.grad_up_sum) sums.write(1, p.cols, p.grad_up_sum);
    return status;
}

FASTATTN_NAMESPACE_END
