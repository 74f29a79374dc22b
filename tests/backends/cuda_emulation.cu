// Small kernels for the emulation's own tests: each right one beside the faults that the emulation must find. test_cuda_emulation.py builds it.
#include <cstdio>

#include <primitives/copy_async.cuh>
#include <primitives/launch.cuh>
#include <primitives/memory.cuh>
#include <primitives/mma.cuh>
#include <primitives/threads.cuh>

namespace {

constexpr int THREADS = 128;

enum Fault { NONE, NO_BARRIER, SHARED_OFF_BY_ONE, GLOBAL_OFF_BY_ONE, MISALIGNED, EARLY_READ, DEADLOCK, DIVERGED, NO_WARP_BARRIER, NO_ARRIVAL, IN_FLIGHT };

// out[i] = in[(i + 40) % 128]: through shared memory, from a thread of another warp.
__global__ void __launch_bounds__(THREADS) rotate(Global<const float> in, Global<float> out, int fault) {
    const Shared<float> tile = SharedArena().take<float>(THREADS);
    const int i = static_cast<int>(threadIdx.x);
    tile.set(i, in.get(fault == GLOBAL_OFF_BY_ONE ? i + 1 : i));
    if (fault != NO_BARRIER) sync_block();
    const int from = fault == SHARED_OFF_BY_ONE ? i + 1 : (i + 40) % THREADS;
    out.set(i, tile.get(from));
}

// The same by 16-byte asynchronous copies, two groups of them.
__global__ void __launch_bounds__(THREADS) rotate_async(Global<const float> in, Global<float> out, int fault) {
    const Shared<float> tile = SharedArena().take<float>(THREADS);
    const int i = static_cast<int>(threadIdx.x);
    for (int half = 0; half < 2; half++) {
        const int at = half * THREADS / 2 + 4 * i;
        if (i < THREADS / 8) copy_async(tile, at, in, fault == MISALIGNED ? at + 1 : at);
        copy_async_commit();
    }
    if (fault != IN_FLIGHT) fault == EARLY_READ ? copy_async_wait<1>() : copy_async_wait<0>();
    sync_block();
    out.set(i, fault == IN_FLIGHT ? 0.0f : tile.get((i + 40) % THREADS));
    if (fault == EARLY_READ) copy_async_wait<0>();
}

// out[i] = in[i ^ 1] within a warp, by shared memory and by a shuffle: 0 where both agree.
__global__ void __launch_bounds__(THREADS) exchange(Global<const float> in, Global<float> out, int fault) {
    const Shared<float> tile = static_shared<float, THREADS>();
    const int i = static_cast<int>(threadIdx.x);
    const float value = in.get(i);
    tile.set(i, value);
    if (fault != NO_WARP_BARRIER) sync_warp();
    const float neighbour = tile.get(i ^ 1);
    if (fault == DIVERGED && i % 2 == 1) sync_warp();
    const float shuffled = shuffle_xor(value, 1);
    if (fault == DEADLOCK && i < WARP) return;
    sync_block();
    // Warps 0 and 1 hand over to warps 2 and 3, which alone wait.
    if (i < THREADS / 2) {
        if (fault != NO_ARRIVAL) arrive_named(1, THREADS);
    } else {
        sync_named(1, THREADS);
    }
    out.set(i, neighbour - shuffled);
}

// out (16 x 8) = a (16 x 16) b (16 x 8), float16, b given transposed (8 x 16): fragments filled by the rule of the PTX ISA, element by element.
__global__ void __launch_bounds__(WARP) multiply_by_the_book(Global<const float16> a, Global<const float16> b, Global<float> out) {
    const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, pair = lane % 4 * 2;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 8; i++) {
        // a_i: row groupID for i in 0, 1, 4, 5, else groupID + 8; column pair + (i & 1), and 8 more for i >= 4
        const int row = (i & 2) ? group + 8 : group, column = pair + (i & 1) + (i >= 4 ? 8 : 0);
        const uint32_t bits = a.as<const uint16_t>().get(row * 16 + column);
        fa[i / 2] = i % 2 ? fa[i / 2] | bits << 16 : bits;
    }
    for (int i = 0; i < 4; i++) {
        const int row = pair + (i & 1) + (i >= 2 ? 8 : 0);
        const uint32_t bits = b.as<const uint16_t>().get(group * 16 + row);
        fb[i / 2] = i % 2 ? fb[i / 2] | bits << 16 : bits;
    }
    float c[4] = {};
    mma<float16>(c, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) out.set((i < 2 ? group : group + 8) * 8 + pair + (i & 1), c[i]);
}

