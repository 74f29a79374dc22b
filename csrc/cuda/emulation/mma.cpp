// The matrix product of a warp, for all its lanes at once. A file of its own: compiled for speed, whatever the kernels are compiled with.
#include <primitives/mma.cuh>

namespace emulation {
namespace {

template <typename T>
void multiply(const MmaIn *in, MmaOut *out) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
            unpack_pair<T>(in[lane].a[i], a[row][column], a[row][column + 1]);
        }
        for (int i = 0; i < 2; i++) unpack_pair<T>(in[lane].b[i], b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
        for (int i = 0; i < 4; i++) c[g + 8 * (i / 2)][2 * t + i % 2] = in[lane].c[i];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) out[lane].c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

}  // namespace

void multiply_bfloat16(const MmaIn *in, MmaOut *out) { multiply<bfloat16>(in, out); }
void multiply_float16(const MmaIn *in, MmaOut *out) { multiply<float16>(in, out); }

}  // namespace emulation
