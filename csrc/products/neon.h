// Tiles of NEON's dot products, of operands that are both signed or both unsigned. Included by dot.h.
//
// A left group is a lane of a vector, and four are loaded at once: four groups of a row, or of four interleaved rows one.
#pragma once

#include "products/dot.h"

namespace fqt {

template <bool Signed, int Lane>
inline vi dot_lane(vi sum, vi left, vi right) {
  if constexpr (Signed) {
    return (vi)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)right, (int8x16_t)left, Lane);
  } else {
    return (vi)vdotq_laneq_u32((uint32x4_t)sum, (uint8x16_t)right, (uint8x16_t)left, Lane);
  }
}

// sum + left group number `lane` · right; the number is known once loops are unrolled.
template <bool Signed>
inline vi dot_lane(vi sum, vi left, int lane, vi right) {
  switch (lane) {
    case 0: return dot_lane<Signed, 0>(sum, left, right);
    case 1: return dot_lane<Signed, 1>(sum, left, right);
    case 2: return dot_lane<Signed, 2>(sum, left, right);
    default: return dot_lane<Signed, 3>(sum, left, right);
  }
}

template <bool Signed>
struct Lanes {
  static constexpr int kRows = 6, kNarrowRows = 8;  // of 32 registers: 24 sums, 6 left vectors, 1 right

  // c += Σ left · right over the groups of a tap. right: [group][kPanel][kGroup].
  template <int R, int V>
  static void add(const ByRow<R>& left, int64_t groups, int64_t, const Right* right, vi (&c)[R][V]) {
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) {
      vi l[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) l[i] = load<vi>(left.row[i] + g * kGroup);
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane, right += kPanelGroup) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const vi b = load<vi>(right + v * W * kGroup);
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) c[i][v] = dot_lane<Signed>(c[i][v], l[i], lane, b);
        }
      }
    }
    for (; g < groups; ++g, right += kPanelGroup) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vi b = load<vi>(right + v * W * kGroup);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) c[i][v] = dot_lane<Signed>(c[i][v], left.group(i, g), 0, b);
      }
    }
  }

  // The same. Up to three rows beyond the tile's are read.
  template <int R, int V>
  static void add(const ByGroup<R>& left, int64_t groups, int64_t, const Right* right, vi (&c)[R][V]) {
    for (int64_t g = 0; g < groups; ++g, right += kPanelGroup) {
      vi l[(R + 3) / 4];
#pragma GCC unroll 2
      for (int q = 0; q < (R + 3) / 4; ++q) l[q] = load<vi>(left.first + g * left.stride + 4 * q * kGroup);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vi b = load<vi>(right + v * W * kGroup);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) c[i][v] = dot_lane<Signed>(c[i][v], l[i / 4], i % 4, b);
      }
    }
  }
};

}  // namespace fqt
