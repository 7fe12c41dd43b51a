// What is quantized: float32 or bfloat16 values, each multiplied by its column's factor if there are factors.
//
// Kernels read it through a buffer in the first-level cache, so that each of them is written once, for floats.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/simd.h"

namespace fqt {

enum InType : int { kFloat32In = 0, kBfloat16In = 1 };

// The C interface's description. Entry i (row-major) is multiplied by factor[i mod period]; null is 1.
struct Source {
  const void* x;
  const float* factor;
  int64_t period;
  int32_t type;
};

// Asks for n entries from the flat index `start` on; they may lie beyond the end.
inline void prefetch(const Source& s, int64_t start, int64_t n) {
  const int64_t width = s.type == kFloat32In ? 4 : 2;
  const char* from = static_cast<const char*>(s.x) + start * width;
  for (int64_t i = 0; i < n * width; i += 64) __builtin_prefetch(from + i);
}

// n entries from the flat index `start`: where they lie, or made in `buffer` (n entries, and W more that are scratch).
inline const float* values(const Source& s, int64_t start, int64_t n, float* buffer) {
  if (s.type == kFloat32In && !s.factor) return static_cast<const float*>(s.x) + start;
  if (s.type == kFloat32In) {
    std::memcpy(buffer, static_cast<const float*>(s.x) + start, n * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(s.x) + start;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(buffer + i, from_bfloat16(load<vh>(from + i)));
    if (i < n) store(buffer + i, from_bfloat16(load_part<vh>(from + i, n - i)));
  }
  if (!s.factor) return buffer;
  for (int64_t i = 0; i < n;) {
    const int64_t at = (start + i) % s.period;
    const int64_t run = s.period - at < n - i ? s.period - at : n - i;
    const float* factor = s.factor + at;
    for (int64_t j = 0; j < run; ++j) buffer[i + j] *= factor[j];
    i += run;
  }
  return buffer;
}

}  // namespace fqt
