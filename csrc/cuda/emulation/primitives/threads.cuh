// The emulation of primitives/threads.cuh.
#pragma once
#include "../runtime.h"

constexpr int WARP = emulation::LANES;

template <typename T>
T shuffle(T value, int lane, emulation::Where where = emulation::Where::current()) {
    struct In {
        T value;
        int lane;
    };
    return emulation::block().collective<T>("shuffle", where, In{value, lane}, [](const In *in, T *out) {
        for (int i = 0; i < WARP; i++) out[i] = in[in[i].lane & (WARP - 1)].value;
    });
}
template <typename T>
T shuffle_xor(T value, int mask, emulation::Where where = emulation::Where::current()) {
    return emulation::block().collective<T>("shuffle_xor", where, value, [mask](const T *in, T *out) {
        for (int i = 0; i < WARP; i++) out[i] = in[i ^ mask];
    });
}
inline uint32_t warp_ballot(bool value, emulation::Where where = emulation::Where::current()) {
    return emulation::block().collective<uint32_t>("vote", where, value, [](const bool *in, uint32_t *out) {
        uint32_t ballot = 0;
        for (int i = 0; i < WARP; i++) ballot |= static_cast<uint32_t>(in[i]) << i;
        for (int i = 0; i < WARP; i++) out[i] = ballot;
    });
}
inline bool warp_any(bool value, emulation::Where where = emulation::Where::current()) { return warp_ballot(value, where) != 0; }
inline bool warp_all(bool value, emulation::Where where = emulation::Where::current()) { return warp_ballot(value, where) == 0xFFFFFFFFu; }
// The number of the lowest bit that is set; some bit is.
inline int first_bit(uint32_t word) { return __builtin_ffs(static_cast<int>(word)) - 1; }
inline void sync_warp(emulation::Where where = emulation::Where::current()) { warp_ballot(true, where); }

inline int emulated_block_size() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }
inline void sync_block(emulation::Where where = emulation::Where::current()) {
    emulation::block().barrier(0, emulated_block_size(), true, false, where);
}
inline bool sync_block_or(bool value, emulation::Where where = emulation::Where::current()) {
    return emulation::block().barrier(0, emulated_block_size(), true, value, where);
}
inline void sync_named(int barrier, int threads, emulation::Where where = emulation::Where::current()) {
    emulation::block().barrier(barrier, threads, true, false, where);
}
inline void arrive_named(int barrier, int threads, emulation::Where where = emulation::Where::current()) {
    emulation::block().barrier(barrier, threads, false, false, where);
}
inline bool sync_named_or(int barrier, int threads, bool value, emulation::Where where = emulation::Where::current()) {
    return emulation::block().barrier(barrier, threads, true, value, where);
}
