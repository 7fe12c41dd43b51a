// What a transform does to single rows: scaling, undoing it, putting plain rows back.
#include <cstring>
#include <limits>

#include "parallel.h"
#include "platform.h"
#include "simd.h"

using namespace fqt;

namespace {

// Calls f(row, first column, end column) for pieces of rows that are worth a thread's while.
template <class F>
void for_pieces(int64_t rows, int64_t columns, int threads, const F& f) {
  constexpr int64_t kPiece = 1 << 13;
  const int64_t pieces = ceil_div(columns, kPiece);
  parallel_for(rows * pieces, rows * columns, threads, [&](int64_t item) {
    const int64_t first = item % pieces * kPiece;
    f(item / pieces, first, columns - first < kPiece ? columns : first + kPiece);
  });
}

}  // namespace

// out = (x · half − offset · half) · scale, with one half, offset and scale per row.
FQT_API int fqt_scale_rows(const float* x, int64_t rows, int64_t columns, const float* half, const float* offset,
                           const float* scale, float* out, int threads) {
  for_pieces(rows, columns, threads, [&](int64_t r, int64_t first, int64_t end) {
    const float h = half[r], o = offset[r] * h, s = scale[r];
    const float* from = x + r * columns;
    float* to = out + r * columns;
    for (int64_t j = first; j < end; ++j) to[j] = (from[j] * h - o) * s;
  });
  return kDone;
}

// out = y · scale + offset, clamped to the finite floats; NaN stays NaN.
FQT_API int fqt_unscale_rows(const float* y, int64_t rows, int64_t columns, const float* scale, const float* offset,
                             float* out, int threads) {
  for_pieces(rows, columns, threads, [&](int64_t r, int64_t first, int64_t end) {
    constexpr float kMax = std::numeric_limits<float>::max();
    const float s = scale[r], o = offset[r];
    const float* from = y + r * columns;
    float* to = out + r * columns;
    for (int64_t j = first; j < end; ++j) {
      float v = from[j] * s + o;
      v = v > kMax ? kMax : v;
      to[j] = v < -kMax ? -kMax : v;
    }
  });
  return kDone;
}

// Row r of y becomes row r of x unless keep[r].
FQT_API int fqt_replace_rows(float* y, int64_t rows, int64_t columns, const bool* keep, const float* x, int threads) {
  for_pieces(rows, columns, threads, [&](int64_t r, int64_t first, int64_t end) {
    if (!keep[r]) std::memcpy(y + r * columns + first, x + r * columns + first, (end - first) * sizeof(float));
  });
  return kDone;
}
