// The emulation of primitives/copy_async.cuh: the bytes are taken and land when the thread waits for their group.
#pragma once
#include "memory.cuh"

template <typename T>
void copy_async(const Shared<T> &to, int to_at, const Global<const T> &from, int64_t from_at, emulation::Where where = emulation::Where::current()) {
    constexpr int N = 16 / sizeof(T);
    T *target = to.inside(to_at, N, 16, "asynchronous copy", where);
    const T *source = from.checked(from_at, N, 16, "asynchronous copy", where);
    emulation::block().issue({reinterpret_cast<unsigned char *>(target), reinterpret_cast<const unsigned char *>(source), where});
}
inline void copy_async_commit() { emulation::block().commit(); }
template <int LEFT>
void copy_async_wait(emulation::Where where = emulation::Where::current()) {
    emulation::block().wait(LEFT, where);
}
