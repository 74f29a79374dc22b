// The emulation of primitives/mbarrier.cuh.
#pragma once
#include "memory.cuh"

class Barriers {
    using Where = emulation::Where;

public:
    explicit Barriers(const Shared<uint64_t> &at) : at_(at) {}

    void prepare(int barrier, unsigned arrivals, Where where = Where::current()) const {
        emulation::block().prepare_barrier(address(barrier, where), static_cast<int>(arrivals), where);
    }
    void arrive(int barrier, Where where = Where::current()) const { emulation::block().arrive(address(barrier, where), where); }
    bool is_complete(int barrier, unsigned parity, Where where = Where::current()) const {
        return emulation::block().is_phase_complete(address(barrier, where), parity, where);
    }
    void wait(int barrier, unsigned parity, Where where = Where::current()) const {
        emulation::block().wait_phase(address(barrier, where), parity, where);
    }

private:
    const void *address(int barrier, const Where &where) const { return at_.inside(barrier, 1, sizeof(uint64_t), "barrier", where); }

    Shared<uint64_t> at_;
};
