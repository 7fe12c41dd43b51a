// The variance of stochastic rounding, entry by entry and summed.
#include "quantize/variance.h"

#include "common/parallel.h"
#include "common/platform.h"

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

template <int G>
void fqt::sums_of_variances(const Source& source, int64_t start, int64_t n, const Groups (&g)[G], vf low, vf high,
                            int64_t (&total)[G]) {
  float buffer[kVariancePiece + W];
  const float* x = values(source, start, n, buffer);
  vi sum[G] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf value = load<vf>(x + i);
    for (int k = 0; k < G; ++k) sum[k] += counted_variance(position(value, g[k], low, high));
  }
  for (int k = 0; k < G; ++k) {
    total[k] = 0;
    for (int j = 0; j < W; ++j) total[k] += sum[k][j];
    if (i < n) {
      const vi last = counted_variance(position(load_part<vf>(x + i, n - i), g[k], low, high));
      for (int64_t j = 0; j < n - i; ++j) total[k] += last[j];
    }
  }
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

template <int G>
void fqt::sum_variances(const Source& source, int64_t rows, int64_t columns, const Grid (&grids)[G], bool by_row,
                        bool by_column, int low, int high, int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  constexpr int64_t kPiece = kVariancePiece;
  const int64_t groups = by_row ? rows : by_column ? columns : 1;
  for (const Grid& grid : grids) {
    for (int64_t g = 0; g < groups; ++g) grid.sums[g] = 0;
  }
  if (rows == 0 || columns == 0) return;
  if (by_column) {
    constexpr int64_t kStrip = 1024;
    const int64_t strips = ceil_div(columns, kStrip), bands = 1 + rows * columns / (1 << 17) / strips;
    parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
      const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
      const int64_t band = item / strips, begin = rows * band / bands, end = rows * (band + 1) / bands;
      float buffer[kStrip + W];
      Groups groups[G][kStrip / W];
      for (int64_t j = 0; j < width; j += W) {
        const int64_t n = width - j < W ? width - j : W;
        for (int k = 0; k < G; ++k) {
          const float *step = grids[k].step + first + j, *offset = grids[k].offset + first + j;
          groups[k][j / W] = Groups::of(load_part<vf>(step, n), load_part<vf>(offset, n));
        }
      }
      int64_t total[G][kStrip] = {};
      for (int64_t start = begin; start < end; start += 256) {
        vi sum[G][kStrip / W] = {};
        for (int64_t r = start; r < end && r < start + 256; ++r) {
          const float* x = values(source, r * columns + first, width, buffer);
          int64_t j = 0;
          for (; j + W <= width; j += W) {
            const vf value = load<vf>(x + j);
            for (int k = 0; k < G; ++k)
              sum[k][j / W] += counted_variance(position(value, groups[k][j / W], least_code, last_code));
          }
          if (j < width) {
            const vf last = load_part<vf>(x + j, width - j);
            for (int k = 0; k < G; ++k)
              sum[k][j / W] += counted_variance(position(last, groups[k][j / W], least_code, last_code));
          }
        }
        for (int k = 0; k < G; ++k) {
          for (int64_t j = 0; j < width; ++j) total[k][j] += sum[k][j / W][j % W];
        }
      }
      for (int k = 0; k < G; ++k) {
        for (int64_t j = 0; j < width; ++j) __atomic_fetch_add(grids[k].sums + first + j, total[k][j], __ATOMIC_RELAXED);
      }
    });
    return;
  }
  // Rows, or pieces of all entries; integer sums may be added up in any order.
  const int64_t length = by_row ? columns : rows * columns, pieces = ceil_div(length, kPiece);
  const int64_t items = groups * pieces, per_item = 1 + kPiece / (length < kPiece ? length : kPiece);
  parallel_for(ceil_div(items, per_item), rows * columns, threads, [&](int64_t chunk) {
    for (int64_t item = chunk * per_item; item < items && item < (chunk + 1) * per_item; ++item) {
      const int64_t group = item / pieces, first = item % pieces * kPiece;
      const int64_t n = length - first < kPiece ? length - first : kPiece;
      Groups g[G];
      for (int k = 0; k < G; ++k) g[k] = Groups::of(Group::of(grids[k].step[group], grids[k].offset[group]));
      int64_t total[G];
      sums_of_variances(source, group * length + first, n, g, least_code, last_code, total);
      for (int k = 0; k < G; ++k) __atomic_fetch_add(grids[k].sums + group, total[k], __ATOMIC_RELAXED);
    }
  });
}

namespace fqt {

template void sums_of_variances<1>(const Source&, int64_t, int64_t, const Groups (&)[1], vf, vf, int64_t (&)[1]);
template void sums_of_variances<2>(const Source&, int64_t, int64_t, const Groups (&)[2], vf, vf, int64_t (&)[2]);
template void sum_variances<1>(const Source&, int64_t, int64_t, const Grid (&)[1], bool, bool, int, int, int);
template void sum_variances<2>(const Source&, int64_t, int64_t, const Grid (&)[2], bool, bool, int, int, int);

}  // namespace fqt

// sums: Σ p(1 − p) of every group, each entry rounded to units of 2⁻²⁴, so that the order of the sum does not matter.
// One number, one per row or one per column, like step and offset; fewer than 2⁴¹ entries.
FQT_API int fqt_variance_sums(const Source* source, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, int64_t* sums,
                              int threads) {
  const Grid grid[1] = {{step, offset, sums}};
  sum_variances(*source, rows, columns, grid, by_row != 0, by_column != 0, low, high, threads);
  return kDone;
}
