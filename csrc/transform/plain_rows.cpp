#include "transform/plain_rows.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "quantize/range.h"

namespace fqt {

PlainRows::PlainRows(const Source& source, int64_t rows, int64_t columns, int threads)
    : lo(rows), hi(rows), size(rows), middle(rows), half(rows), finite(true) {
  fqt_range_rows(&source, rows, columns, lo.data(), hi.data(), threads);
  for (int64_t r = 0; r < rows; ++r) {
    finite = finite && std::isfinite(lo[r]) && std::isfinite(hi[r]);
    const bool wide = hi[r] * 0.5f - lo[r] * 0.5f > FLT_MAX / 4;
    half[r] = wide ? 0.5f : 1.0f;
    size[r] = wide ? hi[r] * 0.5f - lo[r] * 0.5f : hi[r] - lo[r];
    middle[r] = constant(r) ? lo[r] : lo[r] * 0.5f + hi[r] * 0.5f;
  }
}

// Three passes over the bits, of which the order of floats ≥ 0 is that of integers.
std::vector<int64_t> PlainRows::by_size() const {
  struct Entry {
    uint32_t key;
    int32_t row;
  };
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  const int64_t n = size.size();
  std::vector<Entry> from(n), to(n);
  for (int64_t r = 0; r < n; ++r) {
    uint32_t bits;
    std::memcpy(&bits, &size[r], sizeof bits);
    from[r] = {~bits, static_cast<int32_t>(r)};
  }
  for (int shift = 0; shift < 32; shift += kBits) {
    std::vector<int64_t> next(kBuckets + 1);
    for (const Entry& e : from) ++next[(e.key >> shift & (kBuckets - 1)) + 1];
    for (int b = 0; b < kBuckets; ++b) next[b + 1] += next[b];
    for (const Entry& e : from) to[next[e.key >> shift & (kBuckets - 1)]++] = e;
    from.swap(to);
  }
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = from[i].row;
  return order;
}

}  // namespace fqt
