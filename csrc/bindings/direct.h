// The short way from tensors to a kernel (cpu_direct.cpp).
#pragma once
#include <Python.h>

// Adds open_direct, direct_norm, direct_linear_act, direct_ffn, direct_gated_ffn, direct_attention and direct_encoder_layer; false with a Python error set.
bool add_direct(PyObject *module);
