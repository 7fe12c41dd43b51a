// Walsh–Hadamard butterflies over the rows of a block, a strip of columns at a time.
//
// Four stages run in registers, on sixteen rows at once; what lies between such passes is a scratch that fits the
// second-level cache. Rows are read and written whole, so that the processor sees streams: tiles of a few lines per
// row, thousands of bytes apart, ran at a quarter of the memory rate.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/scratch.h"
#include "common/simd.h"
#include "common/source.h"

namespace fqt {

// What becomes of a row on its way in: (x · half − offset) · scale.
struct RowScaling {
  float half, offset, scale;
};

// Rows of a source in some order. With `scaling` null they are taken as they are.
struct SourceRows {
  const Source* source;
  int64_t columns;
  const int64_t* order;
  const RowScaling* scaling;  // one per row of the source
};

constexpr int64_t kStripFloats = 1 << 17;  // the scratch of a block: half of a second-level cache of a megabyte
constexpr int64_t kLeastStrip = 64;

// Columns per strip, and floats from row to row of the scratch: no power of two, which would fill few cache sets.
inline int64_t strip_columns(int64_t size, int64_t columns) {
  const int64_t fitting = kStripFloats / size / kLeastStrip * kLeastStrip, strip = fitting > kLeastStrip ? fitting : kLeastStrip;
  return strip < columns ? strip : columns;
}
inline int64_t scratch_stride(int64_t width) { return (width + W - 1) / W * W + 16; }

// Stages of strides 1, 2, … R/2 over v, each pair (a, b) giving (a + b, a − b).
template <int R, int S = 1>
inline void butterfly(vf (&v)[R]) {
  if constexpr (S < R) {
#pragma GCC unroll 8
    for (int i = 0; i < R / 2; ++i) {
      const int low = i / S * 2 * S + i % S;
      const vf a = v[low], b = v[low + S];
      v[low] = a + b;
      v[low + S] = a - b;
    }
    butterfly<R, 2 * S>(v);
  }
}

// Stages of strides `stride` … R/2 · stride over the scratch; output i at column j is handed to give(i, j, value).
template <int R, class Give>
void scratch_pass(const float* scratch, int64_t row_floats, int64_t size, int64_t stride, int64_t width,
                  const Give& give) {
  for (int64_t base = 0; base < size; base += R * stride) {
    for (int64_t i = base; i < base + stride; ++i) {
      const float* from = scratch + i * row_floats;
      for (int64_t j = 0; j < width; j += W) {
        vf v[R];
#pragma GCC unroll 16
        for (int k = 0; k < R; ++k) v[k] = load<vf>(from + k * stride * row_floats + j);
        butterfly<R>(v);
#pragma GCC unroll 16
        for (int k = 0; k < R; ++k) give(i + k * stride, j, v[k]);
      }
    }
  }
}

// The first stages, on rows as they come in.
template <int R, bool Scaled, class Give>
void first_pass(const SourceRows& rows, int64_t size, int64_t first, int64_t width, const Give& give) {
  constexpr int64_t kPiece = 256;
  alignas(64) float buffer[R][kPiece + W];
  for (int64_t base = 0; base < size; base += R) {
    RowScaling scaling[R];
    if (Scaled) {
      for (int k = 0; k < R; ++k) scaling[k] = rows.scaling[rows.order[base + k]];
    }
    for (int64_t start = 0; start < width; start += kPiece) {
      const int64_t n = width - start < kPiece ? width - start : kPiece;
      const float* x[R];
      for (int k = 0; k < R; ++k) {
        // What comes next: these columns of the next R rows, or of the first ones in the strip to the right.
        const bool last = base + R == size;
        const int64_t row = rows.order[last ? k : base + R + k], column = first + start + (last ? width : 0);
        prefetch(*rows.source, row * rows.columns + column, n);
        x[k] = values(*rows.source, rows.order[base + k] * rows.columns + first + start, n, buffer[k]);
        if (n % W && x[k] != buffer[k]) std::memcpy(buffer[k], x[k], n * sizeof(float)), x[k] = buffer[k];
        if (n % W) std::memset(buffer[k] + n, 0, (W - n % W) * sizeof(float));
      }
      for (int64_t j = 0; j < n; j += W) {
        vf v[R];
#pragma GCC unroll 16
        for (int k = 0; k < R; ++k) {
          v[k] = load<vf>(x[k] + j);
          if (Scaled) v[k] = (v[k] * scaling[k].half - scaling[k].offset) * scaling[k].scale;
        }
        butterfly<R>(v);
#pragma GCC unroll 16
        for (int k = 0; k < R; ++k) give(base + k, start + j, v[k]);
      }
    }
  }
}

// Output i of the butterflies over `size` rows (a power of two) at the strip's column j is handed to
// give(i, j, vector), whole vectors: what lies beyond the strip's width means nothing.
// The scratch holds size · scratch_stride(width) floats. `give` may write output i into its row i.
template <bool Scaled, class Give>
void mix_strip(const SourceRows& rows, int64_t size, int64_t first, int64_t width, float* scratch, const Give& give) {
  const int64_t row_floats = scratch_stride(width);
  const auto keep = [&](int64_t i, int64_t j, vf v) { store(scratch + i * row_floats + j, v); };
  switch (size) {
    case 1: return first_pass<1, Scaled>(rows, size, first, width, give);
    case 2: return first_pass<2, Scaled>(rows, size, first, width, give);
    case 4: return first_pass<4, Scaled>(rows, size, first, width, give);
    case 8: return first_pass<8, Scaled>(rows, size, first, width, give);
    case 16: return first_pass<16, Scaled>(rows, size, first, width, give);
    default: first_pass<16, Scaled>(rows, size, first, width, keep);
  }
  int64_t stride = 16;
  for (; stride * 16 < size; stride *= 16) scratch_pass<16>(scratch, row_floats, size, stride, width, keep);
  switch (size / stride) {
    case 2: return scratch_pass<2>(scratch, row_floats, size, stride, width, give);
    case 4: return scratch_pass<4>(scratch, row_floats, size, stride, width, give);
    case 8: return scratch_pass<8>(scratch, row_floats, size, stride, width, give);
    default: return scratch_pass<16>(scratch, row_floats, size, stride, width, give);
  }
}

}  // namespace fqt
