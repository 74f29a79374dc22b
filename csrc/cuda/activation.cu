// activation: what stands between the matrix products of linear_act, ffn and gated_ffn, forward and backward.
//
// Contract   h = dropout(act(g) * u) with g = gate + gate_bias and u = up + up_bias (u = 1 without up); all (rows, cols) contiguous, of one dtype out of
//            float32, bfloat16 and float16, biases (cols). Any rows and cols. g and u are stored too where asked for.
//            Backward: with grad_h behind its dropout, grad_gate = grad_h u act'(g), grad_up = grad_h act(g), h again for the gradient of the projection behind it, and the
//            partial sums of grad_gate and grad_up over rows p, p + parts, ... as row p of (parts, cols), which the caller adds up.
// Numerics   float32, one rounding per output; the sums in float32 over the unrounded gradients, in an order that only `parts` fixes.
// Algorithm  A thread owns eight columns, keeps their biases (backward: their sums) in registers and walks down the rows: every tensor is
//            read or written once, by 16-byte accesses where cols and the pointers allow, one element at a time otherwise.
// Measured   not yet by itself; correct on an H100 in random cases.
#include "activation.cuh"

#include <primitives/launch.cuh>

#include "device_guard.cuh"
#include "elements.cuh"
#include "library.h"
#include "philox.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int64_t WALKERS = 1 << 17;  // threads that fill any device

struct Walk {
    int64_t rows, cols;
    int64_t walkers;  // row walkers: number w takes rows w, w + walkers, ...
};

struct Place {
    int64_t column, walker;
    int count;  // elements of the thread's chunk that exist

    __device__ explicit Place(const Walk &walk)
        : column((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * CHUNK),
          walker(static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y) {
        const int64_t left = walk.cols - column;
        count = left < CHUNK ? static_cast<int>(left) : CHUNK;
    }
};

template <bool VECTOR>
__device__ __forceinline__ Chunk load_or_zero(const Elements &from, int64_t at, int count) {
    return from ? load_chunk<VECTOR>(from, at, count) : Chunk{};
}

// factor[i] = 1 without dropout, else 0 or the scale of what is kept.
__device__ __forceinline__ void hidden_factors(const Dropout &dropout, int64_t row, int64_t column, float (&factor)[CHUNK]) {
    if (dropout) {
        keep_factors_alone(dropout, static_cast<uint64_t>(dropout.seed.get(0)), static_cast<uint32_t>(row), column, factor);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++) factor[i] = 1.0f;
}

struct Forward {
    Elements gate, gate_bias, up, up_bias, h, gate_out, up_out;
    Dropout dropout;
};

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) activation_forward_kernel(Forward tensors, Walk walk, int activation) {
    const Place place(walk);
    if (place.count <= 0) return;
    const Chunk gate_bias = load_or_zero<VECTOR>(tensors.gate_bias, place.column, place.count);
    const Chunk up_bias = load_or_zero<VECTOR>(tensors.up_bias, place.column, place.count);
    for (int64_t row = place.walker; row < walk.rows; row += walk.walkers) {
        const int64_t at = row * walk.cols + place.column;
        const RawChunk raw_gate = load_raw<VECTOR>(tensors.gate, at, place.count);
        const RawChunk raw_up = tensors.up ? load_raw<VECTOR>(tensors.up, at, place.count) : RawChunk{};
        Chunk gate = widen(raw_gate, tensors.gate.dtype()), up = widen(raw_up, tensors.gate.dtype()), h;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            gate.at[i] += gate_bias.at[i];
            up.at[i] = tensors.up ? up.at[i] + up_bias.at[i] : 1.0f;
        }
        with_activation(activation, [&](auto code) {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) h.at[i] = activate<decltype(code)::value>(gate.at[i]) * up.at[i];
        });
        if (tensors.dropout) {
            float factor[CHUNK];
            hidden_factors(tensors.dropout, row, place.column, factor);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) h.at[i] = factor[i] == 0.0f ? 0.0f : h.at[i] * factor[i];
        }
        if (tensors.gate_out) store_chunk<VECTOR>(tensors.gate_out, at, place.count, gate);
        if (tensors.up_out) store_chunk<VECTOR>(tensors.up_out, at, place.count, up);
        store_chunk<VECTOR>(tensors.h, at, place.count, h);
    }
}

