// The C interface of libfastattn_cpu.so.
#pragma once
#include "kernels.h"

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

FASTATTN_EXPORT const char *fastattn_status_text(int status);

// Instruction sets built into the library and offered by this machine, best first; null past the last.
FASTATTN_EXPORT const char *fastattn_cpu_available_isa(int index);
// The one in use: the best, or FASTATTN_CPU_ISA, or the last fastattn_cpu_set_isa().
FASTATTN_EXPORT const char *fastattn_cpu_isa(void);
// False when the name is not among the available ones.
FASTATTN_EXPORT bool fastattn_cpu_set_isa(const char *name);

#define FASTATTN_DECLARE_ENTRY(name, Problem) FASTATTN_EXPORT int fastattn_cpu_##name(const Problem *problem);
FASTATTN_KERNELS(FASTATTN_DECLARE_ENTRY)
#undef FASTATTN_DECLARE_ENTRY