// The same with fragments from ldmatrix: a from rows of 16, b once from its transpose and, behind it in out, once from (16 x 8) transposed.
__global__ void __launch_bounds__(WARP) multiply_by_ldmatrix(Global<const float16> a, Global<const float16> b, Global<float> out) {
    SharedArena arena;
    const Shared<float16> tile_a = arena.take<float16>(256), columns = arena.take<float16>(128), rows = arena.take<float16>(128);
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 256; i += WARP) tile_a.set(i, a.get(i));
    for (int i = lane; i < 128; i += WARP) {
        columns.set(i, b.get(i));
        rows.set(i % 16 * 8 + i / 16, b.get(i));
    }
    sync_warp();
    uint32_t fa[4], fb[4], ft[4];
    load_matrices(fa, tile_a, lane % 16 * 16 + lane / 16 * 8);
    load_matrices(fb, columns, lane % 8 * 16 + lane / 8 % 2 * 8);
    load_matrices_transposed(ft, rows, lane % 16 * 8);
    for (int half = 0; half < 2; half++) {
        float c[4] = {};
        const uint32_t(&f)[4] = half ? ft : fb;
        mma<float16>(c, fa, f[0], f[1]);
        for (int i = 0; i < 4; i++) out.set(128 * half + (lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2, c[i]);
    }
}

// Static shared memory of 2,048 bytes beside what the launch gives.
__global__ void __launch_bounds__(THREADS) fill(Global<float> out) {
    const Shared<float> tile = static_shared<float, 512>();
    const int i = static_cast<int>(threadIdx.x);
    tile.set(i, 1.0f);
    out.set(i, tile.get(i));
}

// Every thread of every block adds 1.
__global__ void __launch_bounds__(THREADS) count(Global<int> total) { atomic_add(total, 0, 1); }

int report(cudaError_t error, char *text, int size) {
    std::snprintf(text, static_cast<size_t>(size), "%s", error == cudaSuccess ? "" : cudaGetErrorString(error));
    return error;
}

}  // namespace

extern "C" int run_rotate(const float *in, float *out, int n, int fault, bool async, char *text, int size) {
    const Launch how = {async ? "rotate_async" : "rotate", dim3(1), dim3(THREADS), THREADS * 4, nullptr};
    return report(launch<THREADS>(how, async ? rotate_async : rotate, Global<const float>(in, n), Global<float>(out, n), fault), text, size);
}

extern "C" int run_exchange(const float *in, float *out, int n, int fault, char *text, int size) {
    const Launch how = {"exchange", dim3(1), dim3(THREADS), 0, nullptr};
    return report(launch<THREADS>(how, exchange, Global<const float>(in, n), Global<float>(out, n), fault), text, size);
}

extern "C" int run_multiply(const uint16_t *a, const uint16_t *b, float *out, int n_out, bool ldmatrix, char *text, int size) {
    const Launch how = {"multiply", dim3(1), dim3(WARP), 2 * (256 + 128 + 128), nullptr};
    const Global<const float16> first(reinterpret_cast<const float16 *>(a), 256), second(reinterpret_cast<const float16 *>(b), 128);
    return report(launch<WARP>(how, ldmatrix ? multiply_by_ldmatrix : multiply_by_the_book, first, second, Global<float>(out, n_out)), text, size);
}

extern "C" int run_fill(float *out, int shared_bytes, char *text, int size) {
    const Launch how = {"fill", dim3(1), dim3(THREADS), shared_bytes, nullptr};
    return report(launch<THREADS>(how, fill, Global<float>(out, THREADS)), text, size);
}

extern "C" int run_count(int *total, int blocks, int threads, char *text, int size) {
    const Launch how = {"count", dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, nullptr};
    return report(launch<THREADS>(how, count, Global<int>(total, 1)), text, size);
}
