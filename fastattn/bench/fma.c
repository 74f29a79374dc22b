/* Fused multiply-adds on registers, in 16 independent chains of 64-byte vectors: the arithmetic peak of one core.
   Compiled by fastattn.bench.limits where there is a C compiler. Returns a sum, so that nothing is optimised away. */

typedef float vector __attribute__((vector_size(64)));

float fma_loop(long rounds) {
    vector sum[16];
    for (int chain = 0; chain < 16; ++chain)
        for (int lane = 0; lane < 16; ++lane) sum[chain][lane] = 1.0f + (float)(chain + lane);
    vector factor = sum[0] * 0.0f + 0.999999f, step = sum[1] * 0.0f + 1e-6f;
    for (long round = 0; round < rounds; ++round)
        for (int chain = 0; chain < 16; ++chain) sum[chain] = sum[chain] * factor + step;
    float total = 0.0f;
    for (int chain = 0; chain < 16; ++chain) total += sum[chain][chain];
    return total;
}
