// The emulation of primitives/mma.cuh: fragments as the PTX ISA lays them out, products exact, sums in float32.
#pragma once
#include "memory.cuh"
#include "numeric.cuh"

namespace emulation {

struct MmaIn {
    uint32_t a[4], b[2];
    float c[4];
};
struct MmaOut {
    float c[4];
};
struct Fragment {
    uint32_t word[4];
};

// The warp's 16 x 8 product of a 16 x 16 and a 16 x 8 matrix; convert turns 16 bits into a float.
void multiply_bfloat16(const MmaIn *in, MmaOut *out);
void multiply_float16(const MmaIn *in, MmaOut *out);

template <bool TRANSPOSED>
void gather_matrices(const Pack<uint16_t, 8> *rows, Fragment *out) {
    for (int lane = 0; lane < LANES; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int m = 0; m < 4; m++) {
            const Pack<uint16_t, 8> *matrix = rows + 8 * m;
            const uint16_t low = TRANSPOSED ? matrix[2 * t].at[g] : matrix[g].at[2 * t];
            const uint16_t high = TRANSPOSED ? matrix[2 * t + 1].at[g] : matrix[g].at[2 * t + 1];
            out[lane].word[m] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

template <bool TRANSPOSED, typename T>
void load_fragment(uint32_t (&fragment)[4], const Shared<T> &tile, int at, const Where &where) {
    const Pack<T, 8> row = tile.template load<8>(at, where);
    Pack<uint16_t, 8> bits;
    std::memcpy(&bits, &row, sizeof bits);
    const Fragment loaded = block().collective<Fragment>("ldmatrix", where, bits, &gather_matrices<TRANSPOSED>);
    std::memcpy(fragment, loaded.word, sizeof fragment);
}

}  // namespace emulation

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Where where = emulation::Where::current()) {
    const emulation::MmaIn in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    const auto out = emulation::block().collective<emulation::MmaOut>(
        "mma", where, in, __is_same(T, float16) ? &emulation::multiply_float16 : &emulation::multiply_bfloat16);
    std::memcpy(c, out.c, sizeof c);
}

template <typename T>
void load_matrices(uint32_t (&fragment)[4], const Shared<T> &tile, int at, emulation::Where where = emulation::Where::current()) {
    emulation::load_fragment<false>(fragment, tile, at, where);
}
template <typename T>
void load_matrices_transposed(uint32_t (&fragment)[4], const Shared<T> &tile, int at, emulation::Where where = emulation::Where::current()) {
    emulation::load_fragment<true>(fragment, tile, at, where);
}
