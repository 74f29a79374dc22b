// Runs kernels on a CPU: one fibre per CUDA thread, one block after the other, all in the calling thread.
//
// Warps and lanes run in an order drawn from a seed (FASTATTN_EMULATION_SEED, 0 if unset, stirred by every launch), so that what a missing
// barrier leaves to chance differs from launch to launch. Shared memory starts as NaN (all bits set). A kernel is stopped, and its launch
// fails with a report that names thread and source line, at
//   - an access outside a span, or one that is not aligned to its size;
//   - a read or write of shared memory that an unfinished asynchronous copy owns;
//   - an access to a 4-byte word of shared memory that another warp accessed, one of the two writing, with no barrier in between (each warp
//     keeps a vector clock), or that another lane of the same warp wrote since the warp last ran something together;
//   - a product of a warpgroup that reads shared memory which its writer did not share with the asynchronous proxy, that begins without a fence of
//     its registers, or whose accumulators are asked for before their group was waited for;
//   - threads of one warp in different collectives, warps of one warpgroup with different products, more registers than a block was launched with,
//     threads that all wait (a deadlock, listed by barrier), and a return with copies or products under way.
// A product of a warpgroup runs when it is issued or when its group is waited for, as the seed has it; until then its accumulators are NaN.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fibre.h"

namespace emulation {

constexpr int LANES = 32;
constexpr int BARRIERS = 16;
constexpr int SLOT_BYTES = 64;

using Where = std::source_location;

// 16 bytes on their way into shared memory.
struct AsyncCopy {
    unsigned char *to;
    const unsigned char *from;
    Where where;
};

// A matrix in shared memory as wgmma takes it: an offset into dynamic shared memory, the bytes from one panel to the next, and the bounds of the
// array that it lies in.
struct SharedMatrix {
    int first, panel_bytes, low, high;
};

// One product of a warp's share of a warpgroup's rows.
struct Wgmma {
    float *c[LANES];           // of 4 column_tiles registers each
    const uint32_t *a[LANES];  // of four registers each; null: left is in shared memory
    SharedMatrix left, right;
    int column_tiles;
    bool add, float16, right_by_rows;  // right_by_rows: 16 rows of the right operand, else the rows of its transpose
    std::vector<float> saved;  // what the accumulators held; empty where an earlier product of them is under way
    Where where;

    bool same_as(const Wgmma &other) const {
        const bool same_left = (a[0] != nullptr) == (other.a[0] != nullptr) && left.first == other.left.first;
        return same_left && right.first == other.right.first && right.panel_bytes == other.right.panel_bytes &&
               column_tiles == other.column_tiles && add == other.add && right_by_rows == other.right_by_rows;
    }
};

// A barrier in shared memory.
struct MemoryBarrier {
    int expected = 0, pending = 0;
    uint32_t phase = 0;                        // how many are complete
    std::vector<int> waiting;                  // thread numbers
    std::vector<uint32_t> arriving, complete;  // clocks: joined over who arrived so far; at the end of the last phase
};

enum class State { ready, at_warp, at_barrier, at_memory_barrier, returned };

struct Thread {
    Fibre fibre;
    dim3 index;
    int number = 0, warp = 0, lane = 0;
    State state = State::ready;
    int barrier = 0;                           // waits there, at `where`; of one in shared memory the byte
    Where where;
    uint32_t collectives = 0;                  // of its warp and of barriers, that it passed
    uint32_t shares = 0;                       // how often it shared what it wrote with the asynchronous proxy
    std::vector<AsyncCopy> open;               // issued, in no group yet
    std::vector<std::vector<AsyncCopy>> groups;  // oldest first
};

struct Warp {
    int ready = LANES, returned = 0;
    int arrived = 0;  // at the collective under way
    const char *collective = "";
    Where where;
    alignas(16) unsigned char in[2][LANES][SLOT_BYTES];  // two sets: the last to arrive may already be at the next collective
    alignas(16) unsigned char out[2][LANES][SLOT_BYTES];
    std::vector<uint32_t> clock;  // what this warp knows of every warp
    std::vector<Wgmma> open;                 // issued, in no group yet
    std::vector<std::vector<Wgmma>> groups;  // oldest first
    bool fenced = false;
    int products = 0;
    int registers = 0;  // of a thread, since it asked for as many; 0: as at launch
};

struct Barrier {
    int arrived = 0, expected = 0;
    bool vote = false;
    std::vector<int> waiting;          // thread numbers
    std::vector<uint32_t> clock;       // joined over who arrived
    bool outcome = false;              // of the vote that was taken last
};

// The last accesses to 4 bytes of shared memory.
struct Word {
    uint32_t write_clock = 0, write_collectives = 0, write_shares = 0;
    uint16_t write_line = 0;
    int8_t write_warp = -1, write_lane = 0;
    bool copying = false;
};

class Block {
public:
    Block(const char *kernel, dim3 grid, dim3 threads, int shared_bytes, std::function<void()> body);

    // Runs one block. False: it was stopped, and report() says why.
    bool run(dim3 index, uint64_t seed);
    const std::string &report() const { return report_; }

    const dim3 grid, threads;
    dim3 index;

