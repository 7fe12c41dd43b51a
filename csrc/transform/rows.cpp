// Putting back the rows that a transform is to leave as they were.
#include <cstring>

#include "common/parallel.h"
#include "common/platform.h"
#include "common/simd.h"
#include "common/source.h"

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
