// Products of the keys and values of a block of a cache (decode.cpp), which are read where they lie, in whatever format.
#pragma once
#include "../pack.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int64_t kBlock = kManyRegisters ? 32 : 24;  // keys whose scores are formed together: their keys and values fit the level-1 cache
constexpr int kRows = kManyRegisters ? 8 : 4;            // queries at a time
constexpr int64_t kProducts = kManyRegisters ? 16 : 24;  // keys whose products are added up together
static_assert(kBlock % kProducts == 0 && kProducts % kLanes == 0);

// Accumulators: enough of them to hide the latency of two fused multiply-adds a cycle, and with their operands no more than there are registers. Of so
// many queries the dot products with `keys` keys are formed at a time, and `vectors` of each output; fewer of these are summed for several keys apart.
template <int Rows>
struct Together {
    static constexpr int keys = Rows == 1 ? 8 : Rows == 2 ? 4 : kManyRegisters ? 2 : 3;
    static constexpr int vectors = keys;
    static constexpr int apart(int used) { return Rows * used < 8 ? 8 / (Rows * used) : 1; }
    static_assert(kProducts % keys == 0);
};

// Where the rows of a block of keys, or of values, lie.
struct BlockRows {
    const char *row[kBlock];
};

// The rows that are needed next, fetched in order and at the pace at which others are read: processors drop requests that come in bursts, and
// those out of order cost more than they save.
class NextRows {
  public:
    NextRows(const BlockRows &rows, int64_t bytes, int64_t count) : row_(rows.row), bytes_(bytes), lines_(count * ((bytes + kLine - 1) / kLine)) {}

    // So many bytes were read; the next go to the level-1 cache (3) or the level-2 cache (2).
    template <int locality = 3>
    void read(int64_t bytes) {
        credit_ += bytes;
        const int64_t due = smaller(lines_, credit_ / kLine);
        credit_ %= kLine;
        fetch<locality>(due);
    }
    void rest() { fetch<3>(lines_); }

  private:
    static constexpr int64_t kLine = 64;

    template <int locality>
    void fetch(int64_t lines) {
        lines_ -= lines;
        for (; lines > 0; lines--) {
            __builtin_prefetch(*row_ + at_, 0, locality);
            at_ += kLine;
            const bool ended = at_ >= bytes_;
            row_ += ended;
            at_ = ended ? 0 : at_;
        }
    }

    const char *const *row_;
    int64_t bytes_, lines_, at_ = 0;
    uint64_t credit_ = 0;
};

// scores(row, key) = q(row) . k(key) for Rows queries and the block's keys. Not inlined, nor is block_values: its loops need all the registers.
template <int dtype, int Rows>
__attribute__((noinline)) void block_scores(const float *queries, int64_t width, int64_t dim, const BlockRows &keys, int64_t count, NextRows &shared_ahead,
                                            float *scores) {
    constexpr int kKeys = Together<Rows>::keys;
    NextRows ahead = shared_ahead;  // in registers
    for (int64_t first = 0; first < count; first += kProducts) {
        vfloat products[Rows][kProducts];
#pragma GCC unroll 1  // else all products would be given registers, and go to memory and back
        for (int64_t key = 0; key < kProducts; key += kKeys) {
            vfloat acc[Rows][kKeys] = {};
            const auto add = [&](int64_t c, int lanes) {
                vfloat k[kKeys];
#pragma GCC unroll 8
                for (int i = 0; i < kKeys; i++) k[i] = load_any(offset((const void *)keys.row[first + key + i], dtype, c), dtype, lanes);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++) {
                    const vfloat q = in_register(load(queries + r * width + c));
#pragma GCC unroll 8
                    for (int i = 0; i < kKeys; i++) acc[r][i] += q * k[i];
                }
            };
            over_columns(dim, add);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
                for (int i = 0; i < kKeys; i++) products[r][key + i] = acc[r][i];
            ahead.read(kKeys * dim * size_of(dtype));
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++)
            for (int64_t key = 0; key < kProducts; key += kLanes) store(scores + r * kBlock + first + key, sums(*(vfloat(*)[kLanes])(products[r] + key)));
    }
    shared_ahead = ahead;
}

// out(row) += sum over the block of p(row, key) v(key) for Rows queries and Vectors vectors of values at column c, the last of which has `last` lanes.
template <int dtype, int Rows, int Vectors>
FASTATTN_INLINE void block_columns(const float *probabilities, const BlockRows &values, int64_t count, int64_t c, int last, float *out, int64_t width,
                                   NextRows &ahead) {
    constexpr int kApart = Together<Rows>::apart(Vectors);
    vfloat acc[kApart][Rows][Vectors] = {};
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++) acc[0][r][v] = load(out + r * width + c + v * kLanes);
    const auto add = [&](int64_t key, vfloat (&sums)[Rows][Vectors]) {
        vfloat value[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++)
            value[v] = load_any(offset((const void *)values.row[key], dtype, c + v * kLanes), dtype, v + 1 < Vectors ? kLanes : last);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const vfloat probability = in_register(broadcast(probabilities[r * kBlock + key]));
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; v++) sums[r][v] += probability * value[v];
        }
    };
    int64_t key = 0;
    for (; key + kApart <= count; key += kApart) {
#pragma GCC unroll 8
        for (int i = 0; i < kApart; i++) add(key + i, acc[i]);
        ahead.read(kApart * Vectors * kLanes * size_of(dtype));
    }
    if constexpr (kApart > 1)
        for (; key < count; key++) add(key, acc[0]);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++) {
#pragma GCC unroll 8
            for (int i = 1; i < kApart; i++) acc[0][r][v] += acc[i][r][v];
            store(out + r * width + c + v * kLanes, acc[0][r][v]);
        }
}

// out(row) += sum over the block of p(row, key) v(key) for Rows queries.
template <int dtype, int Rows>
__attribute__((noinline)) void block_values(const float *probabilities, const BlockRows &values, int64_t count, int64_t dim, NextRows &shared_ahead, float *out,
                                            int64_t width) {
    NextRows ahead = shared_ahead;  // in registers
    const int64_t whole = dim / kLanes;
    int64_t done = 0;
    const auto columns = [&]<int Vectors>(int last) {
        block_columns<dtype, Rows, Vectors>(probabilities, values, count, done * kLanes, last, out, width, ahead);
        done += Vectors;
    };
    constexpr int kMost = Together<Rows>::vectors;
    if constexpr (kMost == 3)  // never one vector by itself where two and two, or two and three, will do
        while (whole - done == 3 || whole - done > 4) columns.template operator()<3>(kLanes);
    if constexpr (kMost == 8)
        while (whole - done >= 8) columns.template operator()<8>(kLanes);
    if constexpr (kMost >= 4)
        while (whole - done >= 4) columns.template operator()<4>(kLanes);
    while (whole - done >= 2) columns.template operator()<2>(kLanes);
    if (done < whole) columns.template operator()<1>(kLanes);
    if (done * kLanes < dim) columns.template operator()<1>((int)(dim - done * kLanes));
    shared_ahead = ahead;
}

FASTATTN_NAMESPACE_END
