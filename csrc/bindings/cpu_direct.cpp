// The short way from tensors to a kernel: calls that need nothing but the kernel, checked and run by one C function.
//
// A small call spends its time in Python, on checks, on the choice of a backend and on reading tensors. Each function here does all of that for the
// plain case: float tensors of a CPU in one dtype, as they lie in memory, shapes that fit, nothing that wants a gradient, and nobody who watches
// operators (compilers, modes, transforms, tracers, profilers, autocast). It returns None for any other call, wrong ones too; the long way of
// fastattn.functional runs then, which knows the rest and has the words for every error. So nothing here may answer what the long way refuses, or
// answer otherwise.
//
// Tensors are read through DLPack's exchange API, a table of C functions that torch offers from 2.10 on: no headers of torch, no libtorch.
//
// us of processor time a call, of few elements, the long way, the short way, torch's own functions; one core of an AMD EPYC (Zen 5, VM), torch
// 2.13.0, inference mode, 2026-11-27:
//   rms_norm               8.4  3.4  7.1    ffn                    17.7  4.5  10.1    causal, 32 queries   29.0  6.5  10.8
//   layer_norm             9.6  3.4  2.0    gated_ffn              19.9  5.0   6.6    bool mask            27.6  5.8  12.2
//   linear_act            10.4  3.3  2.1    attention, one query   17.6  4.2   3.9    an encoder layer     89.3 53.9  69.8 (its module's checks: 35)
// A Llama of 110 million parameters in bfloat16 takes 0.88 of the time it took for each token it generates, one of 10 million or one 0.77.
#include "direct.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../cpu/library.h"
#include "dlpack.h"
#include "packed_weights.h"

namespace {

// ---- what Python hands over, once -----------------------------------------------------------------------------------------------------------------

struct Torch {
    PyTypeObject *tensor, *parameter;
    ReadTensor read;
    PyObject *watchers;    // a tuple of functions, each of which says false where nobody watches
    PyObject *forward_ad;  // dict of torch.autograd.forward_ad
    // Functions about the stack of function modes, and the classes of those that may be lifted.
    PyObject *has_mode, *pop_mode, *push_mode;
    PyObject *transparent;  // a tuple
    PyObject *grad_enabled, *num_threads;
    PyObject *matmul_precision;  // says "bf16" where torch may round float32
    PyObject *activations;  // dict of their numbers
    long few_queries;       // up to which attention is the kernel for decoding's
    long often_read;        // queries of a key, from which on its rows have to lie side by side
};
Torch torch{};
PyObject *kNewEmpty, *kNewEmptyStrided, *kIsCpu, *kIsNeg, *kRequiresGrad, *kCurrentLevel;  // names

// For a call that goes the long way: None, and no error left behind. So nothing here may call a function written in Python: what a handler of signals
// raises, as for Ctrl-C, would be raised within it, and lost.
PyObject *long_way() {
    PyErr_Clear();
    Py_RETURN_NONE;
}

bool says_yes(PyObject *answer) {
    const bool yes = answer == Py_True;
    Py_XDECREF(answer);
    return yes;
}

bool says_no(PyObject *answer) {
    const bool no = answer == Py_False;
    Py_XDECREF(answer);
    return no;
}

// Whether a function without arguments says true; an error counts as that.
bool says_true(PyObject *function) {
    PyObject *answer = PyObject_CallNoArgs(function);
    const bool truth = !answer || PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return truth;
}

// Whether forward-mode derivatives are taken, by any thread.
bool has_tangents() {
    PyObject *level = PyDict_GetItemWithError(torch.forward_ad, kCurrentLevel);
    return !level || !PyLong_Check(level) || PyLong_AsLong(level) != -1;
}

bool is_watched() {
    if (has_tangents()) return true;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); i++)
        if (says_true(PyTuple_GET_ITEM(torch.watchers, i))) return true;
    return false;
}

int num_threads() {
    PyObject *answer = PyObject_CallNoArgs(torch.num_threads);
    const long n = answer ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    if (n < 1) PyErr_Clear();
    return n < 1 ? 1 : int(n);
}

