// The order of the blocks of attention on Hopper, by what L2 holds.
#pragma once
#include <primitives/launch.cuh>

#include <cstdint>

// The order of the blocks. Those that run at a time read the keys and values of few heads, or else L2 does not keep them for the next tile of queries
// and every block reads them from memory: heads come in sections of `section` entries, whose keys and values L2 holds together. Within a section the
// last tiles of queries come first, which under a causal mask have most keys.
struct BlockPlace {
    int entry, tile;
};
__host__ __device__ constexpr BlockPlace place_of(int block, int section, int entries, int q_tiles) {
    const int first = block / (section * q_tiles) * section, within = block - first * q_tiles;
    const int count = section < entries - first ? section : entries - first;
    return {first + within % count, q_tiles - 1 - within / count};
}
constexpr bool places_differ(int section, int entries, int q_tiles) {
    uint64_t met = 0;
    for (int block = 0; block < entries * q_tiles; block++) {
        const BlockPlace place = place_of(block, section, entries, q_tiles);
        met |= uint64_t(1) << (place.entry * q_tiles + place.tile);
    }
    return met == ~uint64_t(0) >> (64 - entries * q_tiles);
}
static_assert(places_differ(3, 8, 5) && places_differ(8, 8, 5) && places_differ(1, 7, 9) && places_differ(4, 6, 1));

constexpr int64_t L2_BYTES = 32 << 20;  // of 50 MiB: queries and out pass through too

template <typename Call>
int section_of(const Call &call) {
    const int64_t bytes = call.len_k * (call.dim_qk + call.dim_v) * 2, heads = call.batch * call.heads_kv;
    const int64_t held = bytes * heads > L2_BYTES ? (bytes < L2_BYTES ? L2_BYTES / bytes : 1) : heads;
    return static_cast<int>(held * (call.heads_q / call.heads_kv));
}
