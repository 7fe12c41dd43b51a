// Sums of codes, exact: what the corrections for offsets and dither are made of.
#include <memory>
#include <new>

#include "common/parallel.h"
#include "common/platform.h"
#include "common/simd.h"
#include "common/source.h"

using namespace fqt;

namespace {

constexpr int64_t kStrip = 1024;

// Adds rows begin … end − 1 of `width` ≤ kStrip columns to plain: in 16 bits for as many rows as they hold.
template <bool Signed>
void add_rows(const uint8_t* codes, int64_t columns, int64_t begin, int64_t end, int64_t width, int64_t* plain) {
  typedef int16_t Short;
  constexpr int64_t kRun = Signed ? 256 : 128;  // 256 · 128 and 128 · 255 fit 16 bits
  for (int64_t start = begin; start < end; start += kRun) {
    Short sum[kStrip] = {};
    for (int64_t r = start; r < end && r < start + kRun; ++r) {
      const uint8_t* from = codes + r * columns;
      if (Signed) {
        for (int64_t j = 0; j < width; ++j) sum[j] = static_cast<Short>(sum[j] + static_cast<int8_t>(from[j]));
      } else {
        for (int64_t j = 0; j < width; ++j) sum[j] = static_cast<Short>(sum[j] + from[j]);
      }
    }
    for (int64_t j = 0; j < width; ++j) plain[j] += sum[j];
  }
}

// Adds each row's codes times its weight to `weighted`. A 24-bit weight is taken in two halves, so that 1024 products
// fit 31 bits.
template <bool Signed>
void add_weighted_rows(const uint8_t* codes, int64_t columns, int64_t begin, int64_t end, int64_t width,
                       const int32_t* weights, int64_t* weighted) {
  constexpr int64_t kRun = 1024;
  constexpr int kVectors = 4;
  for (int64_t j = 0; j < width; j += kVectors * W) {
    const int64_t n = width - j < kVectors * W ? width - j : kVectors * W;
    for (int64_t start = begin; start < end; start += kRun) {
      vi low[kVectors] = {}, high[kVectors] = {};
      for (int64_t r = start; r < end && r < start + kRun; ++r) {
        const uint8_t* from = codes + r * columns + j;
        const vi low_half = splat(weights[r] & 0xfff), high_half = splat(weights[r] >> 12);
        for (int k = 0; k < kVectors && k * W < n; ++k) {
          const vb bytes = n - k * W >= W ? load<vb>(from + k * W) : load_part<vb>(from + k * W, n - k * W);
          const vi code = from_bytes<Signed>(bytes);
          low[k] += code * low_half;
          high[k] += code * high_half;
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        weighted[j + i] += low[i / W][i % W] + static_cast<int64_t>(high[i / W][i % W]) * 4096;
      }
    }
  }
}

template <bool Signed, bool Weighted>
void column_sums(const uint8_t* codes, int64_t rows, int64_t columns, const int32_t* weights, int64_t* plain,
                 int64_t* weighted, int threads) {
  const int64_t strips = ceil_div(columns, kStrip), bands = 1 + rows * columns / (1 << 18) / strips;
  parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
    const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
    const int64_t band = item / strips, begin = rows * band / bands, end = rows * (band + 1) / bands;
    int64_t part[2][kStrip] = {};
    add_rows<Signed>(codes + first, columns, begin, end, width, part[0]);
    if (Weighted) add_weighted_rows<Signed>(codes + first, columns, begin, end, width, weights, part[1]);
    for (int64_t j = 0; j < width; ++j) {
      __atomic_fetch_add(plain + first + j, part[0][j], __ATOMIC_RELAXED);
      if (Weighted) __atomic_fetch_add(weighted + first + j, part[1][j], __ATOMIC_RELAXED);
    }
  });
}

template <bool Signed>
int64_t row_sum(const uint8_t* row, int64_t columns) {
  constexpr int64_t kRun = int64_t{1} << 20;  // additions per lane are far below 2²³
  int64_t total = 0;
  for (int64_t start = 0; start < columns; start += kRun) {
    const int64_t end = columns - start < kRun ? columns : start + kRun;
    vi sum{};
    int64_t j = start;
    for (; j + W <= end; j += W) sum += from_bytes<Signed>(load<vb>(row + j));
    if (j < end) sum += from_bytes<Signed>(load_part<vb>(row + j, end - j));
    for (int k = 0; k < W; ++k) total += sum[k];
  }
  return total;
}

}  // namespace

