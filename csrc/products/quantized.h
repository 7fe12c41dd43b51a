// A quantized matrix, and what the corrections of its products have in common; the formulas are those of
// fqt/kernels/integer.py, evaluated in the same order, so that results are equal bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "products/pack.h"

namespace fqt {

// The C interface's description: codes, row-major, with value = step · (code + centre − row noise − column noise)
// + offset; the bracket is the code alone without noise. Noise is in fractions of a step, multiples of 2⁻²⁴.
struct Quantized {
  const uint8_t* codes;
  const float *step, *offset;
  const float *row_noise, *column_noise;  // null without dither
  int32_t low, high;  // the codes' least and greatest that can be
  int32_t many;  // 0: one step and one offset; else one per row, or of a gradient for the weight one per column

  Range range() const { return {low, high}; }
  bool is_signed() const { return range().is_signed(); }
};

// How the input of a weight's gradient is multiplied. Without `folded`, by its one step and offset. With it its steps are
// in the gradient already, and what is multiplied are codes less a centre per row; an offset's share comes as it is.
struct Fold {
  int32_t folded;
  const int32_t* centre;  // per row of the input's steps, in 0 … 255; null is 0
  const float* share;     // (taps, output channels), added to every channel of a tap; null is 0

  float step(const Quantized& x) const { return folded ? 1.0f : x.step[0]; }
  // X = step · code + offset · weight(row).
  float offset(const Quantized& x) const { return folded ? (centre ? -1.0f : 0.0f) : x.offset[0]; }
  int64_t weight(int64_t row) const { return centre ? centre[row] : 1; }
};

constexpr float kCentre = 0.5f - 0x1p-25f;

inline int32_t noise_integer(float fraction) { return static_cast<int32_t>(fraction * 0x1p24f); }

// The value of code 0 less the dither of one axis.
inline float with_noise(float offset, float step, float noise) { return offset + step * (kCentre - noise); }

// grad_output for the weight's gradient, a column per output channel: each channel's step, the code nearest to value
// 0, and what the offset is about it.
struct Channel {
  float step, rest;
  int32_t zero;

  static Channel of(const Quantized& g, int64_t o) {
    const float step = g.step[g.many ? o : 0];
    float offset = g.offset[g.many ? o : 0];
    if (g.column_noise) offset = with_noise(offset, step, g.column_noise[o]);
    float zero = step > 0 ? std::nearbyint(-offset / step) : 0.0f;
    zero = zero < 0 ? 0.0f : zero > 255 ? 255.0f : zero;
    return {step, offset + step * zero, static_cast<int32_t>(zero)};
  }
};

}  // namespace fqt