// Whether operands of products of this dtype may be rounded, as torch's are then.
bool rounds_float32(int dtype) {
    if (dtype != FASTATTN_FLOAT32) return false;
    PyObject *answer = PyObject_CallNoArgs(torch.matmul_precision);
    const bool rounds = answer && PyUnicode_Check(answer) && PyUnicode_CompareWithASCIIString(answer, "bf16") == 0;
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return rounds;
}

// A Python float that float32 holds.
bool read_number(PyObject *object, float &number) {
    if (!PyFloat_CheckExact(object)) return false;
    const double value = PyFloat_AS_DOUBLE(object);
    number = float(value);
    return std::fabs(value) <= FLT_MAX;
}

bool read_activation(PyObject *name, int &activation) {
    activation = FASTATTN_ACT_NONE;
    if (name == Py_None) return true;
    if (!PyUnicode_CheckExact(name)) return false;  // others may have their own idea of what they are equal to
    PyObject *number = PyDict_GetItemWithError(torch.activations, name);
    if (number) activation = int(PyLong_AsLong(number));
    return number != nullptr;
}

// ---- tensors --------------------------------------------------------------------------------------------------------------------------------------

constexpr int kInt32 = 3, kBool = 4;  // beside fastattn_dtype

int dtype_of(const DLPackTensor &t) {
    if (t.lanes != 1) return -1;
    if (t.code == kDLPackFloat) return t.bits == 32 ? FASTATTN_FLOAT32 : t.bits == 16 ? FASTATTN_FLOAT16 : -1;
    if (t.code == kDLPackBfloat) return t.bits == 16 ? FASTATTN_BFLOAT16 : -1;
    if (t.code == kDLPackInt) return t.bits == 32 ? kInt32 : -1;
    return t.code == kDLPackBool && t.bits == 8 ? kBool : -1;
}

constexpr int kMostDims = 8;
constexpr int64_t kMostElements = int64_t{1} << 50;  // further sizes and strides that are made of so many do not overflow