// plain (columns,): Σ over the rows. weighted (columns,), unless it is null: Σ weight · code, for weights
// (rows,) in 0 … 2²⁴ − 1. Fewer than 2³¹ rows.
FQT_API int fqt_column_sums(const uint8_t* codes, int is_signed, int64_t rows, int64_t columns,
                            const int32_t* weights, int64_t* plain, int64_t* weighted, int threads) {
  for (int64_t j = 0; j < columns; ++j) plain[j] = 0;
  for (int64_t j = 0; weighted && j < columns; ++j) weighted[j] = 0;
  if (rows == 0 || columns == 0) return kDone;
  if (is_signed) {
    if (weighted) {
      column_sums<true, true>(codes, rows, columns, weights, plain, weighted, threads);
    } else {
      column_sums<true, false>(codes, rows, columns, weights, plain, weighted, threads);
    }
  } else if (weighted) {
    column_sums<false, true>(codes, rows, columns, weights, plain, weighted, threads);
  } else {
    column_sums<false, false>(codes, rows, columns, weights, plain, weighted, threads);
  }
  return kDone;
}

// sums (rows,): Σ over the columns.
FQT_API int fqt_row_sums(const uint8_t* codes, int is_signed, int64_t rows, int64_t columns, int64_t* sums,
                         int threads) {
  parallel_for(rows, rows * columns, threads, [&](int64_t r) {
    const uint8_t* row = codes + r * columns;
    sums[r] = is_signed ? row_sum<true>(row, columns) : row_sum<false>(row, columns);
  });
  return kDone;
}

// sums (columns,): Σ of values over the rows. Runs of 32 rows are added in float32, runs in float64, by bands of rows
// whose number does not depend on the threads.
FQT_API int fqt_value_sums(const Source* source, int64_t rows, int64_t columns, double* sums, int threads) {
  for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
  if (rows == 0 || columns == 0) return kDone;
  const int64_t strips = ceil_div(columns, kStrip), bands = 1 + rows * columns / (1 << 17) / strips;
  std::unique_ptr<double[]> part(new (std::nothrow) double[bands * columns]);
  if (!part) return kNoMemory;
  parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
    const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
    const int64_t band = item / strips;
    float buffer[kStrip + W];
    double* total = part.get() + band * columns + first;
    for (int64_t j = 0; j < width; ++j) total[j] = 0;
    const int64_t end = rows * (band + 1) / bands;
    for (int64_t start = rows * band / bands; start < end; start += 32) {
      float sum[kStrip] = {};
      for (int64_t r = start; r < end && r < start + 32; ++r) {
        const float* x = values(*source, r * columns + first, width, buffer);
        for (int64_t j = 0; j < width; ++j) sum[j] += x[j];
      }
      for (int64_t j = 0; j < width; ++j) total[j] += sum[j];
    }
  });
  for (int64_t b = 0; b < bands; ++b) {
    for (int64_t j = 0; j < columns; ++j) sums[j] += part[b * columns + j];
  }
  return kDone;
}

// out (rows, columns): row r of x times factor[r]. weighted (columns,), unless it is null: Σ weight[r] · x; plain (period,),
// unless it is null: Σ over the rows and over columns that are equal modulo the period, a divisor of columns. Sums are
// of float64 products, by bands of rows whose number does not depend on the threads.
FQT_API int fqt_scaled_rows(const Source* source, int64_t rows, int64_t columns, const float* factor, const float* weight,
                            float* out, double* weighted, double* plain, int64_t period, int threads) {
  for (int64_t j = 0; weighted && j < columns; ++j) weighted[j] = 0;
  for (int64_t j = 0; plain && j < period; ++j) plain[j] = 0;
  if (rows == 0 || columns == 0) return kDone;
  const int64_t strips = ceil_div(columns, kStrip), wanted = 1 + rows * columns / (1 << 17) / strips;
  const int64_t bands = wanted < rows ? wanted : rows;
  std::unique_ptr<double[]> part(new (std::nothrow) double[2 * bands * columns]);
  if (!part) return kNoMemory;
  parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
    const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
    const int64_t band = item / strips;
    float buffer[kStrip + W];
    double *sum = part.get() + 2 * band * columns + first, *other = sum + columns;
    for (int64_t j = 0; j < width; ++j) sum[j] = other[j] = 0;
    for (int64_t r = rows * band / bands; r < rows * (band + 1) / bands; ++r) {
      const float* x = values(*source, r * columns + first, width, buffer);
      float* to = out + r * columns + first;
      const float by = factor[r];
      for (int64_t j = 0; j < width; ++j) to[j] = x[j] * by;
      if (weighted) {
        const double times = weight[r];
        for (int64_t j = 0; j < width; ++j) sum[j] += times * x[j];
      }
      for (int64_t j = 0; plain && j < width; ++j) other[j] += x[j];
    }
  });
  for (int64_t b = 0; b < bands; ++b) {
    const double *sum = part.get() + 2 * b * columns, *other = sum + columns;
    for (int64_t j = 0; weighted && j < columns; ++j) weighted[j] += sum[j];
    for (int64_t j = 0; plain && j < columns; j += period) {
      for (int64_t k = 0; k < period; ++k) plain[k] += other[j + k];
    }
  }
  return kDone;
}
