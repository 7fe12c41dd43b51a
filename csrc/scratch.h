// Memory of a thread's own that is kept for its next call: a fresh block costs a page fault per four kilobytes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fqt {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};

// n floats, aligned for vectors, with unknown content; null when there is no memory. The next call ends its life.
inline float* thread_scratch(int64_t n) {
  static thread_local std::unique_ptr<float[], FreeMemory> memory;
  static thread_local int64_t held = 0;
  if (n > held) {
    memory.reset();
    held = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64)));
    if (memory) held = n;
  }
  return memory.get();
}

}  // namespace fqt
