// Householder reflections over groups of rows: y_r = x_r − n_r · (Σ_q n_q x_q · f), q over the group in ascending order.
#pragma once

#include <cstdint>
#include <cstring>

#include "transform/butterflies.h"

namespace fqt {

constexpr int64_t kReflected = 1024;  // columns whose sum stays in the first-level cache

// n entries of row r from column `first`, whole vectors: what lies beyond n means nothing.
template <bool Scaled>
inline const float* row_piece(const SourceRows& rows, int64_t r, int64_t first, int64_t n, float* buffer) {
  const float* x = values(*rows.source, r * rows.columns + first, n, buffer);
  if (n % W && x != buffer) std::memcpy(buffer, x, n * sizeof(float)), x = buffer;
  if (n % W) std::memset(buffer + n, 0, (W - n % W) * sizeof(float));
  if (!Scaled) return x;
  const RowScaling s = rows.scaling[r];
  for (int64_t j = 0; j < n; j += W) store(buffer + j, (load<vf>(x + j) * s.half - s.offset) * s.scale);
  return buffer;
}

// total[0 … width) = Σ n_q x_q · factor over `size` rows. width ≤ kReflected; total and the buffers of both functions
// hold W floats more.
template <bool Scaled>
inline void reflection_sum(const SourceRows& rows, const int64_t* members, int64_t size, const float* normal,
                           float factor, int64_t first, int64_t width, float* total) {
  float buffer[kReflected + W];
  for (int64_t j = 0; j < width; j += W) store(total + j, vf{});
  for (int64_t i = 0; i < size; ++i) {
    const int64_t r = members[i];
    const float n = normal[r];
    if (i + 1 < size) prefetch(*rows.source, members[i + 1] * rows.columns + first, width);
    const float* x = row_piece<Scaled>(rows, r, first, width, buffer);
    for (int64_t j = 0; j < width; j += W) store(total + j, load<vf>(total + j) + load<vf>(x + j) * n);
  }
  for (int64_t j = 0; j < width; j += W) store(total + j, load<vf>(total + j) * factor);
}

// give(j, vector) for the row's reflected entries.
template <bool Scaled, class Give>
inline void reflect_row(const SourceRows& rows, int64_t r, float normal, const float* total, int64_t first,
                        int64_t width, const Give& give) {
  float buffer[kReflected + W];
  const float* x = row_piece<Scaled>(rows, r, first, width, buffer);
  for (int64_t j = 0; j < width; j += W) give(j, load<vf>(x + j) - normal * load<vf>(total + j));
}

}  // namespace fqt
