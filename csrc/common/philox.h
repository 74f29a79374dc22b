// The dropout of every backend: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// key = the two halves of the 64-bit seed; counter = (i, 4 * (j >> 5) + ((j & 7) >> 1), b * Hq + h, 0) for row i and column j; of the 128
// bits, column j reads the 16-bit lane 2 * ((j & 31) >> 3) + (j & 1): one call serves the eight columns 8 w + 2 c + {0, 1}, w = 0..3, that an
// accumulator fragment of a tensor-core thread holds. An element is kept where its lane >= threshold. Only constants here: each backend
// writes the rounds in its own vectors.
#pragma once

#define FASTATTN_PHILOX_ROUNDS 10
#define FASTATTN_PHILOX_MULTIPLIER_0 0xD2511F53u
#define FASTATTN_PHILOX_MULTIPLIER_1 0xCD9E8D57u
#define FASTATTN_PHILOX_WEYL_0 0x9E3779B9u
#define FASTATTN_PHILOX_WEYL_1 0xBB67AE85u
