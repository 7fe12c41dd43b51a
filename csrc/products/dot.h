// The inner kernel of all integer products: a tile of rows × columns, accumulated in int32 without saturation.
//
// Both operands come in groups of kGroup neighbouring k, 32 bits per group: four bytes where the processor has a
// four-term dot product (u8 × s8, VNNI; any signs, AMX), two int16 where it has not (the byte instruction of AVX2
// saturates). A left group is broadcast, a right one is a lane of a vector. AMX (amx.h) multiplies whole tiles of the
// same right operand by rows of kTerms k that lie together.
//
// Bound: |Left|·|Right| ≤ 255·128, so kMaxTerms terms stay below 2³¹. Longer sums are cut by the callers.
#pragma once

#include <cstdint>

#include "common/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fqt {

// FQT_SHIFTED: operands of one sign only, so that a code of the other is shifted by 128.
#if defined(__AMX_INT8__)
typedef uint8_t Left, Right;  // the code's byte, whatever its sign
constexpr int kGroup = 4, kVectors = 4;
constexpr int kShift = 0;
#elif defined(__AVX512VNNI__)
#define FQT_SHIFTED
typedef uint8_t Left;
typedef int8_t Right;
constexpr int kGroup = 4, kRows = 6, kVectors = 4;
constexpr int kShift = 128;  // added to a signed left code, taken from an unsigned right code
#else
typedef int16_t Left;
typedef int16_t Right;
constexpr int kGroup = 2, kRows = 6, kVectors = 2;  // 12 sums, 2 right vectors, 1 left, 1 product: 16 registers
constexpr int kShift = 0;
#endif
#if defined(__AMX_INT8__)
constexpr int kTerms = 64, kTileRows = 16;  // left operands are padded to multiples, their k with zeros
#else
constexpr int kTerms = kGroup, kTileRows = 1;
#endif
constexpr int kPanel = kVectors * W;     // columns of a tile
constexpr int64_t kMaxTerms = 1 << 15;   // 2¹⁵ · 255 · 255 < 2³¹: whatever the signs of the codes

inline vi dot(vi sum, vi left, vi right) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#elif defined(__SSE2__)
  return sum + (vi)_mm_madd_epi16((__m128i)left, (__m128i)right);
#else
  for (int i = 0; i < W; ++i) {
    int16_t l[2], r[2];
    const int32_t left_group = left[i], right_group = right[i];
    std::memcpy(l, &left_group, 4);
    std::memcpy(r, &right_group, 4);
    sum[i] += l[0] * r[0] + l[1] * r[1];
  }
  return sum;
#endif
}

// A group of ones, as either operand.
inline vi ones() { return splat(kGroup == 4 ? 0x01010101 : 0x00010001); }

// A left group in every lane.
inline vi broadcast(const Left* group) {
  int32_t bits;
  std::memcpy(&bits, group, 4);
  return splat(bits);
}

// Whether the codes of a product's operands are signed.
struct Signs {
  bool left, right;
};

// Where the left groups of a tile lie. For each tap a run of groups per row:
struct LeftRows {
  const Left* const* rows;  // rows[tap · stride + i] + offset: row i at that tap
  int64_t stride, offset;

  const Left* row(int64_t tap, int64_t i) const { return rows[tap * stride + i] + offset; }
};

// The same for one tap and rows at equal distances.
struct LeftStrided {
  const Left* first;
  int64_t stride;

  const Left* row(int64_t, int64_t i) const { return first + i * stride; }
};

// Group g of row i at first + g · stride + i · kGroup; for AMX, 16 rows × 16 groups transposed (see pack.h).
struct LeftInterleaved {
  const Left* first;
  int64_t stride;
};

#if !defined(__AMX_INT8__)
// Unrolled by name, because GCC otherwise keeps the array in memory and copies it there and back around the loop.
template <int R, int V>
inline void clear(vi (&c)[R][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) c[i][v] = vi{};
  }
}

template <int R, int V>
inline void store_sums(const vi (&c)[R][V], int32_t* sums, bool add) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      int32_t* to = sums + i * kPanel + v * W;
      store(to, add ? c[i][v] + load<vi>(to) : c[i][v]);
    }
  }
}

// sums (R × V · W, row stride kPanel) = or += Σ left · right over taps × groups. right: [tap][group][kPanel][kGroup].
template <int R, int V, class Rows>
void tile_of(const Rows& left, int64_t first_row, int64_t taps, int64_t groups, const Right* right,
             int32_t* sums, bool add) {
  vi c[R][V];
  clear(c);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Left* a[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = left.row(tap, first_row + i);
    for (int64_t g = 0; g < groups; ++g) {
      vi b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) b[v] = load<vi>(right + v * W * kGroup);
      right += kPanel * kGroup;
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vi l = broadcast(a[i] + g * kGroup);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) c[i][v] = dot(c[i][v], l, b[v]);
      }
    }
  }
  store_sums(c, sums, add);
}

template <int R, int V>
void tile_of(const LeftInterleaved& left, int64_t first_row, int64_t, int64_t groups, const Right* right,
             int32_t* sums, bool add) {
  vi c[R][V];
  clear(c);
  const Left* a = left.first + first_row * kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    vi b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = load<vi>(right + v * W * kGroup);
    right += kPanel * kGroup;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vi l = broadcast(a + i * kGroup);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) c[i][v] = dot(c[i][v], l, b[v]);
    }
    a += left.stride;
  }
  store_sums(c, sums, add);
}

// Rows of a tile of V vectors: sums enough to hide the latency of dot, and registers for them.
template <int V>
constexpr int kTileOf = V == 1 ? 8 : kRows;

template <int V, int R, class Source, class Done>
inline void last_tile(const Source& left, int64_t first_row, int64_t rows, int64_t taps, int64_t groups,
                      const Right* right, int32_t* sums, bool add, const Done& done) {
  if constexpr (R > 0) {
    if (rows < R) return last_tile<V, R - 1>(left, first_row, rows, taps, groups, right, sums, add, done);
    tile_of<R, V>(left, first_row, taps, groups, right, sums, add);
    done(first_row, R);
  }
}

template <int V, class Source, class Done>
inline void tiles_of(const Source& left, int64_t rows, int64_t taps, int64_t groups, const Right* right,
                     int32_t* sums, bool add, const Done& done) {
  constexpr int R = kTileOf<V>;
  int64_t i = 0;
  for (; i + R <= rows; i += R) {
    tile_of<R, V>(left, i, taps, groups, right, sums + i * kPanel, add);
    done(i, R);
  }
  last_tile<V, R - 1>(left, i, rows - i, taps, groups, right, sums + i * kPanel, add, done);
}

// All rows of a block, and at least the first `columns` of its panel; done(i, n) is called as soon as the sums of rows
// i … i + n − 1 are there, so that their stores to memory overlap with the next tile's arithmetic.
template <class Source, class Done>
inline void block_of(const Source& left, Signs, int64_t rows, int64_t columns, int64_t taps, int64_t groups,
                     const Right* right, int32_t* sums, bool add, const Done& done) {
  if (columns <= W) return tiles_of<1>(left, rows, taps, groups, right, sums, add, done);
  if (columns <= 2 * W) return tiles_of<2>(left, rows, taps, groups, right, sums, add, done);
  tiles_of<kVectors>(left, rows, taps, groups, right, sums, add, done);
}
#endif

}  // namespace fqt

#if defined(__AMX_INT8__)
#include "products/amx.h"
#endif
