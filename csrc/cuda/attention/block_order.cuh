// The order of the blocks of attention on Hopper, by what L2 holds.
#pragma once
#include <primitives/launch.cuh>

#include <cstdint>

// Blocks that run at a time read what belongs to few heads, such as the keys and values of tiles of queries, or else L2 does not keep it for the
// next tile and every block reads it from memory: heads come in sections of `section` entries, whose data L2 holds together. Within a section the
// last tiles come first: of queries those have most keys under a causal mask.
struct BlockPlace {
    int entry, tile;
};
__host__ __device__ constexpr BlockPlace place_of(int block, int section, int entries, int tiles) {
    const int first = block / (section * tiles) * section, within = block - first * tiles;
    const int count = section < entries - first ? section : entries - first;
    return {first + within % count, tiles - 1 - within / count};
}
constexpr bool places_differ(int section, int entries, int tiles) {
    uint64_t met = 0;
    for (int block = 0; block < entries * tiles; block++) {
        const BlockPlace place = place_of(block, section, entries, tiles);
        met |= uint64_t(1) << (place.entry * tiles + place.tile);
    }
    return met == ~uint64_t(0) >> (64 - entries * tiles);
}
static_assert(places_differ(3, 8, 5) && places_differ(8, 8, 5) && places_differ(1, 7, 9) && places_differ(4, 6, 1));

constexpr int64_t L2_BYTES = 32 << 20;  // of 50 MiB: queries and out pass through too

// How many of these entries, of so many bytes each, are held together.
inline int entries_held(int64_t entries, int64_t bytes) {
    return static_cast<int>(bytes * entries <= L2_BYTES ? entries : bytes < L2_BYTES ? L2_BYTES / bytes : 1);
}

// Sections of heads of queries, which read keys and values, and of heads of keys, which read q and grad_out of their group.
template <typename Call>
int section_of_queries(const Call &call) {
    return entries_held(call.batch * call.heads_kv, call.len_k * (call.dim_qk + call.dim_v) * 2) * static_cast<int>(call.heads_q / call.heads_kv);
}
template <typename Call>
int section_of_keys(const Call &call) {
    return entries_held(call.batch * call.heads_kv, call.len_q * (call.dim_qk + call.dim_v) * 2 * (call.heads_q / call.heads_kv));
}