// The product of two sizes that are not negative; beyond kMostElements it may be any number beyond.
int64_t times(int64_t a, int64_t b) {
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

// A tensor that is not given has no data. Shape and strides are copies: what runs while a result is made, another thread or a finaliser that the
// garbage collector calls, may give the tensor others, and the memory that the result gets has to be that which the kernel fills.
struct Tensor {
    void *data = nullptr;
    int dtype = 0;
    int dims = 0;
    int64_t shape[kMostDims], strides[kMostDims];

    bool is_float() const { return dtype < kInt32; }
    int64_t last() const { return shape[dims - 1]; }
    int64_t rows() const {
        int64_t product = 1;
        for (int i = 0; i < dims - 1; i++) product = times(product, shape[i]);
        return product;
    }
    bool is_contiguous() const {
        int64_t step = 1;
        for (int i = dims - 1; i >= 0; step *= shape[i--])
            if (shape[i] != 1 && strides[i] != step) return false;
        return true;
    }
    bool has_shape_of(const Tensor &other) const { return dims == other.dims && !std::memcmp(shape, other.shape, size_t(dims) * sizeof *shape); }
};

// Reads a plain tensor of a CPU that has elements, and whose elements are what its memory holds; false for any other.
bool read(PyObject *object, Tensor &tensor) {
    if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
    DLPackTensor t;
    if (torch.read(object, &t) != 0) return false;
    tensor.data = static_cast<char *>(t.data) + t.byte_offset, tensor.dtype = dtype_of(t), tensor.dims = t.dims;
    if (t.device_type != kDLPackCpu || tensor.dtype < 0 || t.dims < 1 || t.dims > kMostDims || !t.data || !t.shape || !t.strides) return false;
    for (int i = 0; i < t.dims; i++) {
        tensor.shape[i] = t.shape[i], tensor.strides[i] = t.strides[i];
        if (tensor.shape[i] < 1) return false;
    }
    return says_no(PyObject_CallMethodNoArgs(object, kIsNeg));
}

// One call: whether it may run here, and its tensors. While there is one, the function modes that it found are lifted.
class Call {
  public:
    // With a first tensor of a GPU nothing else is asked. One that a transform wraps is not read: that would raise an error of C++, which takes half
    // a millisecond.
    explicit Call(PyObject *first) {
        if (!torch.read || (Py_TYPE(first) != torch.tensor && Py_TYPE(first) != torch.parameter) || !lift_modes()) return;
        runs_ = says_yes(PyObject_GetAttr(first, kIsCpu)) && !is_watched();
        tracks_ = runs_ && says_true(torch.grad_enabled);
    }
    ~Call() {
        while (lifted_ > 0) {
            Py_XDECREF(PyObject_CallOneArg(torch.push_mode, modes_[--lifted_]));
            Py_DECREF(modes_[lifted_]);
        }
    }
    Call(const Call &) = delete;
    Call &operator=(const Call &) = delete;
    bool runs() const { return runs_; }

    // Any tensor, in the layout that it has.
    bool any(PyObject *object, Tensor &tensor) const {
        return read(object, tensor) && !(tracks_ && !says_no(PyObject_GetAttr(object, kRequiresGrad)));
    }
    // A float tensor whose elements follow one another.
    bool dense(PyObject *object, Tensor &tensor) const { return any(object, tensor) && tensor.is_float() && tensor.is_contiguous(); }
    // One number per feature, or nothing.
    bool features(PyObject *object, int64_t n, Tensor &tensor) const {
        return object == Py_None || (dense(object, tensor) && tensor.dims == 1 && tensor.shape[0] == n);
    }
    // A weight (N, K) of x's dtype whose rows or columns do not overlap, and its bias (N).
    bool linear(PyObject *weight_object, PyObject *bias_object, int dtype, int64_t in_features, Tensor &weight, Tensor &bias) const {
        if (!any(weight_object, weight) || weight.dtype != dtype || weight.dims != 2 || weight.shape[1] != in_features) return false;
        const int64_t down = weight.strides[0], across = weight.strides[1];
        if (!(across == 1 && down >= weight.shape[1]) && !(down == 1 && across >= weight.shape[0])) return false;
        return features(bias_object, weight.shape[0], bias) && (!bias.data || bias.dtype == dtype);
    }

  private:
    // Takes the modes that see nothing of a kernel from the stack, in which methods of tensors would look for them; false where there are others.
    bool lift_modes() {
        while (says_true(torch.has_mode)) {
            if (lifted_ == kMostModes) return false;
            PyObject *mode = PyObject_CallNoArgs(torch.pop_mode);
            if (!mode) return false;
            modes_[lifted_++] = mode;
            if (!is_transparent(mode)) return false;
        }
        return true;
    }

    static bool is_transparent(PyObject *mode) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.transparent); i++) {
            PyObject *kind = PyTuple_GET_ITEM(torch.transparent, i);
            if (PyType_Check(kind) && PyType_IsSubtype(Py_TYPE(mode), reinterpret_cast<PyTypeObject *>(kind))) return true;
        }
        return false;
    }

    static constexpr int kMostModes = 2;
    bool runs_ = false, tracks_ = false;
    PyObject *modes_[kMostModes];
    int lifted_ = 0;
};

// A new reference, or null with an error set, as of all functions of Python.
PyObject *tuple_of(const int64_t *numbers, int n) {
    PyObject *tuple = PyTuple_New(n);
    for (int i = 0; tuple && i < n; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (number)
            PyTuple_SET_ITEM(tuple, i, number);
        else
            Py_CLEAR(tuple);
    }
    return tuple;
}

// An empty tensor beside `like`, of its dtype: of the shape of `x` but `features` in the last dimension.
PyObject *empty_like(PyObject *like, const Tensor &x, int64_t features, Tensor &result) {
    int64_t shape[kMostDims];
    std::memcpy(shape, x.shape, sizeof shape);
    shape[x.dims - 1] = features;
    PyObject *sizes = tuple_of(shape, x.dims);
    PyObject *made = sizes ? PyObject_CallMethodOneArg(like, kNewEmpty, sizes) : nullptr;
    Py_XDECREF(sizes);
    if (made && !read(made, result)) Py_CLEAR(made);
    return made;
}

