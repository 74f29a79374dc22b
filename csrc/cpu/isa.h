// One kernel source is compiled once per instruction set, each time into a namespace of its own (FASTATTN_ISA, set by the build).
//
// Only C headers and compiler intrinsics may be included by kernel sources: an inline function of a shared header or of the C++ library
// would exist once for the whole library, and the linker may keep the copy that was compiled for AVX-512 and run it on an older CPU.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../common/problem.h"

#ifndef FASTATTN_ISA
#error "compile with -DFASTATTN_ISA=<baseline|avx2|avx512|avx512bf16|amx|neon>"
#endif

#define FASTATTN_NAMESPACE_BEGIN \
    namespace fastattn_cpu {     \
    namespace FASTATTN_ISA {
#define FASTATTN_NAMESPACE_END \
    }                          \
    }

#define FASTATTN_INLINE static inline __attribute__((always_inline))
