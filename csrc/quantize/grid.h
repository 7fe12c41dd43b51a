// From values to positions on the code axis, and back: the arithmetic of fqt/kernels/reference.py.
#pragma once

#include "common/simd.h"

namespace fqt {

constexpr float kWideStep = 0x1p100f;  // beyond it a range may exceed the largest float: work on sixteenths
constexpr float kNarrowing = 0x1p-4f;
constexpr int32_t kLevels = 1 << 24;

// A group's step and offset, ready for use.
struct Group {
  float half, divisor, offset;  // t = (x·half − offset)/divisor

  static Group of(float step, float offset) {
    const float half = step > kWideStep ? kNarrowing : 1.0f;
    return {half, (step == 0.0f ? 1.0f : step) * half, offset * half};
  }
};

// The same, one group per lane.
struct Groups {
  vf half, divisor, offset;

  static Groups of(Group g) { return {splat(g.half), splat(g.divisor), splat(g.offset)}; }

  static Groups of(vf step, vf offset) {
    const vf half = step > kWideStep ? splat(kNarrowing) : splat(1.0f);
    return {half, (step == 0.0f ? splat(1.0f) : step) * half, offset * half};
  }
};

// t clamped to [low, high]; NaN becomes low. The division is a true one: a reciprocal would move codes.
inline vf position(vf x, const Groups& g, vf low, vf high) {
  const vf t = (x * g.half - g.offset) / g.divisor;
  return least(largest(t, low), high);
}

// ⌊t⌋ for |t| < 2³¹.
inline vi floor_int(vf t) {
  const vi i = to_int(t);
  return i + (vi)(to_float(i) > t);  // a true comparison is −1
}

// t − ⌊t⌋.
inline vf fraction(vf t) {
#if defined(__AVX512F__)
  // Not vreduceps: it rounds the difference down, too, which for −2⁻²⁵ < t < 0 is not 1.
  return t - (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  return t - to_float(floor_int(t));
#endif
}

// The nearest integer, ties to even, for |t| < 2²².
inline vi round_nearest(vf t) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvt_roundps_epi32((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return to_int((t + 0x1.8p23f) - 0x1.8p23f);  // leaves no bit for a fraction
#endif
}

// ⌊t⌋ + (u·2⁻²⁴ < t − ⌊t⌋) for 24-bit u.
inline vi round_stochastic(vf t, vi u) {
  const vi i = floor_int(t);
  return i - (vi)(to_float(u) * 0x1p-24f < t - to_float(i));
}

// The same for u whose low 8 bits are not known yet and zero here: right in the lanes whose *sure stays at 255 or more.
inline vi round_stochastic_high(vf t, vi u, vu* sure) {
  const vi i = floor_int(t);
  const vf p = (t - to_float(i)) * 0x1p24f, least = to_float(u);
  const vi up = (vi)(least < p);
  *sure &= ~(vu)(up & (vi)(least + 255.0f >= p));
  return i - up;
}

// ⌊t + k·2⁻²⁴⌋ in exact arithmetic, for 0 ≤ k < 2²⁵.
inline vi round_dithered(vf t, vi k) {
  const vi i = floor_int(t), u = k & (kLevels - 1);
  const vf threshold = to_float(kLevels - u) * 0x1p-24f;
  return i + (k >> 24) - (vi)(t - to_float(i) >= threshold);
}

// Stochastic and dithered rounding in fixed point, for 0 ≤ t ≤ 255: t·2²⁴ is exact and fits 32 bits, and
// ⌊x + n⌋ = ⌊x⌋ + n for integers.
#if defined(__AVX512F__)
constexpr bool kFixedPoint = true;
inline vu fixed_down(vf t) { return (vu)_mm512_cvttps_epu32((__m512)(t * 0x1p24f)); }
inline vu fixed_up(vf t) {
  return (vu)_mm512_cvt_roundps_epu32((__m512)(t * 0x1p24f), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}
#else
constexpr bool kFixedPoint = false;
inline vu fixed_down(vf) { return vu{}; }
inline vu fixed_up(vf) { return vu{}; }
#endif

// u·2⁻²⁴ < t − ⌊t⌋ exactly if u < ⌈(t − ⌊t⌋)·2²⁴⌉.
inline vi round_stochastic_fixed(vf t, vi u) { return (vi)((fixed_up(t) + ((vu)u ^ (kLevels - 1))) >> 24); }

inline vi round_stochastic_fixed_high(vf t, vi u, vu* sure) {
  const vu sum = fixed_up(t) + ((vu)u ^ 0xffff00);  // the low bits would add up to 255
  const vu gap = ~sum & 0xffffff;                   // what may be added without a carry into the code
  *sure = gap < *sure ? gap : *sure;
  return (vi)(sum >> 24);
}

// For t ≤ 254.
inline vi round_dithered_fixed(vf t, vi k) { return (vi)((fixed_down(t) + (vu)k) >> 24); }

}  // namespace fqt
