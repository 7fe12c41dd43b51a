// The variance of stochastic rounding, entry by entry and summed.
#include "variance.h"

#include "parallel.h"
#include "platform.h"

using namespace fqt;

namespace {

// p(1 − p), p the fraction of t.
inline vf unit_variance(vf t) {
  const vf p = fraction(t);
  return p * (1.0f - p);
}

// The same in units of 2⁻²⁴, to the nearest integer: at most 2²², so that 511 of them fit 31 bits.
inline vi counted_variance(vf t) { return round_nearest(unit_variance(t) * 0x1p24f); }

}  // namespace

int64_t fqt::sum_of_variances(const Source& source, int64_t start, int64_t n, const Groups& g, vf low, vf high) {
  float buffer[kVariancePiece + W];
  const float* x = values(source, start, n, buffer);
  vi sum{};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum += counted_variance(position(load<vf>(x + i), g, low, high));
  int64_t total = 0;
  for (int j = 0; j < W; ++j) total += sum[j];
  if (i < n) {
    const vi last = counted_variance(position(load_part<vf>(x + i, n - i), g, low, high));
    for (int64_t j = 0; j < n - i; ++j) total += last[j];
  }
  return total;
}


// out (rows, columns): p(1 − p) of each entry, p the fraction of its position.
FQT_API int fqt_code_variance(const float* x, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, float* out,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  parallel_for(rows, rows * columns, threads, [&](int64_t row) {
    const int64_t group = by_row ? row : 0;
    Groups g = by_column ? Groups{} : Groups::of(Group::of(step[group], offset[group]));
    const float* from = x + row * columns;
    float* to = out + row * columns;
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      if (by_column) g = Groups::of(load<vf>(step + j), load<vf>(offset + j));
      store(to + j, unit_variance(position(load<vf>(from + j), g, least_code, last_code)));
    }
    if (j < columns) {
      const int64_t n = columns - j;
      if (by_column) g = Groups::of(load_part<vf>(step + j, n), load_part<vf>(offset + j, n));
      store_part(to + j, unit_variance(position(load_part<vf>(from + j, n), g, least_code, last_code)), n);
    }
  });
  return kDone;
}

// sums: Σ p(1 − p) of every group, each entry rounded to units of 2⁻²⁴, so that the order of the sum does not matter.
// One number, one per row or one per column, like step and offset; fewer than 2⁴¹ entries.
FQT_API int fqt_variance_sums(const Source* source, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, int64_t* sums,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  constexpr int64_t kPiece = kVariancePiece;
  const int64_t groups = by_row ? rows : by_column ? columns : 1;
  for (int64_t g = 0; g < groups; ++g) sums[g] = 0;
  if (rows == 0 || columns == 0) return kDone;
  if (by_column) {
    constexpr int64_t kStrip = 1024;
    const int64_t strips = ceil_div(columns, kStrip), bands = 1 + rows * columns / (1 << 17) / strips;
    parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
      const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
      const int64_t band = item / strips, begin = rows * band / bands, end = rows * (band + 1) / bands;
      float buffer[kStrip + W];
      Groups groups[kStrip / W];
      for (int64_t j = 0; j < width; j += W) {
        const int64_t n = width - j < W ? width - j : W;
        groups[j / W] = Groups::of(load_part<vf>(step + first + j, n), load_part<vf>(offset + first + j, n));
      }
      int64_t total[kStrip] = {};
      for (int64_t start = begin; start < end; start += 256) {
        vi sum[kStrip / W] = {};
        for (int64_t r = start; r < end && r < start + 256; ++r) {
          const float* x = values(*source, r * columns + first, width, buffer);
          int64_t j = 0;
          for (; j + W <= width; j += W)
            sum[j / W] += counted_variance(position(load<vf>(x + j), groups[j / W], least_code, last_code));
          if (j < width) {
            const vf last = load_part<vf>(x + j, width - j);
            sum[j / W] += counted_variance(position(last, groups[j / W], least_code, last_code));
          }
        }
        for (int64_t j = 0; j < width; ++j) total[j] += sum[j / W][j % W];
      }
      for (int64_t j = 0; j < width; ++j) __atomic_fetch_add(sums + first + j, total[j], __ATOMIC_RELAXED);
    });
    return kDone;
  }
  // Rows, or pieces of all entries; integer sums may be added up in any order.
  const int64_t length = by_row ? columns : rows * columns, pieces = ceil_div(length, kPiece);
  const int64_t items = groups * pieces, per_item = 1 + kPiece / (length < kPiece ? length : kPiece);
  parallel_for(ceil_div(items, per_item), rows * columns, threads, [&](int64_t chunk) {
    for (int64_t item = chunk * per_item; item < items && item < (chunk + 1) * per_item; ++item) {
      const int64_t group = item / pieces, first = item % pieces * kPiece;
      const int64_t n = length - first < kPiece ? length - first : kPiece;
      const Groups g = Groups::of(Group::of(step[group], offset[group]));
      const int64_t total = sum_of_variances(*source, group * length + first, n, g, least_code, last_code);
      __atomic_fetch_add(sums + group, total, __ATOMIC_RELAXED);
    }
  });
  return kDone;
}
