// A processor that has every instruction set: included ahead of csrc/cpu/library.cpp (-include), whose kernels are emulated. For tests only.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

static long granted(...) { return 0; }

#define __builtin_cpu_supports(name) true
#define syscall granted
