// Products of a warpgroup and barriers in shared memory, for the emulation's own tests: a right kernel beside the faults that the emulation must
// find. test_cuda_wgmma.py builds it. Operands are laid out here by the PTX ISA's words, not by the tiles of attention.
#include <cstdio>

#include <primitives/launch.cuh>
#include <primitives/mbarrier.cuh>
#include <primitives/threads.cuh>
#include <primitives/wgmma.cuh>

namespace {

constexpr int THREADS = 2 * WARPGROUP, ROWS = 64, SIZE = 128;

enum Fault {
    NONE, NO_SHARE, NO_WAIT, TOO_FEW_ARRIVALS, NO_FENCE, EARLY_CLAIM, UNDER_WAY, A_WARP_LESS, MISALIGNED, EARLY_RELEASE, NOT_PREPARED,
    SMALL_ALIGNMENT, ANOTHER_PRODUCT, TOO_MANY_REGISTERS, ODD_REGISTERS
};
enum { FULL, EMPTY };

// Where element (row, column) of a matrix of `rows` rows lies, swizzled by 128 bytes: panels of 64 columns one behind the other, 128 bytes a row,
// in which the number of a 16-byte chunk is exclusive-ored with that of the row within eight.
int place(int rows, int row, int column) { return column / 64 * rows * 64 + row * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8; }

// The first warpgroup writes a (64 x 128) and b (128 x 128) to shared memory, the second multiplies: out[0] = a b^T, both from there, and
// out[1] = a b with a from registers.
template <int ALIGNMENT>
__global__ void __launch_bounds__(THREADS) multiply(Global<const float16> a, Global<const float16> b, Global<float> out, int fault) {
    SharedArena<ALIGNMENT> arena;
    const Shared<float16> tile_a = arena.template take<float16>(ROWS * SIZE), tile_b = arena.template take<float16>(SIZE * SIZE);
    const Barriers barriers(arena.template take<uint64_t>(2));
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0 && fault != NOT_PREPARED) {
        barriers.prepare(FULL, WARPGROUP);
        barriers.prepare(EMPTY, WARPGROUP / WARP);
    }
    sync_block();
    if (thread < WARPGROUP) {
        if (fault != TOO_MANY_REGISTERS) lower_registers<232>();
        for (int i = thread; i < ROWS * SIZE; i += WARPGROUP) tile_a.set(place(ROWS, i / SIZE, i % SIZE), a.get(i));
        for (int i = thread; i < SIZE * SIZE; i += WARPGROUP) tile_b.set(place(SIZE, i / SIZE, i % SIZE), b.get(i));
        if (fault != NO_SHARE || thread / 2 != 38) wgmma_share();  // two threads write a word
        if (fault != TOO_FEW_ARRIVALS || thread != 5) barriers.arrive(FULL);
        barriers.wait(EMPTY, 0);
        tile_a.set(thread, from_float<float16>(0.0f));
        return;
    }
    const int lane = thread % WARP, warp = thread % WARPGROUP / WARP;
    if (fault == ODD_REGISTERS) raise_registers<100>();
    if (fault == TOO_MANY_REGISTERS)
        raise_registers<256>();  // the first warpgroup keeps its own, as many as there are
    else
        raise_registers<240>();
    if (fault != NO_WAIT) barriers.wait(FULL, 0);
    if (fault == A_WARP_LESS && warp == 2) {
        if (lane == 0) barriers.arrive(EMPTY);
        return;
    }
    float by_rows[16][4], by_columns[16][4] = {};
    if (fault != NO_FENCE) wgmma_fence();
    for (int d = 0; d < SIZE; d += 16) {
        const int at = (fault == ANOTHER_PRODUCT && warp == 3 ? 0 : d % 64) + (fault == MISALIGNED ? 64 : 0);
        wgmma_transposed<float16>(by_rows, SwizzledMatrix(tile_a, d / 64 * ROWS * 64 + at, ROWS * 128),
                                  SwizzledMatrix(tile_b, d / 64 * SIZE * 64 + d % 64, SIZE * 128), d > 0);
    }
    wgmma_commit();
    if (fault == UNDER_WAY) return;
    if (lane == 0 && fault == EARLY_RELEASE) barriers.arrive(EMPTY);
    if (fault == EARLY_CLAIM)
        wgmma_wait<1>(by_rows);
    else
        wgmma_wait<0>(by_rows);
    if (lane == 0 && fault != EARLY_RELEASE) barriers.arrive(EMPTY);
    // a_i of the fragment: row groupID for i in 0, 1, 4, 5, else groupID + 8; column pair + (i & 1), and 8 more for i >= 4
    uint32_t fragments[SIZE / 16][4];
    for (int d = 0; d < SIZE; d += 16)
        for (int i = 0; i < 8; i++) {
            const int row = 16 * warp + lane / 4 + ((i & 2) ? 8 : 0), column = d + lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            const uint32_t bits = a.as<const uint16_t>().get(row * SIZE + column);
            uint32_t &word = fragments[d / 16][i / 2];
            word = i % 2 ? word | bits << 16 : bits;
        }
    wgmma_fence();
    for (int d = 0; d < SIZE; d += 16) wgmma<float16>(by_columns, fragments[d / 16], SwizzledMatrix(tile_b, d * 64, SIZE * 128));
    wgmma_commit();
    wgmma_wait<0>(by_columns);
    for (int n = 0; n < 16; n++)
        for (int e = 0; e < 4; e++) {
            const int at = (16 * warp + lane / 4 + 8 * (e / 2)) * SIZE + 8 * n + lane % 4 * 2 + e % 2;
            out.set(at, by_rows[n][e]);
            out.set(ROWS * SIZE + at, by_columns[n][e]);
        }
}

}  // namespace

extern "C" int run_multiply(const uint16_t *a, const uint16_t *b, float *out, int fault, char *text, int size) {
    const Launch how = {"multiply", dim3(1), dim3(THREADS), (ROWS + SIZE) * SIZE * 2 + 16, nullptr};
    const Global<const float16> first(reinterpret_cast<const float16 *>(a), ROWS * SIZE), second(reinterpret_cast<const float16 *>(b), SIZE * SIZE);
    const auto kernel = fault == SMALL_ALIGNMENT ? multiply<128> : multiply<1024>;
    const cudaError_t error = launch<THREADS>(how, kernel, first, second, Global<float>(out, 2 * ROWS * SIZE), fault);
    std::snprintf(text, static_cast<size_t>(size), "%s", error == cudaSuccess ? "" : cudaGetErrorString(error));
    return error;
}
