// fastattn._cuda: libfastattn_cuda.so for Python. Pointers come as integers; no arithmetic here.
//
// Every call releases the GIL; a CUDA error becomes a RuntimeError that names the call, the error and the shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/library.h"
#include "views.h"

namespace py = pybind11;

namespace {

void check(int error, const std::string &call) {
    if (error != 0) throw std::runtime_error(call + ": " + fastattn_cuda_error_text(error));
}

std::vector<std::string> architectures() {
    std::stringstream joined(fastattn_cuda_architectures());
    std::vector<std::string> names;
    for (std::string name; std::getline(joined, name, ',');) names.push_back(name);
    return names;
}

std::vector<fastattn_cuda_device> query_devices() {
    const py::gil_scoped_release unlocked;
    int count = 0;
    check(fastattn_cuda_device_count(&count), "counting the CUDA devices");
    std::vector<fastattn_cuda_device> devices(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) check(fastattn_cuda_device_query(i, &devices[i]), "asking CUDA device " + std::to_string(i));
    return devices;
}

py::list devices() {
    py::list result;
    for (const auto &device : query_devices()) {
        py::dict row;
        row["name"] = std::string(device.name);
        row["capability"] = py::make_tuple(device.capability_major, device.capability_minor);
        row["multiprocessors"] = device.multiprocessors;
        row["memory_bytes"] = device.memory_bytes;
        result.append(row);
    }
    return result;
}

// rows x columns, dtype and device of a failed call, behind its name.
std::string call_of(const char *name, std::int64_t rows, std::int64_t cols, int dtype, int device) {
    return std::string(name) + " on cuda:" + std::to_string(device) + " with " + std::to_string(rows) + " x " + std::to_string(cols) +
           " elements (dtype " + std::to_string(dtype) + ")";
}

// seed pointer, threshold, scale of what is kept
using Dropout = std::tuple<std::uintptr_t, std::uint32_t, float>;

fastattn_cuda_dropout dropout_of(const Dropout &dropout) {
    return {pointer<const std::int64_t>(std::get<0>(dropout)), std::get<1>(dropout), std::get<2>(dropout)};
}

void activation_forward(std::uintptr_t gate, std::uintptr_t gate_bias, std::uintptr_t up, std::uintptr_t up_bias, std::uintptr_t h,
                        std::uintptr_t gate_out, std::uintptr_t up_out, int dtype, int activation, std::int64_t rows, std::int64_t cols,
                        const Dropout &dropout, int device, std::uintptr_t stream) {
    fastattn_cuda_activation call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.dtype = dtype;
    call.activation = activation;
    call.rows = rows;
    call.cols = cols;
    call.gate = pointer<const void>(gate);
    call.gate_bias = pointer<const void>(gate_bias);
    call.up = pointer<const void>(up);
    call.up_bias = pointer<const void>(up_bias);
    call.h = pointer<void>(h);
    call.gate_out = pointer<void>(gate_out);
    call.up_out = pointer<void>(up_out);
    call.dropout = dropout_of(dropout);
    const py::gil_scoped_release unlocked;
    const int error = fastattn_cuda_activation_forward(&call);
    if (error != 0) check(error, call_of("activation_forward", rows, cols, dtype, device));
}

void activation_backward(std::uintptr_t grad_h, std::uintptr_t gate, std::uintptr_t up, std::uintptr_t grad_gate, std::uintptr_t grad_up,
                         std::uintptr_t h, std::uintptr_t grad_gate_parts, std::uintptr_t grad_up_parts, int dtype, int activation,
                         std::int64_t rows, std::int64_t cols, const Dropout &dropout, int device, std::uintptr_t stream) {
    fastattn_cuda_activation_gradient call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.dtype = dtype;
    call.activation = activation;
    call.rows = rows;
    call.cols = cols;
    call.grad_h = pointer<const void>(grad_h);
    call.gate = pointer<const void>(gate);
    call.up = pointer<const void>(up);
    call.grad_gate = pointer<void>(grad_gate);
    call.grad_up = pointer<void>(grad_up);
    call.h = pointer<void>(h);
    call.grad_gate_parts = pointer<float>(grad_gate_parts);
    call.grad_up_parts = pointer<float>(grad_up_parts);
    call.dropout = dropout_of(dropout);
    const py::gil_scoped_release unlocked;
    const int error = fastattn_cuda_activation_backward(&call);
    if (error != 0) check(error, call_of("activation_backward", rows, cols, dtype, device));
}

void norm_forward(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t z, std::uintptr_t y,
                  std::uintptr_t mean, std::uintptr_t rstd, const std::tuple<int, int, int, int, int> &dtypes, bool is_rms, std::int64_t rows,
                  std::int64_t width, float eps, float offset, const Dropout &dropout, int device, std::uintptr_t stream) {
    fastattn_cuda_norm call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.is_rms = is_rms;
    call.rows = rows;
    call.width = width;
    std::tie(call.x_dtype, call.residual_dtype, call.z_dtype, call.weight_dtype, call.bias_dtype) = dtypes;
    call.x = pointer<const void>(x);
    call.residual = pointer<const void>(residual);
    call.weight = pointer<const void>(weight);
    call.bias = pointer<const void>(bias);
    call.z = pointer<void>(z);
    call.y = pointer<void>(y);
    call.mean = pointer<float>(mean);
    call.rstd = pointer<float>(rstd);
    call.eps = eps;
    call.offset = offset;
    call.dropout = dropout_of(dropout);
    const py::gil_scoped_release unlocked;
    const int error = fastattn_cuda_norm_forward(&call);
    if (error != 0) check(error, call_of("norm_forward", rows, width, call.x_dtype, device));
}

void norm_backward(std::uintptr_t grad_y, std::uintptr_t grad_z, std::uintptr_t z, std::uintptr_t weight, std::uintptr_t mean, std::uintptr_t rstd,
                   std::uintptr_t grad_x, std::uintptr_t grad_residual, std::uintptr_t grad_weight, std::uintptr_t grad_bias,
                   std::uintptr_t parts_of_sums, const std::tuple<int, int, int, int, int> &dtypes, bool is_rms, std::int64_t rows, std::int64_t width, std::int64_t parts, float offset,
                   const Dropout &dropout, int device, std::uintptr_t stream) {
    fastattn_cuda_norm_gradient call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.is_rms = is_rms;
    call.rows = rows;
    call.width = width;
    std::tie(call.x_dtype, call.z_dtype, call.weight_dtype, call.grad_weight_dtype, call.grad_bias_dtype) = dtypes;
    call.grad_y = pointer<const void>(grad_y);
    call.grad_z = pointer<const void>(grad_z);
    call.z = pointer<const void>(z);
    call.weight = pointer<const void>(weight);
    call.mean = pointer<const float>(mean);
    call.rstd = pointer<const float>(rstd);
    call.grad_x = pointer<void>(grad_x);
    call.grad_residual = pointer<void>(grad_residual);
    call.grad_weight = pointer<void>(grad_weight);
    call.grad_bias = pointer<void>(grad_bias);
    call.parts = parts;
    call.parts_of_sums = pointer<float>(parts_of_sums);
    call.offset = offset;
    call.dropout = dropout_of(dropout);
    const py::gil_scoped_release unlocked;
    const int error = fastattn_cuda_norm_backward(&call);
    if (error != 0) check(error, call_of("norm_backward", rows, width, call.x_dtype, device));
}

fastattn_cuda_attention attention_call(int kernels, int dtype, const Sizes &sizes, const Packed &packed, const View &q, const View &k, const View &v,
                                       const View &out, std::uintptr_t lse, const Mask &m, std::int64_t n_blocks, std::int64_t n_bitmaps,
                                       const View &bias, int bias_dtype, const Distance &distance, std::uintptr_t sinks, float scale, float softcap,
                                       const Dropout &dropout, int device, std::uintptr_t stream) {
    fastattn_cuda_attention call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.kernels = kernels;
    call.dtype = dtype;
    std::tie(call.batch, call.heads_q, call.heads_kv, call.len_q, call.len_k, call.dim_qk, call.dim_v) = std::tuple_cat(sizes);
    call.cu_seqlens_q = pointer<const std::int32_t>(packed[0]), call.cu_seqlens_k = pointer<const std::int32_t>(packed[1]);
    call.rows_q = packed[2], call.rows_k = packed[3];
    call.q = tensor(q), call.k = tensor(k), call.v = tensor(v), call.out = tensor(out);
    call.lse = pointer<float>(lse);
    call.mask = mask(m);
    call.n_blocks = n_blocks;
    call.n_bitmaps = n_bitmaps;
    call.bias = tensor(bias);
    call.bias_dtype = bias_dtype;
    call.distance = distance_bias(distance);
    call.sinks = pointer<const float>(sinks);
    call.scale = scale;
    call.softcap = softcap;
    call.dropout = dropout_of(dropout);
    return call;
}

void check_attention(int error, const char *name, const fastattn_cuda_attention &call) {
    if (error == 0) return;
    std::ostringstream text;
    text << name << " on cuda:" << call.device << " with q (" << call.batch << ", " << call.heads_q << ", " << call.len_q << ", " << call.dim_qk
         << ") and v (" << call.batch << ", " << call.heads_kv << ", " << call.len_k << ", " << call.dim_v << ")"
         << (call.cu_seqlens_q ? ", packed," : "") << " (dtype " << call.dtype << ")";
    check(error, text.str());
}

void attention_forward(int kernels, int dtype, const Sizes &sizes, const Packed &packed, const View &q, const View &k, const View &v, const View &out,
                       std::uintptr_t lse, const Mask &m, std::int64_t n_blocks, std::int64_t n_bitmaps, const View &bias, int bias_dtype,
                       const Distance &distance, std::uintptr_t sinks, float scale, float softcap, const Dropout &dropout, int device,
                       std::uintptr_t stream) {
    const fastattn_cuda_attention call = attention_call(kernels, dtype, sizes, packed, q, k, v, out, lse, m, n_blocks, n_bitmaps, bias, bias_dtype, distance,
                                                        sinks, scale, softcap, dropout, device, stream);
    const py::gil_scoped_release unlocked;
    check_attention(fastattn_cuda_attention_forward(&call), "attention_forward", call);
}

using Transpose = std::tuple<View, View, std::uintptr_t, std::uintptr_t>;  // bounds of intervals; of blocks col_ptr, row, row_id

void attention_backward(int kernels, int dtype, const Sizes &sizes, const Packed &packed, const View &q, const View &k, const View &v, const View &out,
                        std::uintptr_t lse, const Mask &m, std::int64_t n_blocks, std::int64_t n_bitmaps, const View &bias, int bias_dtype,
                        const Distance &distance, std::uintptr_t sinks, float scale, float softcap, const Dropout &dropout, int device,
                        std::uintptr_t stream, const Transpose &transpose, const View &grad_out, const View &grad_q, const View &grad_k,
                        const View &grad_v, std::uintptr_t grad_lse, std::uintptr_t norm, std::uintptr_t centre, std::uintptr_t sink_terms,
                        float tolerance) {
    fastattn_cuda_attention_gradient from{};
    from.call = attention_call(kernels, dtype, sizes, packed, q, k, v, out, lse, m, n_blocks, n_bitmaps, bias, bias_dtype, distance, sinks, scale, softcap,
                               dropout, device, stream);
    const auto &[bounds, col_ptr, row, row_id] = transpose;
    from.bounds = tensor(bounds), from.col_ptr = tensor(col_ptr);
    from.block_row = pointer<const std::int32_t>(row), from.block_row_id = pointer<const std::int32_t>(row_id);
    from.grad_out = tensor(grad_out), from.grad_q = tensor(grad_q), from.grad_k = tensor(grad_k), from.grad_v = tensor(grad_v);
    from.grad_lse = pointer<const float>(grad_lse);
    from.norm = pointer<float>(norm), from.centre = pointer<float>(centre), from.sink_terms = pointer<float>(sink_terms);
    from.tolerance = tolerance;
    const py::gil_scoped_release unlocked;
    check_attention(fastattn_cuda_attention_backward(&from), "attention_backward", from.call);
}

// parts, keys of one, and room for their sums and statistics
using Parts = std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>;

void attention_decode(int dtype, const DecodeSizes &sizes, const View &q, const View &k, const View &v, const View &out, std::uintptr_t lse,
                      std::int64_t entries, std::uintptr_t cache_lengths, const Pages &pages, const Band &band, const View &intervals,
                      std::int64_t n_intervals, const View &bias, int bias_dtype, const Distance &distance, std::uintptr_t sinks, float scale,
                      float softcap, const Parts &parts, int device, std::uintptr_t stream) {
    fastattn_cuda_decode call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.problem = decode(dtype, sizes, q, k, v, out, lse, cache_lengths, pages, band, intervals, n_intervals, bias, bias_dtype, distance, sinks, scale,
                          softcap);
    call.entries = entries;
    call.parts = std::get<0>(parts), call.part_keys = std::get<1>(parts);
    call.sums = pointer<float>(std::get<2>(parts)), call.statistics = pointer<float>(std::get<3>(parts));
    const py::gil_scoped_release unlocked;
    const int error = fastattn_cuda_attention_decode(&call);
    if (error == 0) return;
    const fastattn_decode &problem = call.problem;
    std::ostringstream name;
    name << "attention_decode on cuda:" << device << " with q (" << problem.batch << ", " << problem.heads_q << ", " << problem.len_q << ", "
         << problem.dim_qk << ") and a cache of " << problem.heads_kv << " heads and " << problem.max_length << " keys (dtype " << dtype << ")";
    check(error, name.str());
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "libfastattn_cuda.so: pointers in, CUDA kernels on the given device and stream.";
    module.def("architectures", &architectures, "The architectures of the compiled kernels, such as ['sm_80', 'sm_90', 'compute_80'].");
    module.def("devices", &devices, "name, capability, multiprocessors and memory_bytes of each device; RuntimeError without a driver.");
    module.def("activation_forward", &activation_forward, py::arg("gate"), py::arg("gate_bias"), py::arg("up"), py::arg("up_bias"), py::arg("h"),
               py::arg("gate_out"), py::arg("up_out"), py::arg("dtype"), py::arg("activation"), py::arg("rows"), py::arg("cols"),
               py::arg("dropout"), py::arg("device"), py::arg("stream"),
               "h = dropout(act(gate + gate_bias) * (up + up_bias)); a pointer of 0 is absent.");
    module.def("activation_backward_parts", &fastattn_cuda_activation_backward_parts, py::arg("rows"), py::arg("cols"),
               "How many rows of partial sums activation_backward writes.");
    module.def("activation_backward", &activation_backward, py::arg("grad_h"), py::arg("gate"), py::arg("up"), py::arg("grad_gate"),
               py::arg("grad_up"), py::arg("h"), py::arg("grad_gate_parts"), py::arg("grad_up_parts"), py::arg("dtype"), py::arg("activation"),
               py::arg("rows"), py::arg("cols"), py::arg("dropout"), py::arg("device"), py::arg("stream"),
               "The gradients of activation_forward; 0 is absent.");
    module.def("norm_forward", &norm_forward, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("z"), py::arg("y"),
               py::arg("mean"), py::arg("rstd"), py::arg("dtypes"), py::arg("is_rms"), py::arg("rows"), py::arg("width"), py::arg("eps"),
               py::arg("offset"), py::arg("dropout"), py::arg("device"), py::arg("stream"), "y = norm(dropout(x) + residual).");
    module.def("norm_backward_parts", &fastattn_cuda_norm_backward_parts, py::arg("rows"), py::arg("width"), py::arg("multiprocessors"),
               "How many rows of partial weight and bias gradients norm_backward should sum up.");
    module.def("norm_backward", &norm_backward, py::arg("grad_y"), py::arg("grad_z"), py::arg("z"), py::arg("weight"), py::arg("mean"),
               py::arg("rstd"), py::arg("grad_x"), py::arg("grad_residual"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("parts_of_sums"),
               py::arg("dtypes"), py::arg("is_rms"), py::arg("rows"), py::arg("width"), py::arg("parts"), py::arg("offset"), py::arg("dropout"),
               py::arg("device"), py::arg("stream"), "The gradients of norm_forward; 0 is absent.");
    module.def("attention_forward", &attention_forward, py::arg("kernels"), py::arg("dtype"), py::arg("sizes"), py::arg("packed"), py::arg("q"), py::arg("k"),
               py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("mask"), py::arg("n_blocks"), py::arg("n_bitmaps"), py::arg("bias"),
               py::arg("bias_dtype"), py::arg("distance"), py::arg("sinks"), py::arg("scale"), py::arg("softcap"), py::arg("dropout"),
               py::arg("device"), py::arg("stream"),
               "out and lse of one attention call; kernels: 80 or 90; sizes are batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v.");
    module.def("attention_backward", &attention_backward, py::arg("kernels"), py::arg("dtype"), py::arg("sizes"), py::arg("packed"), py::arg("q"), py::arg("k"),
               py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("mask"), py::arg("n_blocks"), py::arg("n_bitmaps"), py::arg("bias"),
               py::arg("bias_dtype"), py::arg("distance"), py::arg("sinks"), py::arg("scale"), py::arg("softcap"), py::arg("dropout"),
               py::arg("device"), py::arg("stream"), py::arg("transpose"), py::arg("grad_out"), py::arg("grad_q"), py::arg("grad_k"),
               py::arg("grad_v"), py::arg("grad_lse"), py::arg("norm"), py::arg("centre"), py::arg("sink_terms"), py::arg("tolerance"),
               "The gradients of attention_forward, whose out and lse are given; 0 is absent. norm, centre: room for a float of each row.");
    module.def("attention_decode", &attention_decode, py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
               py::arg("lse"), py::arg("entries"), py::arg("cache_lengths"), py::arg("pages"), py::arg("band"), py::arg("intervals"),
               py::arg("n_intervals"), py::arg("bias"), py::arg("bias_dtype"), py::arg("distance"), py::arg("sinks"), py::arg("scale"),
               py::arg("softcap"), py::arg("parts"), py::arg("device"), py::arg("stream"),
               "out and lse over a key-value cache of `entries` batch entries or pages; sizes are batch, heads_q, heads_kv, len_q, dim_qk, dim_v, "
               "max_length.");
}