// Memory for what no one sees; null where there is none, or no such amount.
class Scratch {
  public:
    Scratch(int64_t elements, int dtype)
        : data_(elements < 1 || elements > kMostElements
                    ? nullptr
                    : std::aligned_alloc(64, (size_t(elements) * (dtype == FASTATTN_FLOAT32 ? 4 : 2) + 63) / 64 * 64)) {}
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    void *data() const { return data_; }

  private:
    void *data_;
};

// Runs a kernel, or several, without the interpreter's lock.
template <class Kernels>
bool run(const Kernels &kernels) {
    PyThreadState *state = PyEval_SaveThread();
    const int status = kernels();
    PyEval_RestoreThread(state);
    return status == FASTATTN_OK;
}

// ---- the calls ------------------------------------------------------------------------------------------------------------------------------------

// norm(x, weight, bias, residual, is_rms, eps, offset): y, or with a residual y and z.
PyObject *norm(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (n != 7) return long_way();
    const Call call(args[0]);
    if (!call.runs()) return long_way();
    Tensor x, weight, bias, residual, y, z;
    fastattn_norm p{};
    if (!call.dense(args[0], x)) return long_way();
    if (!call.features(args[1], x.last(), weight) || !call.features(args[2], x.last(), bias)) return long_way();
    if (args[3] != Py_None && !(call.dense(args[3], residual) && residual.has_shape_of(x))) return long_way();
    for (const Tensor *other : {&weight, &bias, &residual})
        if (other->data && other->dtype != x.dtype && other->dtype != FASTATTN_FLOAT32) return long_way();
    p.is_rms = args[4] == Py_True;
    p.eps = FLT_EPSILON;
    if (args[5] != Py_None && !(read_number(args[5], p.eps) && p.eps >= 0)) return long_way();
    if (!read_number(args[6], p.offset)) return long_way();
    p.n_threads = num_threads();
    p.rows = x.rows(), p.width = x.last();
    p.x_dtype = x.dtype, p.residual_dtype = residual.dtype, p.weight_dtype = weight.dtype, p.bias_dtype = bias.dtype;
    p.x = x.data, p.residual = residual.data, p.weight = weight.data, p.bias = bias.data;
    // The sum's dtype holds both: that of the one in float32, if either is.
    const bool residual_is_wider = residual.data && residual.dtype == FASTATTN_FLOAT32;
    PyObject *y_object = empty_like(args[0], x, x.last(), y);
    PyObject *z_object = y_object && residual.data ? empty_like(args[residual_is_wider ? 3 : 0], x, x.last(), z) : nullptr;
    p.z_dtype = residual.data ? z.dtype : x.dtype;
    p.y = y.data, p.z = z.data;
    if (!y_object || (residual.data && !z_object) || !run([&] { return fastattn_cpu_norm_forward(&p); })) {
        Py_XDECREF(y_object), Py_XDECREF(z_object);
        return long_way();
    }
    return z_object ? Py_BuildValue("(NN)", y_object, z_object) : y_object;
}

// act(x weight^T + bias) of rows in the weight's dtype that follow one another.
fastattn_gemm product(int threads, void *x, int64_t rows, const Tensor &weight, const Tensor &bias, int activation, void *y) {
    fastattn_gemm p{};
    p.dtype = weight.dtype, p.n_threads = threads;
    p.m = rows, p.n = weight.shape[0], p.k = weight.shape[1];
    p.a = {x, {p.k, 1}};
    p.b = {weight.data, {weight.strides[1], weight.strides[0]}};
    p.c = {y, {p.n}};
    p.bias = bias.data, p.bias_dtype = bias.dtype, p.activation = activation;
    p.rounds_float32 = rounds_float32(p.dtype);
    return p;
}

