// Tiles of NEON's matrix products (i8mm): 2 rows × 8 k times 8 k × 2 columns. Included by dot.h.
//
// A group is half a vector, so that two rows' make a left operand, and two columns of a panel, as they lie, a right one.
#pragma once

#include "products/dot.h"

namespace fqt {

template <bool LeftSigned, bool RightSigned>
inline vi multiply(vi sum, uint8x16_t left, uint8x16_t right) {
  static_assert(RightSigned || !LeftSigned, "there is no such instruction");
  if constexpr (LeftSigned) {
    return (vi)vmmlaq_s32((int32x4_t)sum, (int8x16_t)left, (int8x16_t)right);
  } else if constexpr (RightSigned) {
    return (vi)vusmmlaq_s32((int32x4_t)sum, left, (int8x16_t)right);
  } else {
    return (vi)vmmlaq_u32((uint32x4_t)sum, left, right);
  }
}

// The groups of rows 2p and 2p + 1 of a tile; a last row without another is there twice, or with the one that lies next.
template <int R>
inline uint8x16_t pair(const ByRow<R>& left, int p, int64_t g) {
  const Left *first = left.row[2 * p], *second = left.row[2 * p + 1 < R ? 2 * p + 1 : 2 * p];
  return vcombine_u8(vld1_u8(first + g * kGroup), vld1_u8(second + g * kGroup));
}
template <int R>
inline uint8x16_t pair(const ByGroup<R>& left, int p, int64_t g) {
  return vld1q_u8(left.first + g * left.stride + 2 * p * kGroup);
}

template <bool LeftSigned, bool RightSigned>
struct Pairs {
  static constexpr int kRows = 6, kNarrowRows = 8;  // of 32 registers: 24 sums, 3 pairs of rows, 2 of columns

  // c[2p][v] and c[2p + 1][v] += rows 2p, 2p + 1 by the first and by the last two columns of vector v.
  template <template <int> class Places, int R, int N, int V>
  static void add(const Places<R>& left, int64_t groups, const Right* right, vi (&c)[N][V]) {
    for (int64_t g = 0; g < groups; ++g, right += kPanelGroup) {
      uint8x16_t rows[N / 2];
#pragma GCC unroll 8
      for (int p = 0; p < N / 2; ++p) rows[p] = pair(left, p, g);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const uint8x16_t first = vld1q_u8(right + v * W * kGroup), last = vld1q_u8(right + (v * W + 2) * kGroup);
#pragma GCC unroll 8
        for (int p = 0; p < N / 2; ++p) {
          c[2 * p][v] = multiply<LeftSigned, RightSigned>(c[2 * p][v], rows[p], first);
          c[2 * p + 1][v] = multiply<LeftSigned, RightSigned>(c[2 * p + 1][v], rows[p], last);
        }
      }
    }
  }
};

// Two by two sums in each of two vectors as two rows of four.
template <int R, int N, int V>
inline void by_rows(const vi (&c)[N][V], vi (&rows)[R][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64x2_t first = (int64x2_t)c[i / 2 * 2][v], last = (int64x2_t)c[i / 2 * 2 + 1][v];
      rows[i][v] = (vi)(i % 2 ? vzip2q_s64(first, last) : vzip1q_s64(first, last));
    }
  }
}

// As in dot.h.
template <class How, int R, int V, class Source>
void tile_of(const Source& left, int64_t first_row, int64_t taps, int64_t groups, int64_t, const Right* right,
             int32_t* sums, bool add) {
  vi c[(R + 1) / 2 * 2][V], rows[R][V];
  clear(c);
  for (int64_t tap = 0; tap < taps; ++tap, right += groups * kPanelGroup) {
    How::add(places<R>(left, tap, first_row), groups, right, c);
  }
  by_rows(c, rows);
  store_sums(rows, sums, add);
}

}  // namespace fqt
