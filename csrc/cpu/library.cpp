// The library's entry points: each calls the kernel of the instruction set in use.
//
// Compiled for the baseline; FASTATTN_HAS_<ISA> says which sets the build produced.
#include "library.h"

#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace fastattn_cpu {
namespace {

struct KernelTable {
    const char *name;
    bool (*offered)();
#define FASTATTN_MEMBER(name, Problem) int (*name)(const Problem &);
    FASTATTN_KERNELS(FASTATTN_MEMBER)
#undef FASTATTN_MEMBER
};

}  // namespace

#define FASTATTN_DECLARE(name, Problem) int name(const Problem &problem);
#define FASTATTN_ENTRY(name, Problem) name,
#define FASTATTN_TABLE(isa, condition)                                                                     \
    namespace isa {                                                                                        \
    FASTATTN_KERNELS(FASTATTN_DECLARE)                                                                     \
    static const KernelTable table = {#isa, [] { return bool(condition); }, FASTATTN_KERNELS(FASTATTN_ENTRY)}; \
    }

#if defined(__x86_64__)
static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

// Linux grants the tile registers of AMX to a process on request.
static bool has_amx() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif
#ifdef FASTATTN_HAS_AMX
FASTATTN_TABLE(amx, has_amx())
#endif
#ifdef FASTATTN_HAS_AVX512BF16
FASTATTN_TABLE(avx512bf16, has_avx512() && __builtin_cpu_supports("avx512bf16"))
#endif
#ifdef FASTATTN_HAS_AVX512
FASTATTN_TABLE(avx512, has_avx512())
#endif
#ifdef FASTATTN_HAS_AVX2
FASTATTN_TABLE(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#endif
#ifdef FASTATTN_HAS_NEON
FASTATTN_TABLE(neon, true)
#endif
#ifdef FASTATTN_HAS_BASELINE
FASTATTN_TABLE(baseline, true)
#endif

namespace {

const KernelTable *const kTables[] = {
#ifdef FASTATTN_HAS_AMX
    &amx::table,
#endif
#ifdef FASTATTN_HAS_AVX512BF16
    &avx512bf16::table,
#endif
#ifdef FASTATTN_HAS_AVX512
    &avx512::table,
#endif
#ifdef FASTATTN_HAS_AVX2
    &avx2::table,
#endif
#ifdef FASTATTN_HAS_NEON
    &neon::table,
#endif
#ifdef FASTATTN_HAS_BASELINE
    &baseline::table,
#endif
};

const KernelTable *find(const char *name) {
    for (const KernelTable *table : kTables)
        if (table->offered() && (!name || strcmp(table->name, name) == 0)) return table;
    return nullptr;
}

std::atomic<const KernelTable *> &current() {
    static std::atomic<const KernelTable *> table{[] {
        const KernelTable *wanted = find(getenv("FASTATTN_CPU_ISA"));  // an unknown name is reported by the Python package
        return wanted ? wanted : find(nullptr);
    }()};
    return table;
}

}  // namespace
}  // namespace fastattn_cpu

const char *fastattn_status_text(int status) {
    return status == FASTATTN_OUT_OF_MEMORY ? "the CPU kernel could not allocate its scratch memory" : "ok";
}

const char *fastattn_cpu_available_isa(int index) {
    for (const auto *table : fastattn_cpu::kTables)
        if (table->offered() && index-- == 0) return table->name;
    return nullptr;
}

const char *fastattn_cpu_isa(void) { return fastattn_cpu::current().load()->name; }

bool fastattn_cpu_set_isa(const char *name) {
    const auto *table = fastattn_cpu::find(name);
    if (table) fastattn_cpu::current().store(table);
    return table != nullptr;
}

#define FASTATTN_CALL(name, Problem) \
    int fastattn_cpu_##name(const Problem *problem) { return fastattn_cpu::current().load()->name(*problem); }
FASTATTN_KERNELS(FASTATTN_CALL)
