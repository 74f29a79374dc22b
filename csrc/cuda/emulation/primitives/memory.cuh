// The emulation of primitives/memory.cuh: spans that know their extent.
#pragma once
#include "../runtime.h"

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

template <typename T>
class Global {
    using Where = emulation::Where;

public:
    Global() = default;
    Global(T *base, int64_t count) : base_(base), count_(count) {}
    explicit operator bool() const { return base_ != nullptr; }
    T *address() const { return base_; }

    T get(int64_t at, Where where = Where::current()) const { return *checked(at, 1, sizeof(T), "read", where); }
    void set(int64_t at, T value, Where where = Where::current()) const { *checked(at, 1, sizeof(T), "write", where) = value; }
    template <typename P>
    P load_as(int64_t at, Where where = Where::current()) const {
        P value;
        std::memcpy(&value, checked(at, sizeof value / sizeof(T), sizeof value, "read", where), sizeof value);
        return value;
    }
    template <typename P>
    void store_as(int64_t at, const P &value, Where where = Where::current()) const {
        std::memcpy(checked(at, sizeof value / sizeof(T), sizeof value, "write", where), &value, sizeof value);
    }
    template <int N>
    Pack<T, N> load(int64_t at, Where where = Where::current()) const {
        return load_as<Pack<T, N>>(at, where);
    }
    template <int N>
    void store(int64_t at, const Pack<T, N> &value, Where where = Where::current()) const {
        store_as(at, value, where);
    }
    Global from(int64_t at) const { return Global(base_ + at, count_ - at, before_ + at); }
    template <typename U>
    Global<U> as() const {
        return Global<U>(reinterpret_cast<U *>(base_), count_ * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(U)),
                         before_ * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(U)));
    }

    // The address of element `at`, where `elements` from there on lie inside and the address is a multiple of `alignment`.
    T *checked(int64_t at, int64_t elements, size_t alignment, const char *verb, const Where &where) const {
        if (at < -before_ || at + elements > count_)
            emulation::block().fail(emulation::text("out of bounds: %s of %lld elements at %lld of a buffer that ends at %lld", verb,
                                                    static_cast<long long>(elements), static_cast<long long>(at + before_),
                                                    static_cast<long long>(count_ + before_)),
                                    where);
        if (reinterpret_cast<uintptr_t>(base_ + at) % alignment != 0)
            emulation::block().fail(emulation::text("misaligned: %s of %zu bytes at element %lld of a buffer, address %p", verb, alignment,
                                                    static_cast<long long>(at + before_), static_cast<const void *>(base_ + at)),
                                    where);
        return base_ + at;
    }

private:
    template <typename U>
    friend class Global;
    Global(T *base, int64_t count, int64_t before) : base_(base), count_(count), before_(before) {}

    T *base_ = nullptr;
    int64_t count_ = 0;   // elements from base_ on
    int64_t before_ = 0;  // elements of the buffer before base_
};

template <typename T>
class Shared {
    using Where = emulation::Where;

public:
    Shared(T *base, int count) : base_(base), count_(count) {}

    T get(int at, Where where = Where::current()) const { return *checked(at, 1, sizeof(T), false, where); }
    void set(int at, T value, Where where = Where::current()) const { *checked(at, 1, sizeof(T), true, where) = value; }
    template <typename P>
    P load_as(int at, Where where = Where::current()) const {
        P value;
        std::memcpy(&value, checked(at, static_cast<int>(sizeof value / sizeof(T)), sizeof value, false, where), sizeof value);
        return value;
    }
    template <int N>
    Pack<T, N> load(int at, Where where = Where::current()) const {
        return load_as<Pack<T, N>>(at, where);
    }
    template <int N>
    void store(int at, const Pack<T, N> &value, Where where = Where::current()) const {
        std::memcpy(checked(at, N, sizeof value, true, where), &value, sizeof value);
    }

    template <typename U>
    Shared<U> as() const {
        return Shared<U>(reinterpret_cast<U *>(base_), static_cast<int>(static_cast<size_t>(count_) * sizeof(T) / sizeof(U)));
    }
    // The same memory from element `at` on.
    Shared from(int at) const { return Shared(base_ + at, count_ - at); }
    const void *begin() const { return base_; }
    int bytes() const { return count_ * static_cast<int>(sizeof(T)); }
    T *inside(int at, int elements, size_t alignment, const char *verb, const Where &where) const {
        if (at < 0 || at + elements > count_)
            emulation::block().fail(
                emulation::text("out of bounds: %s of %d elements at %d of a shared array of %d", verb, elements, at, count_), where);
        if (reinterpret_cast<uintptr_t>(base_ + at) % alignment != 0)
            emulation::block().fail(emulation::text("misaligned: %s of %zu bytes at element %d of a shared array", verb, alignment, at), where);
        return base_ + at;
    }

private:
    T *checked(int at, int elements, size_t alignment, bool writes, const Where &where) const {
        T *address = inside(at, elements, alignment, writes ? "write" : "read", where);
        emulation::block().check_shared(address, elements * static_cast<int>(sizeof(T)), writes, where);
        return address;
    }

    T *base_;
    int count_;
};

template <int ALIGNMENT = 128>
class SharedArena {
public:
    SharedArena() { emulation::block().align(ALIGNMENT); }
    template <typename T>
    Shared<T> take(int count, emulation::Where where = emulation::Where::current()) {
        emulation::Block &block = emulation::block();
        T *base = reinterpret_cast<T *>(block.dynamic_shared() + used_);
        const int bytes = count * static_cast<int>(sizeof(T));
        used_ += (bytes + 15) / 16 * 16;
        if (used_ > (block.dynamic_bytes() + 15) / 16 * 16)
            block.fail(emulation::text("%d bytes of dynamic shared memory, and the launch gave %d", used_, block.dynamic_bytes()), where);
        return Shared<T>(base, count);
    }

private:
    int used_ = 0;
};

template <typename T, int COUNT, int NUMBER = 0>
Shared<T> static_shared() {
    static const char tag = 0;
    return Shared<T>(reinterpret_cast<T *>(emulation::block().static_shared(&tag, COUNT * static_cast<int>(sizeof(T)))), COUNT);
}

// Blocks and threads run one at a time: a plain sum is atomic.
template <typename T>
T atomic_add(const Global<T> &to, int64_t at, T value, emulation::Where where = emulation::Where::current()) {
    T *address = to.checked(at, 1, sizeof(T), "atomic add", where);
    const T before = *address;
    *address = before + value;
    return before;
}
