// Walsh–Hadamard butterflies along rows: over runs of neighbouring columns, block by block.
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/platform.h"
#include "common/source.h"

using namespace fqt;

namespace {

#if !defined(__clang__)
// Lane i of the result is lane i ^ S.
template <int S>
inline vf partner(vf v) {
  vi order;
  for (int i = 0; i < W; ++i) order[i] = i ^ S;
  return __builtin_shuffle(v, order);
}
#else
template <int S>
inline vf partner(vf v) {
  vf p;
  for (int i = 0; i < W; ++i) p[i] = v[i ^ S];
  return p;
}
#endif

// One stage inside a vector: lanes (i, i + S) become (a + b, a − b).
template <int S>
inline vf stage_in(vf v) {
  vf sign;
  for (int i = 0; i < W; ++i) sign[i] = i & S ? -1.0f : 1.0f;
  return partner<S>(v) + sign * v;
}

// The stages of strides 1, 2, … inside vectors, of a block of at least W entries.
inline vf stages_in(vf v) {
  v = stage_in<1>(v);
  v = stage_in<2>(v);
  if constexpr (W > 4) v = stage_in<4>(v);
  if constexpr (W > 8) v = stage_in<8>(v);
  return v;
}

// In place, size a power of two.
void butterflies(float* x, int64_t size) {
  int64_t stride = 1;
  if (size >= W) {
    for (int64_t i = 0; i < size; i += W) store(x + i, stages_in(load<vf>(x + i)));
    for (stride = W; stride < size; stride *= 2) {
      for (int64_t base = 0; base < size; base += 2 * stride) {
        for (int64_t i = base; i < base + stride; i += W) {
          const vf a = load<vf>(x + i), b = load<vf>(x + i + stride);
          store(x + i, a + b);
          store(x + i + stride, a - b);
        }
      }
    }
    return;
  }
  for (; stride < size; stride *= 2) {
    for (int64_t base = 0; base < size; base += 2 * stride) {
      for (int64_t i = base; i < base + stride; ++i) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
}

}  // namespace

// Every run of `period` neighbouring entries: what comes in (with its factors), through the butterflies of blocks of the
// given sizes, powers of two that sum to period; then times `after` (null: 1). `runs` of them.
// kBadIndex unless the sizes are such.
FQT_API int fqt_rotate(const Source* source, int64_t runs, int64_t period, const int64_t* sizes, int64_t blocks,
                       const float* after, float* out, int threads) {
  int64_t sum = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (sizes[b] < 1 || (sizes[b] & (sizes[b] - 1))) return kBadIndex;
    sum += sizes[b];
  }
  if (sum != period) return kBadIndex;
  constexpr int64_t kPiece = 1024;  // entries that are read at a time
  parallel_for(runs, runs * period, threads, [&](int64_t run) {
    alignas(64) float buffer[kPiece + W];
    float* to = out + run * period;
    const int64_t start = run * period;
    for (int64_t done = 0; done < period;) {
      const int64_t n = period - done < kPiece ? period - done : kPiece;
      const float* x = values(*source, start + done, n, buffer);
      std::memcpy(to + done, x, n * sizeof(float));
      done += n;
    }
    int64_t first = 0;
    for (int64_t b = 0; b < blocks; first += sizes[b], ++b) {
      butterflies(to + first, sizes[b]);
      if (!after) continue;
      for (int64_t i = first; i < first + sizes[b]; ++i) to[i] *= after[i];
    }
  });
  return kDone;
}
