// Which tap of its window a maximum was, and back (src/fqt/kernels/pooling.py).
#include <memory>
#include <new>

#include "common/parallel.h"
#include "common/platform.h"
#include "common/simd.h"

using namespace fqt;

namespace fqt {

// Of the height and of the width; `width` is the input's.
struct Windows {
  int32_t size[2], stride[2], padding[2], dilation[2];
  int64_t width;
};

}  // namespace fqt

namespace {

// f(where a row of windows begins, the place of its topmost row, the first columns); places (outer, rows, columns,
// inner). A window may begin in the padding: the place and the column are negative then.
template <class F>
int each_row(const Windows& w, int64_t outer, int64_t rows, int64_t columns, int64_t inner, int threads, const F& f) {
  const int64_t length = columns * inner;
  const std::unique_ptr<int32_t[]> across(new (std::nothrow) int32_t[length + W]());
  if (!across) return kNoMemory;
  for (int64_t j = 0; j < length; ++j) across[j] = static_cast<int32_t>(j / inner * w.stride[1] - w.padding[1]);
  parallel_for(outer * rows, outer * rows * length, threads, [&](int64_t row) {
    const int64_t down = row % rows * w.stride[0] - w.padding[0];
    f(row * length, down * w.width, across.get());
  });
  return kDone;
}

// How many of the multiples 1·step … (count − 1)·step are not above each lane.
inline vi steps_below(vi away, int32_t step, int count) {
  vi found = {};
  for (int k = 1; k < count; ++k) found -= (vi)(away >= k * step);
  return found;
}

}  // namespace

// Taps of places; a window's taps lie less than 2³¹ apart and are at most 256.
FQT_API int fqt_taps(const int64_t* places, int64_t outer, int64_t rows, int64_t columns, int64_t inner,
                     const Windows* windows, uint8_t* taps, int threads) {
  const Windows& w = *windows;
  const int64_t length = columns * inner;
  const int32_t down = static_cast<int32_t>(w.width) * w.dilation[0];
  return each_row(w, outer, rows, columns, inner, threads, [&](int64_t start, int64_t top, const int32_t* across) {
    for (int64_t j = 0; j < length; j += W) {
      const int n = length - j < W ? static_cast<int>(length - j) : W;
      int32_t below[W] = {};
      if (n == W) {  // a count that the compiler knows is one vector
        for (int i = 0; i < W; ++i) below[i] = static_cast<int32_t>(places[start + j + i] - top);
      } else {
        for (int i = 0; i < n; ++i) below[i] = static_cast<int32_t>(places[start + j + i] - top);
      }
      // The column of a place is one of the input: the row is right before the window's own column is taken off.
      const vi away = load<vi>(below), row = steps_below(away, down, w.size[0]);
      const vi column = steps_below(away - row * down - load<vi>(across + j), w.dilation[1], w.size[1]);
      store_part(taps + start + j, to_bytes(row * w.size[1] + column), n);
    }
  });
}

// Places of taps.
FQT_API int fqt_places(const uint8_t* taps, int64_t outer, int64_t rows, int64_t columns, int64_t inner,
                       const Windows* windows, int64_t* places, int threads) {
  const Windows& w = *windows;
  const int64_t length = columns * inner;
  int32_t of_tap[256] = {};
  for (int tap = 0; tap < w.size[0] * w.size[1] && tap < 256; ++tap) {
    of_tap[tap] = tap / w.size[1] * w.dilation[0] * static_cast<int32_t>(w.width) + tap % w.size[1] * w.dilation[1];
  }
  return each_row(w, outer, rows, columns, inner, threads, [&](int64_t start, int64_t top, const int32_t* across) {
    for (int64_t j = 0; j < length; ++j) places[start + j] = top + across[j] + of_tap[taps[start + j]];
  });
}
