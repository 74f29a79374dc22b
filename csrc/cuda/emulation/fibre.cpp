#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

namespace emulation {
namespace {

constexpr size_t STACK_BYTES = 128 * 1024;  // reserved; only touched pages exist

class Stacks {
public:
    ~Stacks() {
        for (void *stack : stacks_) munmap(stack, STACK_BYTES);
    }
    char *get(size_t number) {
        while (stacks_.size() <= number) {
            void *stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (stack == MAP_FAILED) throw std::bad_alloc();
            mprotect(stack, 4096, PROT_NONE);  // an overflow faults instead of reaching another stack
            stacks_.push_back(stack);
        }
        return static_cast<char *>(stacks_[number]);
    }

private:
    std::vector<void *> stacks_;
};

thread_local Stacks stacks;

}  // namespace

#ifdef __x86_64__

// Saves what a call must preserve, exchanges stacks and returns into the other side.
extern "C" void fastattn_emulation_switch(void **from, void *to);
extern "C" void fastattn_emulation_start();
asm(R"(
    .text
    .type fastattn_emulation_switch, @function
fastattn_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fastattn_emulation_switch, .-fastattn_emulation_switch
    .type fastattn_emulation_start, @function
fastattn_emulation_start:
    movq %r13, %rdi
    callq *%r12
    ud2
    .size fastattn_emulation_start, .-fastattn_emulation_start
)");

void Fibre::prepare(size_t number, void (*entry)(void *), void *argument) {
    auto top = reinterpret_cast<uintptr_t>(stacks.get(number) + STACK_BYTES) & ~uintptr_t(15);
    void **stack = reinterpret_cast<void **>(top);
    *--stack = nullptr;  // the stack is a multiple of 16 when fastattn_emulation_start begins to call
    *--stack = nullptr;
    *--stack = reinterpret_cast<void *>(&fastattn_emulation_start);
    *--stack = nullptr;                            // rbp
    *--stack = nullptr;                            // rbx
    *--stack = reinterpret_cast<void *>(entry);    // r12
    *--stack = argument;                           // r13
    *--stack = nullptr;                            // r14
    *--stack = nullptr;                            // r15
    place_ = stack;
}

void Fibre::enter(void **from) { fastattn_emulation_switch(from, place_); }
void Fibre::leave(void *to) { fastattn_emulation_switch(&place_, to); }

#else

void Fibre::prepare(size_t number, void (*entry)(void *), void *argument) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stacks.get(number);
    context_.uc_stack.ss_size = STACK_BYTES;
    context_.uc_link = nullptr;
    makecontext(&context_, reinterpret_cast<void (*)()>(entry), 1, argument);  // one pointer argument: as the ABIs of Linux pass it
}

void Fibre::enter(void **from) {
    ucontext_t caller;
    caller_ = &caller;
    *from = caller_;
    swapcontext(&caller, &context_);
}
void Fibre::leave(void *) { swapcontext(&context_, caller_); }

#endif

}  // namespace emulation