// linear_act(x, weight, bias, activation): y.
PyObject *linear_act(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (n != 4) return long_way();
    const Call call(args[0]);
    if (!call.runs()) return long_way();
    Tensor x, weight, bias, y;
    int activation;
    if (!call.dense(args[0], x) || !read_activation(args[3], activation)) return long_way();
    if (!call.linear(args[1], args[2], x.dtype, x.last(), weight, bias)) return long_way();
    PyObject *made = empty_like(args[0], x, weight.shape[0], y);
    if (!made) return long_way();
    fastattn_gemm p = product(num_threads(), x.data, x.rows(), weight, bias, activation, y.data);
    const PackedWeight kept = take_packed(p);
    if (run([&] { return fastattn_cpu_gemm(&p); })) return made;
    Py_DECREF(made);
    return long_way();
}

// ffn(x, w1, b1, w2, b2, activation): y. gated_ffn(x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation): y.
PyObject *feed_forward(PyObject *const *args, bool gated) {
    const Call call(args[0]);
    if (!call.runs()) return long_way();
    Tensor x, w1, b1, w_up, b_up, w2, b2, y;
    int activation;
    PyObject *const *last = args + (gated ? 5 : 3);
    if (!call.dense(args[0], x) || !read_activation(last[2], activation)) return long_way();
    if (!call.linear(args[1], args[2], x.dtype, x.last(), w1, b1)) return long_way();
    const int64_t rows = x.rows(), hidden = w1.shape[0];
    if (gated && !(call.linear(args[3], args[4], x.dtype, x.last(), w_up, b_up) && w_up.shape[0] == hidden)) return long_way();
    if (!call.linear(last[0], last[1], x.dtype, hidden, w2, b2)) return long_way();
    const Scratch h(times(rows, hidden), x.dtype), up(gated ? times(rows, hidden) : 0, x.dtype);
    PyObject *made = h.data() && (up.data() || !gated) ? empty_like(args[0], x, w2.shape[0], y) : nullptr;
    if (!made) return long_way();
    const int threads = num_threads();
    fastattn_gemm first = product(threads, x.data, rows, w1, b1, activation, h.data()), multiplier{};
    fastattn_gemm second = product(threads, h.data(), rows, w2, b2, FASTATTN_ACT_NONE, y.data);
    if (gated) {
        multiplier = product(threads, x.data, rows, w_up, b_up, FASTATTN_ACT_NONE, up.data());
        first.multiplier = {up.data(), {hidden}};
    }
    const PackedWeight kept[] = {take_packed(first), take_packed(second), gated ? take_packed(multiplier) : nullptr};
    const bool done = run([&] {
        int status = gated ? fastattn_cpu_gemm(&multiplier) : FASTATTN_OK;
        if (status == FASTATTN_OK) status = fastattn_cpu_gemm(&first);
        return status == FASTATTN_OK ? fastattn_cpu_gemm(&second) : status;
    });
    if (done) return made;
    Py_DECREF(made);
    return long_way();
}

PyObject *ffn(PyObject *, PyObject *const *args, Py_ssize_t n) { return n == 6 ? feed_forward(args, false) : long_way(); }
PyObject *gated_ffn(PyObject *, PyObject *const *args, Py_ssize_t n) { return n == 8 ? feed_forward(args, true) : long_way(); }

fastattn_tensor heads(const Tensor &t) { return {t.data, {t.strides[0], t.strides[1], t.strides[2]}}; }

// Queries, keys or values (B, H, S, D) whose rows are contiguous.
bool take_heads(const Call &call, PyObject *object, Tensor &t) {
    return call.any(object, t) && t.is_float() && t.dims == 4 && (t.strides[3] == 1 || t.shape[3] == 1) && t.shape[3] <= 256 &&
           t.shape[2] < int64_t{1} << 30;
}

// An empty output (B, Hq, Sq, Dv), (B, Sq, Hq, Dv) in memory.
PyObject *empty_out(PyObject *like, const Tensor &q, int64_t dim, Tensor &out) {
    const int64_t row = q.shape[1] * dim, shape[] = {q.shape[0], q.shape[1], q.shape[2], dim}, strides[] = {q.shape[2] * row, dim, row, 1};
    PyObject *args[] = {like, tuple_of(shape, 4), tuple_of(strides, 4)};
    PyObject *made = args[1] && args[2] ? PyObject_VectorcallMethod(kNewEmptyStrided, args, 3, nullptr) : nullptr;
    Py_XDECREF(args[1]), Py_XDECREF(args[2]);
    if (made && !read(made, out)) Py_CLEAR(made);
    return made;
}

