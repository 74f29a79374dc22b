// The emulation of primitives/wgmma.cuh: operands where the PTX ISA looks for them, products exact, sums in float32.
#pragma once
#include "memory.cuh"
#include "numeric.cuh"

constexpr int WARPGROUP = 4 * emulation::LANES;

struct SwizzledMatrix : emulation::SharedMatrix {
    template <typename T>
    SwizzledMatrix(const Shared<T> &tile, int first_element, int panel_bytes_, emulation::Where where = emulation::Where::current()) {
        const auto offset = [](const void *address) {
            return static_cast<int>(static_cast<const unsigned char *>(address) - emulation::block().dynamic_shared());
        };
        first = offset(tile.inside(first_element, 16, 16, "operand of a product", where));
        panel_bytes = panel_bytes_;
        low = offset(tile.begin());
        high = low + tile.bytes();
        const int alignment = emulation::block().alignment();
        if (first % 1024 >= 128 || panel_bytes % 1024 != 0 || alignment % 1024 != 0)
            emulation::block().fail(emulation::text("misaligned: an operand of a product at byte %d, with panels of %d bytes, in memory aligned to %d: "
                                                    "not the first row of eight, or not whole 1024 bytes",
                                                    first, panel_bytes, alignment),
                                    where);
    }
};

namespace emulation {

struct WgmmaIn {
    float *c;
    const uint32_t *a;
    SharedMatrix left, right;
    bool add;
};
struct Nothing {};

template <typename T>
void issue_wgmma(const WgmmaIn &mine, int column_tiles, bool right_by_rows, const Where &where) {
    block().collective<Nothing>("wgmma", where, mine, [&](const WgmmaIn *in, Nothing *) {
        Wgmma product = {{}, {}, in[0].left, in[0].right, column_tiles, in[0].add, __is_same(T, float16), right_by_rows, {}, where};
        for (int lane = 0; lane < LANES; lane++) {
            product.c[lane] = in[lane].c;
            product.a[lane] = in[lane].a;
            if (in[lane].left.first != in[0].left.first || in[lane].right.first != in[0].right.first || in[lane].add != in[0].add)
                block().fail(text("lanes 0 and %d give different operands to a product", lane), where);
        }
        block().issue_product(std::move(product));
    });
}

}  // namespace emulation

inline void wgmma_fence(emulation::Where where = emulation::Where::current()) {
    emulation::block().collective<emulation::Nothing>("wgmma_fence", where, emulation::Nothing(),
                                                      [](const auto *, auto *) { emulation::block().fence_products(); });
}
inline void wgmma_commit(emulation::Where where = emulation::Where::current()) {
    emulation::block().collective<emulation::Nothing>("wgmma_commit", where, emulation::Nothing(),
                                                      [](const auto *, auto *) { emulation::block().commit_products(); });
}
inline void wgmma_share() { emulation::block().current().shares++; }

template <int LEFT, int N>
void wgmma_wait(float (&c)[N][4], emulation::Where where = emulation::Where::current()) {
    emulation::block().collective<emulation::Nothing>("wgmma_wait", where, emulation::Nothing(),
                                                      [](const auto *, auto *) { emulation::block().wait_products(LEFT); });
    emulation::block().claim(c[0], where);
}

template <int COUNT>
void raise_registers(emulation::Where where = emulation::Where::current()) {
    emulation::block().collective<emulation::Nothing>("setmaxnreg", where, emulation::Nothing(),
                                                      [&](const auto *, auto *) { emulation::block().set_registers(COUNT, where); });
}
template <int COUNT>
void lower_registers(emulation::Where where = emulation::Where::current()) {
    raise_registers<COUNT>(where);
}

template <typename T, int N>
void wgmma_transposed(float (&c)[N][4], const SwizzledMatrix &a, const SwizzledMatrix &b, bool add,
                      emulation::Where where = emulation::Where::current()) {
    static_assert(N == 8 || N == 16);
    emulation::issue_wgmma<T>({c[0], nullptr, a, b, add}, N, false, where);
}
template <typename T, int N>
void wgmma(float (&c)[N][4], const uint32_t (&a)[4], const SwizzledMatrix &b, emulation::Where where = emulation::Where::current()) {
    static_assert(N == 8 || N == 16);
    emulation::issue_wgmma<T>({c[0], a, {}, b, true}, N, true, where);
}
