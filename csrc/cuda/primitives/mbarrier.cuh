// mbarrier (compute capability 9.0): a barrier in shared memory of which threads arrive without waiting, and wait without arriving.
//
// It counts arrivals; the last one of `arrivals` completes a phase, and the next begins. Phases have the parities 0, 1, 0 ... What a thread did
// before it arrived is seen by those who waited for that phase.
#pragma once
#include <cuda_runtime.h>

#include "memory.cuh"

class Barriers {
public:
    // COUNT barriers from `at` on.
    __device__ explicit Barriers(const Shared<uint64_t> &at) : at_(at) {}

    // By one thread; a barrier of the block lies between this and the first use.
    __device__ __forceinline__ void prepare(int barrier, unsigned arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at_.address(barrier)), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive(int barrier) const {
        asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(at_.address(barrier)) : "memory");
    }
    // Whether the phase of this parity is complete, as wait() has it.
    __device__ __forceinline__ bool is_complete(int barrier, unsigned parity) const {
        unsigned complete;
        asm volatile("{\n.reg .pred complete;\nmbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\nselp.u32 %0, 1, 0, complete;\n}"
                     : "=r"(complete)
                     : "r"(at_.address(barrier)), "r"(parity)
                     : "memory");
        return complete != 0;
    }
    // Returns once the phase of this parity is complete. Of a barrier that is new the one before the first, of parity 1, counts as complete.
    __device__ __forceinline__ void wait(int barrier, unsigned parity) const {
        unsigned complete = 0;
        do {
            asm volatile(
                "{\n.reg .pred complete;\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\nselp.u32 %0, 1, 0, complete;\n}"
                : "=r"(complete)
                : "r"(at_.address(barrier)), "r"(parity)
                : "memory");
        } while (complete == 0);
    }

private:
    Shared<uint64_t> at_;
};