// Whether rows that are read often lie far apart: they are copied then.
bool wants_copy(const Tensor &t) { return t.strides[2] != t.shape[3] && t.shape[2] > 1; }

// The view of a tensor that broadcasts to `full`, with strides 0 where it does; false where it does not.
bool broadcast(const Tensor &t, const int64_t (&full)[4], fastattn_tensor &view) {
    const int lead = 4 - t.dims;
    if (lead < 0) return false;
    view = {t.data, {}};
    for (int i = 0; i < t.dims; i++) {
        if (t.shape[i] != 1 && t.shape[i] != full[lead + i]) return false;
        view.stride[lead + i] = t.shape[i] == 1 ? 0 : t.strides[i];
    }
    return true;
}

// attention(q, k, v, mask, align, grouped, scale): out. mask: None, a bool tensor (True is visible) or a float one that is added, which broadcast to
// (B, Hq, Sq, Skv), or int32 (1|B, 1|Hq, Sq, 2), a range of keys for each query. align: None, or causal from the "top-left" or the "bottom-right".
// grouped: whether heads of keys may be fewer than of queries.
PyObject *attention(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (n != 7) return long_way();
    const Call call(args[0]);
    if (!call.runs()) return long_way();
    Tensor q, k, v, mask, out;
    if (!take_heads(call, args[0], q) || !take_heads(call, args[1], k) || !take_heads(call, args[2], v)) return long_way();
    if (q.dtype != k.dtype || q.dtype != v.dtype || q.shape[0] != k.shape[0] || q.shape[3] != k.shape[3]) return long_way();
    const int64_t rows = q.rows(), batch = q.shape[0], heads_q = q.shape[1], heads_kv = k.shape[1], len_q = q.shape[2], len_k = k.shape[2];
    if (std::memcmp(k.shape, v.shape, 3 * sizeof *k.shape) != 0 || heads_q % heads_kv) return long_way();
    if (heads_q != heads_kv && args[5] != Py_True) return long_way();
    if (rows > kMostElements) return long_way();  // views may pretend to that many
    float scale = float(1.0 / std::sqrt(double(q.shape[3])));
    if (args[6] != Py_None && !read_number(args[6], scale)) return long_way();
    const bool is_causal = args[4] != Py_None;
    if (is_causal && (args[3] != Py_None || !PyUnicode_Check(args[4]))) return long_way();
    const int64_t from_end = len_k - len_q;
    const int64_t offset = is_causal && PyUnicode_CompareWithASCIIString(args[4], "bottom-right") == 0 ? from_end : 0;
    const bool decodes = len_q <= torch.few_queries && from_end >= 0 && (!is_causal || offset == from_end);
    fastattn_tensor hidden{}, added{}, ranges{};
    if (args[3] != Py_None) {
        if (!call.any(args[3], mask)) return long_way();
        const int64_t scores[] = {batch, heads_q, len_q, len_k}, of_queries[] = {batch, heads_q, len_q, 2};
        if (mask.dtype == kInt32) {
            if (!decodes || mask.dims != 4 || mask.shape[2] != len_q || mask.shape[3] != 2 || mask.strides[3] != 1) return long_way();
            if (!broadcast(mask, of_queries, ranges)) return long_way();
        } else if (mask.dtype == kBool) {
            if (!broadcast(mask, scores, hidden)) return long_way();
        } else if ((mask.dtype != q.dtype && mask.dtype != FASTATTN_FLOAT32) || !broadcast(mask, scores, added)) {
            return long_way();
        }
    }
    if (!decodes && len_q * (heads_q / heads_kv) >= torch.often_read && (wants_copy(k) || wants_copy(v))) return long_way();
    const Scratch lse(rows, FASTATTN_FLOAT32);
    PyObject *made = lse.data() ? empty_out(args[0], q, v.shape[3], out) : nullptr;
    if (!made) return long_way();
    // Both kernels' descriptions name these fields alike.
    const auto describe = [&](auto &p) {
        p.dtype = q.dtype, p.n_threads = num_threads();
        p.batch = batch, p.heads_q = heads_q, p.heads_kv = heads_kv, p.len_q = len_q, p.dim_qk = q.shape[3], p.dim_v = v.shape[3];
        p.q = heads(q), p.k = heads(k), p.v = heads(v), p.out = heads(out);
        p.lse = static_cast<float *>(lse.data());
        p.bias = added, p.bias_dtype = mask.dtype;
        p.scale = scale;
    };
    fastattn_decode few{};
    fastattn_attention many{};
    if (decodes) {
        describe(few);
        few.max_length = len_k;
        few.band_has_right = is_causal;
        few.dense = hidden;
        // Four strides: of the one set of ranges, then those before the two bounds.
        few.intervals = {ranges.data, {0, ranges.stride[0], ranges.stride[1], ranges.stride[2]}};
        few.n_intervals = ranges.data ? 1 : 0;
    } else {
        describe(many);
        many.len_k = len_k;
        many.mask.band_offset = offset, many.mask.band_has_right = is_causal;
        many.mask.dense = hidden;
        many.dropout.keep_scale = 1;
    }
    if (run([&] { return decodes ? fastattn_cpu_attention_decode(&few) : fastattn_cpu_attention_forward(&many); })) return made;
    Py_DECREF(made);
    return long_way();
}

