// See packed_weights.h.
//
// A weight is known by its address, which can be no other tensor's: for each piece of memory an alias is held, a tensor that shares storage and
// version counter with the parameter, and that has to lie there still (FSDP frees and fills storages). An operation that changes the parameter in
// place raises the counter, and what was packed before is forgotten. A parameter that is given other memory is not found under the old address. What
// writes past the counter (.data, NumPy, an operator that mutates more than its schema says) is seen where it reaches one of a few cache lines
// that are compared each time: a change of the whole weight is, one of a few rows may not be.
#include "packed_weights.h"

#include <stdlib.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/library.h"

namespace {

// One matrix as a product reads it, and the instruction set that it was packed for.
struct Key {
    const void *data;
    int64_t k, n, down, across;
    int32_t dtype, rounds_float32;
    const char *isa;
    bool operator==(const Key &) const = default;
};

struct Hash {
    size_t operator()(const Key &key) const { return std::hash<const void *>()(key.data) ^ size_t(key.n) * 31; }
};

struct Piece {
    PackedWeight memory;
    int64_t bytes;
};

// Who asked for a parameter to be kept, with an alias of it. A strong reference.
struct Holder {
    long id;
    PyObject *alias;
    long version;  // when the first piece was packed
};

// Cache lines from end to end of a weight: in bfloat16 a small step leaves most elements as they are, but hardly all of 256.
constexpr size_t kLine = 64, kLines = 8;
using Sample = std::array<char, kLine * kLines>;

constexpr int64_t kMostTimes = 4, kSmall = 1 << 20;  // of a parameter's own bytes, beside some for the smallest, in all of its pieces

// Memory of one parameter.
struct Kept {
    uintptr_t begin = 0, end = 0;
    std::vector<Holder> holders;
    std::unordered_map<Key, Piece, Hash> pieces;
    Sample sample{};       // when the first piece was packed
    bool changed = false;  // since pieces of it were packed, which are gone

    Sample sampled() const {
        Sample sample{};
        const size_t bytes = end - begin, each = bytes < kLine ? bytes : kLine;
        for (size_t i = 0; i < kLines; i++)
            std::memcpy(&sample[i * kLine], reinterpret_cast<const void *>(begin + (bytes - each) * i / (kLines - 1)), each);
        return sample;
    }
    // Whether there is room for one more piece: views of any extent may be multiplied by, a new one in each call.
    bool has_room(int64_t more) const {
        for (const auto &each : pieces) more += each.second.bytes;
        return more <= kMostTimes * int64_t(end - begin) + kSmall;
    }
    void note_change() {
        changed = changed || !pieces.empty();
        pieces.clear();
    }
};

using Registry = std::map<uintptr_t, std::shared_ptr<Kept>>;  // by the first address

// Never destroyed: the interpreter may be gone by then.
Registry &registry = *new Registry;
long last_id = 0;

PyObject *kVersion, *kDataPtr;  // names

// -1 where it does not lie at the address. Reading may run Python code, where a function mode is active: hold what is needed afterwards.
long version_of(PyObject *alias, uintptr_t address) {
    Py_INCREF(alias);
    PyObject *at = PyObject_CallMethodNoArgs(alias, kDataPtr), *answer = at ? PyObject_GetAttr(alias, kVersion) : nullptr;
    const bool lies_there = answer && PyLong_AsUnsignedLongLong(at) == address;
    const long version = lies_there ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(at), Py_XDECREF(answer);
    Py_DECREF(alias);
    if (version < 0) PyErr_Clear();
    return version;
}

// Notes a change since the first piece was packed, and forgets the pieces then.
void look(const std::shared_ptr<Kept> &kept) {
    for (size_t i = 0; !kept->pieces.empty() && i < kept->holders.size(); i++) {
        const long id = kept->holders[i].id, version = version_of(kept->holders[i].alias, kept->begin);
        const bool same = i < kept->holders.size() && kept->holders[i].id == id && kept->holders[i].version == version && version >= 0;
        if (!same) kept->note_change();
    }
    if (!kept->pieces.empty() && kept->sampled() != kept->sample) kept->note_change();
}

// Remembers the state in which the first piece is packed; false where the memory is no longer there.
bool start(const std::shared_ptr<Kept> &kept) {
    for (size_t i = 0; i < kept->holders.size(); i++) {
        const long version = version_of(kept->holders[i].alias, kept->begin);
        if (version < 0 || i >= kept->holders.size()) return false;
        kept->holders[i].version = version;
    }
    kept->sample = kept->sampled();
    return true;
}

// The memory that holds all of a matrix, or null.
std::shared_ptr<Kept> find(const Key &key) {
    const auto first = reinterpret_cast<uintptr_t>(key.data);
    auto after = registry.upper_bound(first);
    if (after == registry.begin()) return nullptr;
    const std::shared_ptr<Kept> kept = (--after)->second;
    const int64_t elements = (key.k - 1) * key.down + (key.n - 1) * key.across + 1;
    return first + uint64_t(elements) * (key.dtype == FASTATTN_FLOAT32 ? 4 : 2) <= kept->end ? kept : nullptr;
}

// Large pieces lie in large pages: a product by them is up to 1.07 times as fast (measured as gemm.cpp says; one row of A by 4,096 x 4,096 1.16).
std::shared_ptr<void> allocated(size_t bytes) {
    constexpr size_t kHugePage = size_t{1} << 21;
    const bool is_large = bytes >= 2 * kHugePage;
    void *memory = nullptr;
    if (posix_memalign(&memory, is_large ? kHugePage : 64, bytes) != 0) return nullptr;
#if defined(__linux__)
    if (is_large) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return {memory, std::free};
}

PackedWeight pack(const fastattn_gemm &product, int64_t bytes) {
    const std::shared_ptr<void> memory = allocated(size_t(bytes));
    const fastattn_packing packing{&product, nullptr, memory.get()};
    return memory && fastattn_cpu_pack(&packing) == FASTATTN_OK ? memory : nullptr;
}

}  // namespace