    // What the primitives call, in a thread of the block.
    Thread &current() { return threads_[static_cast<size_t>(current_)]; }
    [[noreturn]] void fail(const std::string &what, const Where &where);
    unsigned char *dynamic_shared() { return shared_.data(); }
    int dynamic_bytes() const { return dynamic_bytes_; }
    // The multiple of bytes at which the kernel has dynamic shared memory begin.
    void align(int bytes) { alignment_ = bytes; }
    int alignment() const { return alignment_; }
    unsigned char *static_shared(const void *tag, int bytes);
    void check_shared(const void *address, int bytes, bool writes, const Where &where);
    bool barrier(int number, int expected, bool waits, bool vote, const Where &where);
    void issue(const AsyncCopy &copy);
    void commit();
    void wait(size_t left, const Where &where);

    void prepare_barrier(const void *at, int arrivals, const Where &where);
    void arrive(const void *at, const Where &where);
    bool is_phase_complete(const void *at, unsigned parity, const Where &where);
    void wait_phase(const void *at, unsigned parity, const Where &where);

    // Of the warp together, by the last of its lanes to arrive.
    void fence_products() { warp_of_current().fenced = true; }
    void issue_product(Wgmma &&product);
    void commit_products();
    void wait_products(size_t left);
    // Of the warp together.
    void set_registers(int count, const Where &where);
    // By each lane: fails where a product of these accumulators is under way.
    void claim(const float *c, const Where &where);
    // 16 bytes of an operand of a product, at an offset into dynamic shared memory.
    const unsigned char *operand(const SharedMatrix &matrix, int at, const Where &where);

    // Each lane of the warp brings `mine`; the last to arrive computes all the results together.
    template <typename Out, typename In, typename Together>
    Out collective(const char *what, const Where &where, const In &mine, Together together) {
        static_assert(sizeof(In) <= SLOT_BYTES && sizeof(Out) <= SLOT_BYTES);
        Thread &thread = current();
        Warp &warp = warps_[static_cast<size_t>(thread.warp)];
        const int set = static_cast<int>(warp_set(thread));
        std::memcpy(warp.in[set][thread.lane], &mine, sizeof(In));
        if (join_collective(thread, warp, what, where)) {
            In in[LANES];
            Out out[LANES];
            for (int lane = 0; lane < LANES; lane++) std::memcpy(&in[lane], warp.in[set][lane], sizeof(In));
            together(in, out);
            for (int lane = 0; lane < LANES; lane++) std::memcpy(warp.out[set][lane], &out[lane], sizeof(Out));
            release_warp(warp, thread.warp);
        } else {
            yield();
        }
        Out result;
        std::memcpy(&result, warp.out[set][thread.lane], sizeof(Out));
        return result;
    }

private:
    uint32_t warp_set(const Thread &thread) const { return thread.collectives & 1; }
    bool join_collective(Thread &thread, Warp &warp, const char *what, const Where &where);
    void release_warp(Warp &warp, int number);
    void release_barrier(int number);
    void yield();
    void run_warp(int number, int passes);
    static void enter(void *block);
    void note_deadlock();
    std::string place(const Thread &thread, const Where &where) const;
    Warp &warp_of_current() { return warps_[static_cast<size_t>(current().warp)]; }
    MemoryBarrier &memory_barrier(const void *at, const Where &where);
    void check_finished();
    Word &word(const void *address) { return words_[static_cast<size_t>(static_cast<const unsigned char *>(address) - shared_.data()) / 4]; }
    uint32_t &last_read(size_t word, int warp) { return reads_[word * warps_.size() + static_cast<size_t>(warp)]; }

    const char *kernel_;
    std::function<void()> body_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Barrier barriers_[BARRIERS];
    std::map<int, MemoryBarrier> memory_barriers_;  // by their byte of shared memory
    std::vector<std::vector<Wgmma>> products_;  // of each warpgroup, as the first of its warps to come issued them
    std::vector<unsigned char> shared_;  // dynamic shared memory, then static
    int dynamic_bytes_, shared_end_, alignment_ = 1;
    std::vector<std::pair<const void *, int>> statics_;
    std::vector<Word> words_;
    std::vector<uint32_t> reads_;  // clock of the last read, per word and warp
    std::mt19937_64 random_;
    int lane_start_ = 0, lane_step_ = 1;
    int current_ = 0;
    void *scheduler_ = nullptr;
    std::string report_;
    bool stopped_ = false;
};

// The block that runs in this operating-system thread.
Block &block();
// The product itself, once its operands may be read. wgmma.cpp
void multiply(const Wgmma &product, int warp, Block &block);
// Runs every block of the grid; cudaErrorLaunchFailure where one was stopped.
cudaError_t run_grid(const char *kernel, dim3 grid, dim3 threads, int shared_bytes, const std::function<void()> &body);

// What a block may ask for on the device that the seed draws.
int shared_bytes_of_device();

// Clocks of all warps: the later of each.
void join(std::vector<uint32_t> &into, const std::vector<uint32_t> &other);
std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation

#define threadIdx (::emulation::block().current().index)
#define blockIdx (::emulation::block().index)
#define blockDim (::emulation::block().threads)
#define gridDim (::emulation::block().grid)
