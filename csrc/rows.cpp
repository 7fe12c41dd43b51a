// What a transform does to single rows: scaling, undoing it, putting plain rows back.
#include <cstring>
#include <limits>

#include "epilogue.h"
#include "parallel.h"
#include "platform.h"
#include "simd.h"
#include "source.h"

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
FQT_API int fqt_scale_rows(const Source* source, int64_t rows, int64_t columns, const float* half, const float* offset,
                           const float* scale, float* out, int threads) {
  for_pieces(rows, columns, threads, [&](int64_t r, int64_t first, int64_t end) {
    constexpr int64_t kBuffer = 1 << 11;
    float buffer[kBuffer + W];
    const float h = half[r], o = offset[r] * h, s = scale[r];
    for (int64_t start = first; start < end; start += kBuffer) {
      const int64_t n = end - start < kBuffer ? end - start : kBuffer;
      const float* from = values(*source, r * columns + start, n, buffer);
      float* to = out + r * columns + start;
      for (int64_t j = 0; j < n; ++j) to[j] = (from[j] * h - o) * s;
    }
  });
  return kDone;
}

// out = y · scale + offset · right, clamped to the finite floats; NaN stays NaN. scale and offset: one per row;
// right: one per column, or null for 1. out_type: kFloat32 or kBfloat16.
FQT_API int fqt_unscale_rows(const float* y, int64_t rows, int64_t columns, const float* scale, const float* offset,
                             const float* right, int out_type, void* out, int threads) {
  for_pieces(rows, columns, threads, [&](int64_t r, int64_t first, int64_t end) {
    constexpr float kMax = std::numeric_limits<float>::max();
    constexpr int64_t kBuffer = 1 << 11;
    float buffer[kBuffer + W];
    const float s = scale[r], o = offset[r];
    for (int64_t start = first; start < end; start += kBuffer) {
      const int64_t n = end - start < kBuffer ? end - start : kBuffer;
      const float* from = y + r * columns + start;
      float* to = out_type == kFloat32 ? static_cast<float*>(out) + r * columns + start : buffer;
      for (int64_t j = 0; j < n; ++j) {
        float v = from[j] * s + (right ? o * right[start + j] : o);
        v = v > kMax ? kMax : v;
        to[j] = v < -kMax ? -kMax : v;
      }
      if (out_type == kFloat32) continue;
      uint16_t* rounded = static_cast<uint16_t*>(out) + r * columns + start;
      int64_t j = 0;
      for (; j + W <= n; j += W) store(rounded + j, to_bfloat16(load<vf>(buffer + j)));
      if (j < n) store_part(rounded + j, to_bfloat16(load_part<vf>(buffer + j, n - j)), n - j);
    }
  });
  return kDone;
}

// Row r of y becomes row r of the source unless keep[r].
FQT_API int fqt_replace_rows(float* y, int64_t rows, int64_t columns, const bool* keep, const Source* source,
                             int threads) {
  for_pieces(rows, columns, threads, [&](int64_t r, int64_t first, int64_t end) {
    constexpr int64_t kBuffer = 1 << 11;
    float buffer[kBuffer + W];
    if (keep[r]) return;
    for (int64_t start = first; start < end; start += kBuffer) {
      const int64_t n = end - start < kBuffer ? end - start : kBuffer, at = r * columns + start;
      std::memcpy(y + at, values(*source, at, n, buffer), n * sizeof(float));
    }
  });
  return kDone;
}
