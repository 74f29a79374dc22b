// The emulation of primitives/copy_async.cuh: the bytes are taken and land when the thread waits for their group.
#pragma once
#include "memory.cuh"

template <typename T>
void copy_async(const Shared<T> &to, int to_at, const Global<const T> &from, int64_t from_at, int valid,
                emulation::Where where = emulation::Where::current()) {
    constexpr int N = 16 / sizeof(T);
    if (valid < 0 || valid > N) emulation::block().fail(emulation::text("an asynchronous copy of %d elements", valid), where);
    T *target = to.inside(to_at, N, 16, "asynchronous copy", where);
    const T *source = valid > 0 ? from.checked(from_at, valid, 16, "asynchronous copy", where) : nullptr;
    emulation::block().issue({reinterpret_cast<unsigned char *>(target), reinterpret_cast<const unsigned char *>(source),
                              valid * static_cast<int>(sizeof(T)), where});
}
inline void copy_async_commit() { emulation::block().commit(); }
template <int LEFT>
void copy_async_wait(emulation::Where where = emulation::Where::current()) {
    emulation::block().wait(LEFT, where);
}