struct Backward {
    Elements grad_h, gate, up, grad_gate, grad_up, h, gate_sums, up_sums;
    Dropout dropout;
};

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) activation_backward_kernel(Backward tensors, Walk walk, int activation) {
    const Place place(walk);
    if (place.count <= 0 || place.walker >= walk.walkers) return;
    Chunk gate_sum = {}, up_sum = {};
    for (int64_t row = place.walker; row < walk.rows; row += walk.walkers) {
        const int64_t at = row * walk.cols + place.column;
        const RawChunk raw_grad = load_raw<VECTOR>(tensors.grad_h, at, place.count);
        const RawChunk raw_gate = tensors.gate ? load_raw<VECTOR>(tensors.gate, at, place.count) : RawChunk{};
        const RawChunk raw_up = tensors.up ? load_raw<VECTOR>(tensors.up, at, place.count) : RawChunk{};
        const int dtype = tensors.grad_h.dtype();
        const Chunk gate = widen(raw_gate, dtype);
        Chunk grad = widen(raw_grad, dtype);
        float factor[CHUNK];
        hidden_factors(tensors.dropout, row, place.column, factor);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) grad.at[i] *= factor[i];
        Chunk up = widen(raw_up, dtype), grad_gate, activated;
        with_activation(activation, [&](auto code) {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                if (!tensors.up) up.at[i] = 1.0f;
                grad_gate.at[i] = grad.at[i] * up.at[i] * activate_derivative<decltype(code)::value>(gate.at[i]);
                activated.at[i] = activate<decltype(code)::value>(gate.at[i]);
            }
        });
        Chunk grad_up, h;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            grad_up.at[i] = grad.at[i] * activated.at[i];
            h.at[i] = activated.at[i] * up.at[i] * factor[i];
            gate_sum.at[i] += grad_gate.at[i];
            up_sum.at[i] += grad_up.at[i];
        }
        if (tensors.grad_gate) store_chunk<VECTOR>(tensors.grad_gate, at, place.count, grad_gate);
        if (tensors.grad_up) store_chunk<VECTOR>(tensors.grad_up, at, place.count, grad_up);
        if (tensors.h) store_chunk<VECTOR>(tensors.h, at, place.count, h);
    }
    const int64_t at = place.walker * walk.cols + place.column;
    if (tensors.gate_sums) store_chunk<VECTOR>(tensors.gate_sums, at, place.count, gate_sum);
    if (tensors.up_sums) store_chunk<VECTOR>(tensors.up_sums, at, place.count, up_sum);
}

// walk.walkers is what is wanted; it grows to whole blocks only where no sums hang on it.
Launch shape(const char *name, const Walk &walk, void *stream) {
    const int64_t chunks = (walk.cols + CHUNK - 1) / CHUNK;
    int across = 1;
    while (across < THREADS && across < chunks) across *= 2;
    const int down = THREADS / across;
    const auto columns = static_cast<unsigned>((chunks + across - 1) / across);
    const auto rows = static_cast<unsigned>((walk.walkers + down - 1) / down);
    return {name, dim3(columns, rows), dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), 0, stream};
}

int64_t walkers(int64_t rows, int64_t cols) {
    const int64_t chunks = (cols + CHUNK - 1) / CHUNK, wanted = chunks < WALKERS ? WALKERS / chunks : 1;
    const int64_t most = rows < 65535 ? rows : 65535;
    return wanted < most ? wanted : most;
}

template <typename... Tensors>
bool all_vectors(int64_t cols, const Tensors &...tensors) {
    return cols % CHUNK == 0 && (tensors.aligned() && ...);
}

}  // namespace

extern "C" int fastattn_cuda_activation_forward(const fastattn_cuda_activation *call) {
    if (call->rows == 0 || call->cols == 0) return cudaSuccess;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    const int64_t size = call->rows * call->cols;
    const auto tensor = [&](const void *data, int64_t count) { return Elements(data, call->dtype, count); };
    const Forward tensors = {tensor(call->gate, size), tensor(call->gate_bias, call->cols), tensor(call->up, size),
                             tensor(call->up_bias, call->cols), tensor(call->h, size), tensor(call->gate_out, size),
                             tensor(call->up_out, size), Dropout(call->dropout)};
    const Walk walk = {call->rows, call->cols, walkers(call->rows, call->cols)};
    const Launch how = shape("activation_forward", walk, call->stream);
    const Walk whole = {walk.rows, walk.cols, static_cast<int64_t>(how.grid.y) * how.block.y};
    const bool vector = all_vectors(call->cols, tensors.gate, tensors.gate_bias, tensors.up, tensors.up_bias, tensors.h,
                                    tensors.gate_out, tensors.up_out);
    return launch<THREADS>(how, vector ? activation_forward_kernel<true> : activation_forward_kernel<false>, tensors, whole, call->activation);
}

extern "C" int64_t fastattn_cuda_activation_backward_parts(int64_t rows, int64_t cols) { return cols == 0 ? 0 : walkers(rows, cols); }

extern "C" int fastattn_cuda_activation_backward(const fastattn_cuda_activation_gradient *call) {
    if (call->rows == 0 || call->cols == 0) return cudaSuccess;
    const DeviceGuard guard(call->device);
    if (guard.error() != cudaSuccess) return guard.error();
    const int64_t size = call->rows * call->cols;
    const Walk walk = {call->rows, call->cols, walkers(call->rows, call->cols)};
    const auto tensor = [&](const void *data) { return Elements(data, call->dtype, size); };
    const auto sums = [&](const void *data) { return Elements(data, FASTATTN_FLOAT32, walk.walkers * call->cols); };
    const Backward tensors = {tensor(call->grad_h), tensor(call->gate), tensor(call->up), tensor(call->grad_gate), tensor(call->grad_up),
                              tensor(call->h), sums(call->grad_gate_parts), sums(call->grad_up_parts),
                              Dropout(call->dropout)};
    const bool vector = all_vectors(call->cols, tensors.grad_h, tensors.gate, tensors.up, tensors.grad_gate, tensors.grad_up,
                                    tensors.h, tensors.gate_sums, tensors.up_sums);
    return launch<THREADS>(shape("activation_backward", walk, call->stream),
                           vector ? activation_backward_kernel<true> : activation_backward_kernel<false>, tensors, walk, call->activation);
}