// A weight (N, K) by rows and its bias (N), all of one dtype.
bool take_linear(const Call &call, PyObject *const *pair, int dtype, int64_t n, int64_t k, fastattn_linear &linear) {
    Tensor weight, bias;
    if (!call.dense(pair[0], weight) || weight.dtype != dtype || weight.dims != 2 || weight.shape[0] != n || weight.shape[1] != k) return false;
    if (!call.features(pair[1], n, bias) || (bias.data && bias.dtype != dtype)) return false;
    linear = {weight.data, bias.data, nullptr};
    return true;
}

bool take_norm(const Call &call, PyObject *const *pair, PyObject *eps, int dtype, int64_t width, fastattn_layer_norm &norm) {
    Tensor weight, bias;
    if (!call.features(pair[0], width, weight) || !call.features(pair[1], width, bias)) return false;
    for (const Tensor *t : {&weight, &bias})
        if (t->data && t->dtype != dtype && t->dtype != FASTATTN_FLOAT32) return false;
    norm = {weight.data, bias.data, weight.dtype, bias.dtype, 0};
    return read_number(eps, norm.eps) && norm.eps >= 0;
}

// encoder_layer(x, wq, bq, wk, bk, wv, bv, wo, bo, norm1_weight, norm1_bias, w1, b1, w2, b2, norm2_weight, norm2_bias, heads, activation, norm_first,
// eps1, eps2, mask, scale): y. mask: None, or a bool tensor as in attention.
PyObject *encoder_layer(PyObject *, PyObject *const *args, Py_ssize_t n) {
    if (n != 24) return long_way();
    const Call call(args[0]);
    if (!call.runs()) return long_way();
    Tensor x, w1, mask, y;
    if (!call.dense(args[0], x) || x.dims != 3 || !read(args[11], w1)) return long_way();
    fastattn_encoder_layer p{};
    const int64_t embed = x.last(), hidden = w1.shape[0];
    const long heads = PyLong_CheckExact(args[17]) ? PyLong_AsLong(args[17]) : 0;
    if (heads < 1 || embed % heads || embed / heads > 256 || x.shape[1] >= int64_t{1} << 30) return long_way();
    if (args[19] != Py_True && args[19] != Py_False) return long_way();
    p.scale = float(1.0 / std::sqrt(double(embed / heads)));
    if (!read_activation(args[18], p.activation) || (args[23] != Py_None && !read_number(args[23], p.scale))) return long_way();
    if (!take_linear(call, args + 1, x.dtype, embed, embed, p.q) || !take_linear(call, args + 3, x.dtype, embed, embed, p.k) ||
        !take_linear(call, args + 5, x.dtype, embed, embed, p.v) || !take_linear(call, args + 7, x.dtype, embed, embed, p.out) ||
        !take_linear(call, args + 11, x.dtype, hidden, embed, p.up) || !take_linear(call, args + 13, x.dtype, embed, hidden, p.down) ||
        !take_norm(call, args + 9, args[20], x.dtype, embed, p.norm1) || !take_norm(call, args + 15, args[21], x.dtype, embed, p.norm2))
        return long_way();
    p.dtype = x.dtype, p.n_threads = num_threads(), p.norm_first = args[19] == Py_True, p.rounds_float32 = rounds_float32(x.dtype);
    p.batch = x.shape[0], p.len = x.shape[1], p.rows = x.rows(), p.heads = heads, p.embed = embed, p.hidden = hidden;
    const int64_t scores[] = {p.batch, heads, p.len, p.len};
    if (args[22] != Py_None && !(call.any(args[22], mask) && mask.dtype == kBool && broadcast(mask, scores, p.mask.dense))) return long_way();
    PyObject *made = empty_like(args[0], x, embed, y);
    if (!made) return long_way();
    p.x = x.data, p.y = y.data;
    const auto kept = take_packed(p);
    if (run([&] { return fastattn_cpu_encoder_layer_forward(&p); })) return made;
    Py_DECREF(made);
    return long_way();
}

