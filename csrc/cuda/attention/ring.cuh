// Rings: places in shared memory that some threads fill and others read, step after step, told by barriers that lie there too.
//
// A place of a ring of STAGES is full once those who fill it have arrived for the (step / STAGES)-th time, and empty again once those who read it
// have. Copies are cp.async: what a thread copied it tells itself, once it has come.
#pragma once
#include <primitives/copy_async.cuh>
#include <primitives/mbarrier.cuh>
#include <primitives/threads.cuh>
#include <primitives/wgmma.cuh>

// This thread's copies have come, all but those of the LEFT last groups, and what it wrote may be read by products.
template <int LEFT>
__device__ __forceinline__ void complete_copies() {
    copy_async_wait<LEFT>();
    wgmma_share();
}

// Two rings whose places go together by steps.
template <int STAGES>
class Rings {
public:
    static constexpr int BARRIERS = 4 * STAGES;

    __device__ __forceinline__ explicit Rings(const Shared<uint64_t> &at) : barriers_(at) {}

    // By one thread; a barrier of the block lies between this and the first use. Of who reads only the first lane of each warp arrives.
    __device__ __forceinline__ void prepare(int fillers, int readers) const {
        for (int place = 0; place < 2 * STAGES; place++) {
            barriers_.prepare(FULL + place, static_cast<unsigned>(fillers));
            barriers_.prepare(EMPTY + place, static_cast<unsigned>(readers / WARP));
        }
    }
    __device__ __forceinline__ void tell_full(int ring, int step) const { barriers_.arrive(FULL + place(ring, step)); }
    __device__ __forceinline__ void wait_full(int ring, int step) const { barriers_.wait(FULL + place(ring, step), step / STAGES & 1); }
    __device__ __forceinline__ bool is_empty(int ring, int step) const {
        return barriers_.is_complete(EMPTY + place(ring, step), (step / STAGES & 1) ^ 1);
    }
    __device__ __forceinline__ void wait_empty(int ring, int step) const { barriers_.wait(EMPTY + place(ring, step), (step / STAGES & 1) ^ 1); }
    // This warp is done with a place.
    __device__ __forceinline__ void release(int ring, int step) const {
        if (threadIdx.x % WARP == 0) barriers_.arrive(EMPTY + place(ring, step));
    }

private:
    enum { FULL = 0, EMPTY = 2 * STAGES };

    static __device__ __forceinline__ int place(int ring, int step) { return ring * STAGES + step % STAGES; }

    Barriers barriers_;
};

// How a thread fills such rings: of each step a place of ring 0, then one of ring 1. As many as AHEAD are under way beside the one that is told next.
// What has come is told before an empty place is waited for: where products are what all wait for, nobody waits for a copy that is there.
template <int STAGES, int AHEAD>
class RingFiller {
public:
    __device__ __forceinline__ explicit RingFiller(const Rings<STAGES> &rings) : rings_(rings) {}

    // Returns once the next place is empty.
    __device__ __forceinline__ void begin() {
        if (told_ < load_ && !rings_.is_empty(load_ % 2, load_ / 2)) tell_all();
        rings_.wait_empty(load_ % 2, load_ / 2);
    }
    // All copies into that place are issued, and whatever else belongs to it is written.
    __device__ __forceinline__ void end() {
        copy_async_commit();
        if (load_++ - told_ < AHEAD) return;
        complete_copies<AHEAD>();
        tell_next();
    }
    __device__ __forceinline__ void tell_all() {
        complete_copies<0>();
        while (told_ < load_) tell_next();
    }

private:
    __device__ __forceinline__ void tell_next() {
        rings_.tell_full(told_ % 2, told_ / 2);
        told_++;
    }

    const Rings<STAGES> &rings_;
    int load_ = 0, told_ = 0;
};
