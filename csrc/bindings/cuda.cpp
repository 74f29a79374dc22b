// fastattn._cuda: libfastattn_cuda.so for Python. Pointers come as integers; no arithmetic here.
//
// Every call releases the GIL; a CUDA error becomes a RuntimeError that names the call, the error and the shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/library.h"

namespace py = pybind11;

namespace {

template <typename T>
T *pointer(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

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

void linear_act(std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y, std::uintptr_t pre, int dtype, int activation, std::int64_t rows,
                std::int64_t cols, int device, std::uintptr_t stream) {
    fastattn_cuda_bias_act call{};
    call.device = device;
    call.stream = pointer<void>(stream);
    call.dtype = dtype;
    call.activation = activation;
    call.rows = rows;
    call.cols = cols;
    call.x = pointer<const void>(x);
    call.bias = pointer<const void>(bias);
    call.y = pointer<void>(y);
    call.pre = pointer<void>(pre);
    const py::gil_scoped_release unlocked;
    const int error = fastattn_cuda_linear_act(&call);
    if (error != 0) {
        check(error, "linear_act on cuda:" + std::to_string(device) + " with " + std::to_string(rows) + " x " + std::to_string(cols) +
                         " elements (dtype " + std::to_string(dtype) + ", activation " + std::to_string(activation) + ")");
    }
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "libfastattn_cuda.so: pointers in, CUDA kernels on the given device and stream.";
    module.def("architectures", &architectures, "The architectures of the compiled kernels, such as ['sm_80', 'sm_90', 'compute_90'].");
    module.def("devices", &devices, "name, capability, multiprocessors and memory_bytes of each device; RuntimeError without a driver.");
    module.def("linear_act", &linear_act, py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("pre"), py::arg("dtype"), py::arg("activation"),
               py::arg("rows"), py::arg("cols"), py::arg("device"), py::arg("stream"),
               "y = act(x + bias) and pre = x + bias over device pointers; bias and pre may be 0.");
}
