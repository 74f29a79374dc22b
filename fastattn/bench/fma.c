/* Fused multiply-adds on registers, in independent chains of vectors: the arithmetic peak of one core.
   Compiled by fastattn.bench.limits where there is a C compiler. As wide as the vectors of this processor, in as many
   chains as hide the latency and fit its registers with two left for the factors. */

#if defined(__AVX512F__)
enum { BYTES = 64, CHAINS = 16 };
#elif defined(__AVX__)
enum { BYTES = 32, CHAINS = 12 };
#elif defined(__x86_64__)
enum { BYTES = 16, CHAINS = 12 };
#else
enum { BYTES = 16, CHAINS = 24 };
#endif
enum { LANES = BYTES / 4 };
typedef float vector __attribute__((vector_size(BYTES)));

/* What a round does, one multiplication and one addition per lane. */
long fma_flops(void) { return 2L * CHAINS * LANES; }

/* Returns a sum, so that nothing is optimised away. */
float fma_loop(long rounds) {
    vector sum[CHAINS];
    for (int chain = 0; chain < CHAINS; ++chain)
        for (int lane = 0; lane < LANES; ++lane) sum[chain][lane] = 1.0f + (float)(chain + lane);
    vector factor = sum[0] * 0.0f + 0.999999f, step = sum[1] * 0.0f + 1e-6f;
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int chain = 0; chain < CHAINS; ++chain) sum[chain] = sum[chain] * factor + step;
    }
    float total = 0.0f;
    for (int chain = 0; chain < CHAINS; ++chain) total += sum[chain][chain % LANES];
    return total;
}