PackedWeight take_packed(fastattn_gemm &product) {
    if (registry.empty()) return nullptr;
    int64_t bytes = 0;
    const fastattn_packing question{&product, &bytes, nullptr};
    if (fastattn_cpu_packed_bytes(&question) != FASTATTN_OK || bytes == 0) return nullptr;
    const Key key{product.b.data, product.k, product.n, product.b.stride[0], product.b.stride[1], product.dtype, product.rounds_float32, fastattn_cpu_isa()};
    const std::shared_ptr<Kept> kept = find(key);
    if (!kept) return nullptr;
    look(kept);
    if (kept->changed) return nullptr;
    auto found = kept->pieces.find(key);
    if (found == kept->pieces.end()) {
        if (!kept->has_room(bytes) || (kept->pieces.empty() && !start(kept))) return nullptr;
        const PackedWeight memory = pack(product, bytes);
        if (!memory) return nullptr;
        found = kept->pieces.emplace(key, Piece{memory, bytes}).first;
    }
    product.packed = found->second.memory.get();
    return found->second.memory;
}

std::array<PackedWeight, 6> take_packed(fastattn_encoder_layer &layer) {
    std::array<PackedWeight, 6> taken;
    if (registry.empty() || !fastattn_cpu_encoder_layer_reads_packed(&layer)) return taken;
    const auto take = [&](fastattn_linear &linear, int64_t k, int64_t n) {
        fastattn_gemm product{};
        product.dtype = layer.dtype, product.n_threads = layer.n_threads, product.rounds_float32 = layer.rounds_float32;
        product.m = layer.rows, product.n = n, product.k = k;
        product.a.stride[1] = 1;
        product.b = {const_cast<void *>(linear.weight), {1, k}};
        PackedWeight packed = take_packed(product);
        linear.packed = product.packed;
        return packed;
    };
    const int64_t e = layer.embed, h = layer.hidden;
    return {take(layer.q, e, e), take(layer.k, e, e), take(layer.v, e, e), take(layer.out, e, e), take(layer.up, e, h), take(layer.down, h, e)};
}

// ---- the module -----------------------------------------------------------------------------------------------------------------------------------

