// The kernels as they are for AArch64, on x86-64: vectors of four lanes and no intrinsics at all. For tests only.
//
// Included ahead of a kernel source (-include): the headers it needs are read first, then x86-64 is forgotten.
#pragma once
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef __x86_64__
#undef __SSE2__
