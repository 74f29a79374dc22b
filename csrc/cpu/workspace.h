// Scratch of many megabytes, kept from one call to the next.
//
// Memory fresh from the system is cleared page by page as it is first touched, which can take as long as what is computed in it. So the last
// workspace stays with the process, up to kKept bytes of it. Nothing in it is read by a later call. Calls at the same time have one each.
#pragma once
#include "simd.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

FASTATTN_NAMESPACE_BEGIN

class Workspace {
  public:
    explicit Workspace(int64_t floats) {
        const int64_t bytes = round_up(floats * 4 + kHeader, kHugePage);
        base_ = __atomic_exchange_n(&spare, nullptr, __ATOMIC_ACQUIRE);
        if (base_ && size() < bytes) free(base_), base_ = nullptr;
        if (!base_) {
            base_ = (char *)aligned_alloc(kHugePage, (size_t)bytes);
            if (!base_) return;
#if defined(__linux__)
            madvise(base_, (size_t)bytes, MADV_HUGEPAGE);  // far fewer misses of the address cache
#endif
            size() = bytes;
        }
        next_ = (float *)(base_ + kHeader);
    }
    ~Workspace() {
        if (base_ && size() <= kKept) base_ = __atomic_exchange_n(&spare, base_, __ATOMIC_ACQ_REL);
        free(base_);
    }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;

    bool failed() const { return base_ == nullptr; }
    float *take(int64_t floats) {
        float *piece = next_;
        next_ += round_up(floats, 16);
        return piece;
    }

  private:
    static constexpr int64_t kHugePage = 1 << 21, kKept = 128 << 20, kHeader = 64;
    static inline char *spare = nullptr;

    int64_t &size() { return *(int64_t *)base_; }

    char *base_;
    float *next_ = nullptr;
};

FASTATTN_NAMESPACE_END