namespace {

// keep_packed(alias, address, bytes): a number by which the memory is forgotten. The alias is a detached parameter, whose elements lie there. They are
// packed anew.
PyObject *keep(PyObject *, PyObject *args) {
    PyObject *alias;
    unsigned long long address, bytes;
    if (!PyArg_ParseTuple(args, "OKK", &alias, &address, &bytes)) return nullptr;
    const long version = version_of(alias, uintptr_t(address));
    const auto before = registry.find(uintptr_t(address));
    std::shared_ptr<Kept> kept = before == registry.end() ? std::make_shared<Kept>() : before->second;
    kept->pieces.clear();  // of what a change that was not seen has left behind, too
    kept->changed = false;
    kept->begin = uintptr_t(address);
    kept->end = kept->end < address + bytes ? uintptr_t(address + bytes) : kept->end;
    Py_INCREF(alias);
    kept->holders.push_back({++last_id, alias, version});
    registry[uintptr_t(address)] = kept;
    return PyLong_FromLong(last_id);
}

Registry::iterator find(long id) {
    for (auto each = registry.begin(); each != registry.end(); ++each)
        for (const Holder &holder : each->second->holders)
            if (holder.id == id) return each;
    return registry.end();
}

// forget_packed(number): whether there was one. With the last one of its memory what was packed goes.
PyObject *forget(PyObject *, PyObject *number) {
    const long id = PyLong_AsLong(number);
    if (id == -1 && PyErr_Occurred()) return nullptr;
    const auto at = find(id);
    if (at == registry.end()) Py_RETURN_FALSE;
    const std::shared_ptr<Kept> kept = at->second;
    PyObject *alias = nullptr;
    for (auto holder = kept->holders.begin(); holder != kept->holders.end(); ++holder)
        if (holder->id == id) {
            alias = holder->alias;
            kept->holders.erase(holder);
            break;
        }
    if (kept->holders.empty()) registry.erase(at);
    Py_DECREF(alias);
    Py_RETURN_TRUE;
}

// packed_changed(address, bytes): the memory from there on has changed, uncounted, and the weights that begin in it, or before and reach into it.
PyObject *note_change(PyObject *, PyObject *args) {
    unsigned long long address, bytes;
    if (!PyArg_ParseTuple(args, "KK", &address, &bytes)) return nullptr;
    const auto first = uintptr_t(address), last = uintptr_t(address + bytes);
    auto at = registry.upper_bound(first);
    if (at != registry.begin()) --at;
    for (; at != registry.end() && at->first < last; ++at)
        if (at->second->end > first) at->second->note_change();
    Py_RETURN_NONE;
}

// packed_state(number): how many matrices are packed, their bytes, and whether the weight has changed since some were; None of an unknown number.
PyObject *state(PyObject *, PyObject *number) {
    const long id = PyLong_AsLong(number);
    if (id == -1 && PyErr_Occurred()) return nullptr;
    const auto at = find(id);
    if (at == registry.end()) Py_RETURN_NONE;
    const std::shared_ptr<Kept> kept = at->second;
    look(kept);
    long long bytes = 0;
    for (const auto &each : kept->pieces) bytes += each.second.bytes;
    return Py_BuildValue("(nLN)", Py_ssize_t(kept->pieces.size()), bytes, PyBool_FromLong(kept->changed));
}

// keeps_packed(address): whether a weight that begins there is kept, or will be at its first call.
PyObject *keeps(PyObject *, PyObject *address) {
    if (registry.empty()) Py_RETURN_FALSE;
    const unsigned long long first = PyLong_AsUnsignedLongLong(address);
    if (PyErr_Occurred()) return nullptr;
    const std::shared_ptr<Kept> kept = find(Key{reinterpret_cast<const void *>(first), 1, 1, 1, 1, FASTATTN_BFLOAT16, 0, nullptr});
    return PyBool_FromLong(kept && !kept->changed);
}

// packs(dtype): whether weights of it are ever kept, with the instruction set in use.
PyObject *packs(PyObject *, PyObject *number) {
    const long dtype = PyLong_AsLong(number);
    if (dtype == -1 && PyErr_Occurred()) return nullptr;
    fastattn_gemm product{};
    product.dtype = int32_t(dtype), product.n_threads = 1;
    product.m = 64, product.n = product.k = 1024;
    product.a.stride[1] = product.b.stride[0] = 1, product.b.stride[1] = 1024;
    int64_t bytes = 0;
    const fastattn_packing question{&product, &bytes, nullptr};
    return PyBool_FromLong(fastattn_cpu_packed_bytes(&question) == FASTATTN_OK && bytes > 0);
}

PyMethodDef kMethods[] = {
    {"keep_packed", keep, METH_VARARGS, nullptr},
    {"forget_packed", forget, METH_O, nullptr},
    {"packed_changed", note_change, METH_VARARGS, nullptr},
    {"packed_state", state, METH_O, nullptr},
    {"keeps_packed", keeps, METH_O, nullptr},
    {"packs", packs, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_packed(PyObject *module) {
    kVersion = PyUnicode_InternFromString("_version"), kDataPtr = PyUnicode_InternFromString("data_ptr");
    return kVersion && kDataPtr && PyModule_AddFunctions(module, kMethods) == 0;
}
