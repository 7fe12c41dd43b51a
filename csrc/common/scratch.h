// Memory of a thread's own that is kept for its next call: a fresh block costs a page fault per four kilobytes.
#pragma once

#include "common/memory.h"

namespace fqt {

// n floats, aligned for vectors, with unknown content; null when there is no memory. The next call ends its life.
inline float* thread_scratch(int64_t n) {
  static thread_local Buffer<float> memory;
  static thread_local int64_t held = 0;
  if (n > held) {
    memory.reset();
    held = 0;
    memory = make_buffer<float>(n);
    if (memory) held = n;
  }
  return memory.get();
}

}  // namespace fqt
