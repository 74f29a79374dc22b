// A fibre: a stack of its own, left and entered by saving and loading six registers (x86-64; elsewhere by ucontext).
#pragma once
#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {

// Stacks are kept by the operating-system thread and used again.
class Fibre {
public:
    // The next switch to this fibre calls entry(argument), which never returns, on stack `number` of this thread.
    void prepare(size_t number, void (*entry)(void *), void *argument);
    // Leaves the caller, whose place is kept in `from`, for this fibre. And back.
    void enter(void **from);
    void leave(void *to);

private:
#ifdef __x86_64__
    void *place_ = nullptr;
#else
    ucontext_t context_;
    ucontext_t *caller_ = nullptr;
#endif
};

}  // namespace emulation
