// fastattn._cpu: the C functions of libfastattn_cpu.so as Python functions. Pointers and strides in, no arithmetic here.
//
// A tensor is (data_ptr, stride, ...) with up to four strides in elements, or None; a pointer is an int, 0 for none. Every call releases the GIL,
// those that read weights once they know which of them are kept packed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/library.h"
#include "direct.h"
#include "packed_weights.h"
#include "views.h"

namespace py = pybind11;

namespace {

void check(int status) {
    if (status != FASTATTN_OK) throw std::runtime_error(fastattn_status_text(status));
}

using Dropout = std::tuple<uint64_t, uint32_t, float>;  // seed, threshold, keep_scale

fastattn_dropout dropout(const Dropout &d) { return {std::get<0>(d), std::get<1>(d), std::get<2>(d)}; }

fastattn_attention attention(int dtype, int n_threads, const Sizes &sizes, const Packed &packed, const View &q, const View &k, const View &v,
                             const View &out, int64_t lse, const Mask &m, const View &bias, int bias_dtype, const Distance &distance, int64_t sinks,
                             float scale, float softcap, const Dropout &d) {
    fastattn_attention p{};
    p.dtype = dtype;
    p.n_threads = n_threads;
    p.batch = sizes[0], p.heads_q = sizes[1], p.heads_kv = sizes[2];
    p.len_q = sizes[3], p.len_k = sizes[4], p.dim_qk = sizes[5], p.dim_v = sizes[6];
    p.cu_seqlens_q = pointer<int32_t>(packed[0]), p.cu_seqlens_k = pointer<int32_t>(packed[1]);
    p.rows_q = packed[2], p.rows_k = packed[3];
    p.q = tensor(q), p.k = tensor(k), p.v = tensor(v), p.out = tensor(out);
    p.lse = pointer<float>(lse);
    p.mask = mask(m);
    p.bias = tensor(bias);
    p.bias_dtype = bias_dtype;
    p.distance = distance_bias(distance);
    p.sinks = pointer<float>(sinks);
    p.scale = scale;
    p.softcap = softcap;
    p.dropout = dropout(d);
    return p;
}

void attention_forward(int dtype, int n_threads, const Sizes &sizes, const Packed &packed, const View &q, const View &k, const View &v, const View &out,
                       int64_t lse, const Mask &m, const View &bias, int bias_dtype, const Distance &distance, int64_t sinks, float scale, float softcap,
                       const Dropout &d) {
    const fastattn_attention p =
        attention(dtype, n_threads, sizes, packed, q, k, v, out, lse, m, bias, bias_dtype, distance, sinks, scale, softcap, d);
    check(fastattn_cpu_attention_forward(&p));
}

void attention_backward(int dtype, int n_threads, const Sizes &sizes, const Packed &packed, const View &q, const View &k, const View &v, const View &out,
                        int64_t lse, const Mask &m, const View &bias, int bias_dtype, const Distance &distance, int64_t sinks, float scale, float softcap,
                        const Dropout &d, const View &grad_out, int64_t grad_lse, const View &grad_q, const View &grad_k, const View &grad_v,
                        const View &grad_bias, int64_t grad_table, int64_t grad_slopes, int64_t grad_sinks) {
    fastattn_attention p = attention(dtype, n_threads, sizes, packed, q, k, v, out, lse, m, bias, bias_dtype, distance, sinks, scale, softcap, d);
    p.grad_out = tensor(grad_out);
    p.grad_lse = pointer<float>(grad_lse);
    p.grad_q = tensor(grad_q), p.grad_k = tensor(grad_k), p.grad_v = tensor(grad_v);
    p.grad_bias = tensor(grad_bias);
    p.distance.grad_table = pointer<float>(grad_table), p.distance.grad_slopes = pointer<float>(grad_slopes);
    p.grad_sinks = pointer<float>(grad_sinks);
    check(fastattn_cpu_attention_backward(&p));
}

void attention_decode(int dtype, int n_threads, const DecodeSizes &sizes, const View &q, const View &k, const View &v, const View &out, int64_t lse,
                      int64_t cache_lengths, const Pages &pages, const Band &band, const View &intervals, int64_t n_intervals, const View &bias,
                      int bias_dtype, const Distance &distance, int64_t sinks, float scale, float softcap) {
    fastattn_decode p = decode(dtype, sizes, q, k, v, out, lse, cache_lengths, pages, band, intervals, n_intervals, bias, bias_dtype, distance, sinks,
                               scale, softcap);
    p.n_threads = n_threads;
    check(fastattn_cpu_attention_decode(&p));
}

// is_weight: whether b is one that may be kept packed.
void gemm(int dtype, int n_threads, int64_t m, int64_t n, int64_t k, const View &a, const View &b, const View &c, int64_t bias, int bias_dtype,
          int activation, const View &pre, const View &multiplier, const Dropout &d, bool rounds_float32, bool is_weight) {
    fastattn_gemm p{};
    p.dtype = dtype;
    p.n_threads = n_threads;
    p.m = m, p.n = n, p.k = k;
    p.a = tensor(a), p.b = tensor(b), p.c = tensor(c);
    p.bias = pointer<void>(bias);
    p.bias_dtype = bias_dtype;
    p.activation = activation;
    p.pre = tensor(pre);
    p.multiplier = tensor(multiplier);
    p.dropout = dropout(d);
    p.rounds_float32 = rounds_float32;
    const PackedWeight kept = is_weight ? take_packed(p) : nullptr;
    const py::gil_scoped_release release;
    check(fastattn_cpu_gemm(&p));
}

void activation_backward(int dtype, int n_threads, int activation, int64_t rows, int64_t cols, int64_t grad_h, int64_t gate, int64_t up,
                         int64_t grad_gate, int64_t grad_up, int64_t h, int64_t grad_gate_sum, int64_t grad_up_sum, const Dropout &d) {
    fastattn_activation_backward p{};
    p.dtype = dtype;
    p.n_threads = n_threads;
    p.activation = activation;
    p.rows = rows, p.cols = cols;
    p.grad_h = pointer<void>(grad_h), p.gate = pointer<void>(gate), p.up = pointer<void>(up);
    p.grad_gate = pointer<void>(grad_gate), p.grad_up = pointer<void>(grad_up), p.h = pointer<void>(h);
    p.grad_gate_sum = pointer<float>(grad_gate_sum), p.grad_up_sum = pointer<float>(grad_up_sum);
    p.dropout = dropout(d);
    check(fastattn_cpu_activation_backward(&p));
}

using NormDtypes = std::array<int, 5>;  // x, residual, z, weight, bias

fastattn_norm norm(bool is_rms, int n_threads, int64_t rows, int64_t width, const NormDtypes &dtypes, int64_t z, int64_t weight, int64_t mean,
                   int64_t rstd, float offset, const Dropout &d) {
    fastattn_norm p{};
    p.is_rms = is_rms;
    p.n_threads = n_threads;
    p.rows = rows, p.width = width;
    p.x_dtype = dtypes[0], p.residual_dtype = dtypes[1], p.z_dtype = dtypes[2], p.weight_dtype = dtypes[3], p.bias_dtype = dtypes[4];
    p.z = pointer<void>(z), p.weight = pointer<void>(weight);
    p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
    p.offset = offset;
    p.dropout = dropout(d);
    return p;
}

void norm_forward(bool is_rms, int n_threads, int64_t rows, int64_t width, const NormDtypes &dtypes, int64_t z, int64_t weight, int64_t mean,
                  int64_t rstd, float offset, const Dropout &d, int64_t x, int64_t residual, int64_t bias, int64_t y, float eps) {
    fastattn_norm p = norm(is_rms, n_threads, rows, width, dtypes, z, weight, mean, rstd, offset, d);
    p.x = pointer<void>(x), p.residual = pointer<void>(residual), p.bias = pointer<void>(bias);
    p.y = pointer<void>(y);
    p.eps = eps;
    check(fastattn_cpu_norm_forward(&p));
}

void norm_backward(bool is_rms, int n_threads, int64_t rows, int64_t width, const NormDtypes &dtypes, int64_t z, int64_t weight, int64_t mean,
                   int64_t rstd, float offset, const Dropout &d, int64_t grad_y, int64_t grad_z, int64_t grad_x, int64_t grad_residual,
                   int64_t grad_weight, int64_t grad_bias) {
    fastattn_norm p = norm(is_rms, n_threads, rows, width, dtypes, z, weight, mean, rstd, offset, d);
    p.grad_y = pointer<void>(grad_y), p.grad_z = pointer<void>(grad_z);
    p.grad_x = pointer<void>(grad_x), p.grad_residual = pointer<void>(grad_residual);
    p.grad_weight = pointer<float>(grad_weight), p.grad_bias = pointer<float>(grad_bias);
    check(fastattn_cpu_norm_backward(&p));
}

using Linear = std::array<int64_t, 2>;                        // weight, bias
using LayerNorm = std::tuple<int64_t, int64_t, int, int, float>;  // weight, bias, their dtypes, eps

fastattn_linear linear(const Linear &l) { return {pointer<void>(l[0]), pointer<void>(l[1]), nullptr}; }

fastattn_layer_norm layer_norm(const LayerNorm &n) {
    const auto &[weight, bias, weight_dtype, bias_dtype, eps] = n;
    return {pointer<void>(weight), pointer<void>(bias), weight_dtype, bias_dtype, eps};
}

using LayerSizes = std::array<int64_t, 6>;  // batch, len, rows, heads, embed, hidden

void encoder_layer_forward(int dtype, int n_threads, int activation, bool norm_first, const LayerSizes &sizes, int64_t cu_seqlens, int64_t x, int64_t y,
                           const std::array<Linear, 6> &linears, const LayerNorm &norm1, const LayerNorm &norm2, float scale, const Mask &m,
                           bool rounds_float32) {
    fastattn_encoder_layer p{};
    p.dtype = dtype;
    p.n_threads = n_threads;
    p.activation = activation;
    p.norm_first = norm_first;
    p.rounds_float32 = rounds_float32;
    p.batch = sizes[0], p.len = sizes[1], p.rows = sizes[2], p.heads = sizes[3], p.embed = sizes[4], p.hidden = sizes[5];
    p.cu_seqlens = pointer<int32_t>(cu_seqlens);
    p.x = pointer<void>(x), p.y = pointer<void>(y);
    p.q = linear(linears[0]), p.k = linear(linears[1]), p.v = linear(linears[2]);
    p.out = linear(linears[3]), p.up = linear(linears[4]), p.down = linear(linears[5]);
    p.norm1 = layer_norm(norm1), p.norm2 = layer_norm(norm2);
    p.scale = scale;
    p.mask = mask(m);
    const auto kept = take_packed(p);
    const py::gil_scoped_release release;
    check(fastattn_cpu_encoder_layer_forward(&p));
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (int i = 0; const char *name = fastattn_cpu_available_isa(i); i++) names.push_back(name);
    return names;
}

bool multiplies_rounded() {
    fastattn_gemm p{};
    p.dtype = FASTATTN_FLOAT32, p.rounds_float32 = true;
    return fastattn_cpu_gemm_is_rounded(&p) != 0;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Kernels of libfastattn_cpu.so; see csrc/common/problem.h for what the arguments mean.";
    const auto release = py::call_guard<py::gil_scoped_release>();
    module.def("isa", [] { return std::string(fastattn_cpu_isa()); });
    module.def("available_isas", available_isas);
    module.def("multiplies_rounded", multiplies_rounded);
    module.def("set_isa", [](const std::string &name) { return fastattn_cpu_set_isa(name.c_str()); });
    module.def("attention_forward", attention_forward, release);
    module.def("attention_backward", attention_backward, release);
    module.def("attention_decode", attention_decode, release);
    module.def("gemm", gemm);
    module.def("activation_backward", activation_backward, release);
    module.def("norm_forward", norm_forward, release);
    module.def("norm_backward", norm_backward, release);
    module.def("encoder_layer_forward", encoder_layer_forward);
    if (!add_direct(module.ptr()) || !add_packed(module.ptr())) throw py::error_already_set();
}
