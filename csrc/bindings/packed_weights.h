// Weights that are kept packed (fastattn.prepack): the only thing that outlives a call. Nothing here computes.
//
// Python says which memory holds weights that may be kept. The first product that multiplies by one, with rows enough for its kernel to read it
// packed, packs it as it lies there, be it a part of a tensor or a transposed one; the next ones read that. All of it happens under the interpreter's
// lock.
#pragma once
#include <Python.h>

#include <array>
#include <memory>

#include "../common/problem.h"

// What a kernel reads stays until it is done, whoever forgets the weight meanwhile.
using PackedWeight = std::shared_ptr<const void>;

// B of the product, a weight, as it is kept: sets product.packed, which the result keeps; nothing where it is not to be kept or has changed.
PackedWeight take_packed(fastattn_gemm &product);

// The same of the six weights of a layer.
std::array<PackedWeight, 6> take_packed(fastattn_encoder_layer &layer);

// Adds keep_packed, forget_packed, packed_changed, packed_state, keeps_packed and packs; false with a Python error set.
bool add_packed(PyObject *module);
