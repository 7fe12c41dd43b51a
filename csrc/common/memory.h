// Uninitialised memory that frees itself.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fqt {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

// On a cache line, readable beyond its end up to the next one; null when there is none.
template <class T>
Buffer<T> make_buffer(int64_t n) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 1 + 63) / 64 * 64)));
}

}  // namespace fqt