// ---- the module -----------------------------------------------------------------------------------------------------------------------------------

// open(Tensor, Parameter, exchange capsule, watchers, forward_ad, has_mode, pop_mode, push_mode, transparent modes, is_grad_enabled, get_num_threads,
// matmul_precision, activations, few_queries, often_read): whether the calls above can run from now on, which they cannot with an exchange of another kind. They keep
// what they are given.
PyObject *open(PyObject *, PyObject *args) {
    Torch given{};
    PyObject *exchange;
    if (!PyArg_ParseTuple(args, "O!O!OO!O!OOOO!OOOO!ll", &PyType_Type, &given.tensor, &PyType_Type, &given.parameter, &exchange, &PyTuple_Type,
                          &given.watchers, &PyDict_Type, &given.forward_ad, &given.has_mode, &given.pop_mode, &given.push_mode, &PyTuple_Type,
                          &given.transparent, &given.grad_enabled, &given.num_threads, &given.matmul_precision, &PyDict_Type, &given.activations, &given.few_queries,
                          &given.often_read))
        return nullptr;
    if (!PyCapsule_IsValid(exchange, kDLPackExchangeName)) Py_RETURN_FALSE;
    auto *api = static_cast<DLPackExchange *>(PyCapsule_GetPointer(exchange, kDLPackExchangeName));
    while (api && api->major > kDLPackMajor) api = api->previous;
    if (!api || api->major != kDLPackMajor || !api->read) Py_RETURN_FALSE;
    for (PyObject *kept : {reinterpret_cast<PyObject *>(given.tensor), reinterpret_cast<PyObject *>(given.parameter), given.watchers,
                           given.forward_ad, given.has_mode, given.pop_mode, given.push_mode, given.transparent, given.grad_enabled,
                           given.num_threads, given.matmul_precision, given.activations})
        Py_INCREF(kept);
    given.read = api->read;
    torch = given;
    Py_RETURN_TRUE;
}

template <PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)>
PyMethodDef method(const char *name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef kMethods[] = {
    {"open_direct", open, METH_VARARGS, nullptr},
    method<norm>("direct_norm"),
    method<linear_act>("direct_linear_act"),
    method<ffn>("direct_ffn"),
    method<gated_ffn>("direct_gated_ffn"),
    method<attention>("direct_attention"),
    method<encoder_layer>("direct_encoder_layer"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_direct(PyObject *module) {
    const auto name = [](PyObject *&interned, const char *text) { return (interned = PyUnicode_InternFromString(text)) != nullptr; };
    return name(kNewEmpty, "new_empty") && name(kNewEmptyStrided, "new_empty_strided") && name(kIsCpu, "is_cpu") && name(kIsNeg, "is_neg") &&
           name(kRequiresGrad, "requires_grad") && name(kCurrentLevel, "_current_level") && PyModule_AddFunctions(module, kMethods) == 0;
}
