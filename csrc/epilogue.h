// From integer sums to results: out = (sum − zero · ones) · row_scale · column_scale + Σ_r left_r · right_r + bias.
//
// zero · ones is exact, in integers: an offset's large part, which would cancel most of the sum after its rounding.
// Evaluated from left to right without contraction, so that it equals the reference bit for bit.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "dot.h"

namespace fqt {

enum OutType : int { kInt32 = 0, kInt64 = 1, kFloat32 = 2, kBfloat16 = 3 };

// The C interface's description of a result with `columns` columns. Row i of the result belongs to sample
// i ÷ period and to position i mod period (a matrix product has period 1).
struct Epilogue {
  void* out;
  int32_t type;
  int32_t rank;                // corrections: left (samples, rank), right (rank, period, columns)
  int64_t columns, period;
  const float* row_scale;      // one number, or one per sample; null is 1
  const float* column_scale;   // one number, or one per column; null is 1
  int64_t row_scale_step, column_scale_step;  // 0 for one number, else 1
  const float *left, *right;
  const float* bias;           // (columns,) or null
  const int32_t* zero;         // one number, or one per sample; null is 0
  const int32_t* ones;         // (period, columns)
  int64_t zero_step;           // 0 for one number, else 1
};

// Writes sums to row `row`, columns first … first + n − 1. Whole panels have a length that the compiler knows.
template <bool Whole, class Sum>
inline void write_part(const Epilogue& e, const Sum* sums, int64_t row, int64_t first, int64_t width) {
  const int64_t n = Whole ? kPanel : width;
  const int64_t at = row * e.columns + first;
  if (e.type == kInt32) {
    int32_t* out = static_cast<int32_t*>(e.out) + at;
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<int32_t>(sums[j]);
    return;
  }
  if (e.type == kInt64) {
    int64_t* out = static_cast<int64_t*>(e.out) + at;
    for (int64_t j = 0; j < n; ++j) out[j] = sums[j];
    return;
  }
  const int64_t sample = e.period == 1 ? row : row / e.period;
  const int64_t position = e.period == 1 ? 0 : row % e.period;
  float value[kPanel];
  const float row_scale = e.row_scale ? e.row_scale[sample * e.row_scale_step] : 1.0f;
  if (e.zero) {
    // Modulo 2³² for int32 sums: the difference fits, whatever its parts do.
    const auto zero = static_cast<std::make_unsigned_t<Sum>>(static_cast<Sum>(e.zero[sample * e.zero_step]));
    const int32_t* ones = e.ones + position * e.columns + first;
    for (int64_t j = 0; j < n; ++j) {
      const auto part = zero * static_cast<std::make_unsigned_t<Sum>>(static_cast<Sum>(ones[j]));
      value[j] = static_cast<float>(static_cast<Sum>(static_cast<std::make_unsigned_t<Sum>>(sums[j]) - part)) * row_scale;
    }
  } else {
    for (int64_t j = 0; j < n; ++j) value[j] = static_cast<float>(sums[j]) * row_scale;
  }
  if (e.column_scale && e.column_scale_step) {
    const float* scale = e.column_scale + first;
    for (int64_t j = 0; j < n; ++j) value[j] *= scale[j];
  } else if (e.column_scale) {
    const float scale = *e.column_scale;
    for (int64_t j = 0; j < n; ++j) value[j] *= scale;
  }
  for (int32_t r = 0; r < e.rank; ++r) {
    const float left = e.left[sample * e.rank + r];
    const float* right = e.right + (r * e.period + position) * e.columns + first;
    for (int64_t j = 0; j < n; ++j) value[j] += left * right[j];
  }
  if (e.bias) {
    for (int64_t j = 0; j < n; ++j) value[j] += e.bias[first + j];
  }
  if (e.type == kFloat32) {
    std::memcpy(static_cast<float*>(e.out) + at, value, 4 * n);
  } else {
    uint16_t rounded[kPanel];
    for (int64_t j = 0; j < n; j += W) store(rounded + j, to_bfloat16(load<vf>(value + j)));
    std::memcpy(static_cast<uint16_t*>(e.out) + at, rounded, 2 * n);
  }
}

template <class Sum>
inline void write_row(const Epilogue& e, const Sum* sums, int64_t row, int64_t first, int64_t n) {
  if (n == kPanel) {
    write_part<true>(e, sums, row, first, n);
  } else {
    write_part<false>(e, sums, row, first, n);
  }
}

}  // namespace fqt
