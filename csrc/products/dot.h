// The inner kernel of all integer products: a tile of rows × columns, accumulated in int32 without saturation.
//
// Both operands come in groups of kGroup neighbouring k, 32 bits per group: four bytes where the processor has a
// four-term dot product (u8 × s8, VNNI; equal signs, NEON; any signs, AMX), two int16 where it has not. There the library
// of narrow codes (FQT_NARROW) takes four bytes too: the byte instruction of AVX2 adds two products in 16 bits, and
// saturates, but not where the codes are known to be small enough (see Plan). A left group is broadcast, a right one is a
// lane of a vector; on NEON (neon.h) both are lanes. AMX (amx.h) multiplies whole tiles of the same right operand by rows
// of kTerms k that lie together; NEON's matrix products (i8mm.h) take groups of eight bytes, two rows by two columns.
//
// Bound: |Left|·|Right| ≤ 255·128, so kMaxTerms terms stay below 2³¹. Longer sums are cut by the callers.
#pragma once

#include <cstdint>

#include "common/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fqt {

#if defined(__AMX_INT8__)
typedef uint8_t Left, Right;  // the code's byte, whatever its sign
constexpr int kGroup = 4, kVectors = 4;
#elif defined(__AVX512VNNI__)
typedef uint8_t Left;
typedef int8_t Right;
constexpr int kGroup = 4, kVectors = 4;
#elif defined(__AVXVNNI__)
typedef uint8_t Left;
typedef int8_t Right;
constexpr int kGroup = 4, kVectors = 2;
#elif defined(FQT_NARROW)
typedef uint8_t Left, Right;  // the code's byte; one operand is unsigned, the other signed
constexpr int kGroup = 4, kVectors = 2;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
typedef uint8_t Left, Right;  // the code's byte, whatever its sign
constexpr int kGroup = 8, kVectors = 4;
#elif defined(__ARM_FEATURE_DOTPROD)
typedef uint8_t Left, Right;  // the code's byte; both operands are signed, or neither
constexpr int kGroup = 4, kVectors = 4;
#else
typedef int16_t Left;
typedef int16_t Right;
constexpr int kGroup = 2, kVectors = 2;
#endif
#if defined(__AMX_INT8__)
constexpr int kTerms = 64, kTileRows = 16;  // left operands are padded to multiples, their k with zeros
#else
constexpr int kTerms = kGroup, kTileRows = 1;
#endif
constexpr int kPanel = kVectors * W;     // columns of a tile
constexpr int64_t kMaxTerms = 1 << 15;   // 2¹⁵ · 255 · 255 < 2³¹: whatever the signs of the codes

// The least and the greatest code of an operand.
struct Range {
  int32_t low, high;

  bool is_signed() const { return low < 0; }
};

// How two operands are multiplied: what is added to the codes so that they fit, how the bytes are then read, and how
// many groups' products are added up in 16 bits (1 where that is not done; 0 where narrow codes are asked for and
// these are not).
struct Plan {
  int left_shift, right_shift;
  bool left_signed, right_signed;
  int64_t steps;
};

#if defined(FQT_NARROW)
// Two products of magnitudes up to u and s, `steps` times, in 16 bits.
inline int64_t narrow_steps(int64_t u, int64_t s) { return u && s ? 32767 / (2 * u * s) : 32767; }

inline int64_t magnitude(const Range& r) { return -r.low > r.high ? -r.low : r.high; }

// With the left operand unsigned, lifted if its codes are not, and the right one signed, lowered if it does not fit a
// signed byte; or the other way round, a right operand that is unsigned being lifted by nothing. Shifts cost sums of
// codes: they are avoided.
inline Plan plan(const Range& left, const Range& right) {
  const auto lowered = [](const Range& r) { return r.high > 127 ? Range{r.low - 128, r.high - 128} : r; };
  const int lift = left.is_signed() ? -left.low : 0;
  const Range low_right = lowered(right), low_left = lowered(left);
  Plan found{lift, low_right.low - right.low, false, true, 0};
  if (left.high + lift <= 255) found.steps = narrow_steps(left.high + lift, magnitude(low_right));
  if (right.is_signed()) return found;
  const Plan turned{low_left.low - left.low, 0, true, false, narrow_steps(right.high, magnitude(low_left))};
  const auto shifts = [](const Plan& p) { return (p.left_shift != 0) + (p.right_shift != 0); };
  const bool better = turned.steps && (!found.steps || shifts(turned) < shifts(found) ||
                                       (shifts(turned) == shifts(found) && turned.steps > found.steps));
  return better ? turned : found;
}
#elif (defined(__AVX512VNNI__) || defined(__AVXVNNI__)) && !defined(__AMX_INT8__)
#define FQT_SHIFTED  // operands of one sign only
inline Plan plan(const Range& left, const Range& right) {
  return {left.is_signed() ? 128 : 0, right.high > 127 ? -128 : 0, false, true, 1};
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
// There are products of any signs but of signed left by unsigned right codes: these are lowered.
inline Plan plan(const Range& left, const Range& right) {
  const bool lowered = left.is_signed() && right.high > 127;
  return {0, lowered ? -128 : 0, left.is_signed(), left.is_signed() || right.is_signed(), 1};
}
#elif defined(__ARM_FEATURE_DOTPROD)
// Unsigned codes beside signed ones are lowered, unless they fit a signed byte.
inline Plan plan(const Range& left, const Range& right) {
  if (!left.is_signed() && !right.is_signed()) return {0, 0, false, false, 1};
  return {left.high > 127 ? -128 : 0, right.high > 127 ? -128 : 0, true, true, 1};
}
#else
inline Plan plan(const Range& left, const Range& right) { return {0, 0, left.is_signed(), right.is_signed(), 1}; }
#endif

#if !defined(FQT_NARROW)
// sum + left · right, on NEON of signed operands. In place by name for AVX2: GCC otherwise copies sums to and fro, and
// spills some.
inline vi dot(vi sum, vi left, vi right) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#elif defined(__AVXVNNI__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
  return sum;
#elif defined(__AVX2__)
  const __m256i terms = _mm256_madd_epi16((__m256i)left, (__m256i)right);
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(terms));
  return sum;
#elif defined(__SSE2__)
  return sum + (vi)_mm_madd_epi16((__m128i)left, (__m128i)right);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)left, (int8x16_t)right);
#elif defined(__aarch64__)
  const int16x8_t l = (int16x8_t)left, r = (int16x8_t)right;
  return sum + (vi)vpaddq_s32(vmull_s16(vget_low_s16(l), vget_low_s16(r)), vmull_high_s16(l, r));
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

// 32 bits of ones, as either operand.
inline vi ones() { return splat(sizeof(Left) == 1 ? 0x01010101 : 0x00010001); }

// add_left, add_right: sum + Σ over the terms of each of W neighbouring groups of the left, of the right operand.
#if defined(__ARM_FEATURE_DOTPROD)
inline vi add_bytes(vi sum, const uint8_t* bytes, bool is_signed) {
  const vi b = load<vi>(bytes);
  return is_signed ? dot(sum, b, ones()) : (vi)vdotq_u32((uint32x4_t)sum, (uint8x16_t)b, (uint8x16_t)ones());
}

inline vi add_groups(vi sum, const uint8_t* groups, bool is_signed) {
  if constexpr (kGroup == 4) return add_bytes(sum, groups, is_signed);
  const vi first = add_bytes(vi{}, groups, is_signed), last = add_bytes(vi{}, groups + 16, is_signed);
  return sum + (vi)vpaddq_s32((int32x4_t)first, (int32x4_t)last);
}
inline vi add_left(vi sum, const Left* groups, const Plan& p) { return add_groups(sum, groups, p.left_signed); }
inline vi add_right(vi sum, const Right* groups, const Plan& p) { return add_groups(sum, groups, p.right_signed); }
#else
inline vi add_left(vi sum, const Left* groups, const Plan&) { return dot(sum, load<vi>(groups), ones()); }
inline vi add_right(vi sum, const Right* groups, const Plan&) { return dot(sum, ones(), load<vi>(groups)); }
#endif
#else
// A group's products, two and two, in 16 bits.
template <bool LeftSigned>
inline __m256i products(vi left, vi right) {
  return LeftSigned ? _mm256_maddubs_epi16((__m256i)right, (__m256i)left)
                    : _mm256_maddubs_epi16((__m256i)left, (__m256i)right);
}

// In place, as in the other products of AVX2: GCC otherwise copies sums to and fro, and spills some.
inline void add_halves(__m256i& sum, __m256i terms) { __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(terms)); }

inline void widen(vi& sum, __m256i halves) {
  const __m256i terms = _mm256_madd_epi16(halves, _mm256_set1_epi16(1));
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(terms));
}

inline vi add_groups(vi sum, const uint8_t* groups, bool is_signed) {
  const vi one = splat(0x01010101), bytes = load<vi>(groups);
  widen(sum, is_signed ? products<false>(one, bytes) : products<true>(one, bytes));
  return sum;
}
inline vi add_left(vi sum, const Left* groups, const Plan& p) { return add_groups(sum, groups, p.left_signed); }
inline vi add_right(vi sum, const Right* groups, const Plan& p) { return add_groups(sum, groups, p.right_signed); }
#endif

// What an operand stands for.
inline int32_t value_of(Left operand, bool is_signed) {
  return sizeof(Left) == 1 && is_signed ? static_cast<int8_t>(operand) : operand;
}

// A left group in every lane.
inline vi broadcast(const Left* group) {
  int32_t bits;
  std::memcpy(&bits, group, 4);
  return splat(bits);
}

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

// Where the left groups of a tile's rows are, at one tap: each row's, one after the other; or interleaved.
template <int R>
struct ByRow {
  const Left* row[R];

  template <class Rows>
  ByRow(const Rows& left, int64_t tap, int64_t first_row) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) row[i] = left.row(tap, first_row + i);
  }
  vi group(int i, int64_t g) const { return broadcast(row[i] + g * kGroup); }
};

template <int R>
struct ByGroup {
  const Left* first;
  int64_t stride;

  ByGroup(const LeftInterleaved& left, int64_t, int64_t first_row)
      : first(left.first + first_row * kGroup), stride(left.stride) {}
  vi group(int i, int64_t g) const { return broadcast(first + g * stride + i * kGroup); }
};

template <int R>
ByRow<R> places(const LeftRows& left, int64_t tap, int64_t first_row) { return {left, tap, first_row}; }
template <int R>
ByRow<R> places(const LeftStrided& left, int64_t tap, int64_t first_row) { return {left, tap, first_row}; }
template <int R>
ByGroup<R> places(const LeftInterleaved& left, int64_t tap, int64_t first_row) { return {left, tap, first_row}; }

constexpr int64_t kPanelGroup = kPanel * kGroup;  // a group of a panel

}  // namespace fqt

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include "products/i8mm.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "products/neon.h"
#endif

namespace fqt {

#if !defined(__ARM_FEATURE_DOTPROD)
template <int V>
inline void load_right(const Right* right, vi (&b)[V]) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) b[v] = load<vi>(right + v * W * kGroup);
}

// c += Σ left · right over the groups of a tap. right: [group][kPanel][kGroup].
#if !defined(FQT_NARROW)
struct Exact {
  // Of 16 registers on AVX2: 12 sums, 2 right vectors, 1 left, 1 product. A tile one vector wide has 8 sums.
  static constexpr int kRows = 6, kNarrowRows = 8;

  template <int R, int V, class Places>
  static void add(const Places& left, int64_t groups, int64_t, const Right* right, vi (&c)[R][V]) {
    for (int64_t g = 0; g < groups; ++g, right += kPanelGroup) {
      vi b[V];
      load_right(right, b);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vi l = left.group(i, g);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) c[i][v] = dot(c[i][v], l, b[v]);
      }
    }
  }
};
#else
template <bool LeftSigned>
struct Narrow {
  static constexpr int kRows = 5, kNarrowRows = 8;  // 10 sums, 2 right vectors, 1 left, 1 product, ones

  template <int R, int V, class Places>
  static void add(const Places& left, int64_t groups, int64_t, const Right* right, vi (&c)[R][V]) {
    for (int64_t g = 0; g < groups; ++g, right += kPanelGroup) {
      vi b[V];
      load_right(right, b);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vi l = left.group(i, g);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) widen(c[i][v], products<LeftSigned>(l, b[v]));
      }
    }
  }
};

// With sums over `steps` groups in 16 bits.
template <bool LeftSigned>
struct Narrower {
  static constexpr int kRows = 3, kNarrowRows = 6;  // 6 sums of 16 bits, and as many of 32

  template <bool First, int R, int V, class Places>
  static void add_group(const Places& left, int64_t g, const Right* right, __m256i (&halves)[R][V]) {
    vi b[V];
    load_right(right, b);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vi l = left.group(i, g);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const __m256i terms = products<LeftSigned>(l, b[v]);
        if (First) {
          halves[i][v] = terms;
        } else {
          add_halves(halves[i][v], terms);
        }
      }
    }
  }

  template <int R, int V, class Places>
  static void add(const Places& left, int64_t groups, int64_t steps, const Right* right, vi (&c)[R][V]) {
    for (int64_t g = 0; g < groups;) {
      __m256i halves[R][V];
      const int64_t end = groups - g < steps ? groups : g + steps;
      add_group<true>(left, g, right, halves);
      for (++g, right += kPanelGroup; g < end; ++g, right += kPanelGroup) add_group<false>(left, g, right, halves);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) widen(c[i][v], halves[i][v]);
      }
    }
  }
};
#endif
#endif

#if !defined(__ARM_FEATURE_MATMUL_INT8)
// sums (R × V · W, row stride kPanel) = or += Σ left · right over taps × groups. right: [tap][group][kPanel][kGroup].
template <class How, int R, int V, class Source>
void tile_of(const Source& left, int64_t first_row, int64_t taps, int64_t groups, int64_t steps, const Right* right,
             int32_t* sums, bool add) {
  vi c[R][V];
  clear(c);
  for (int64_t tap = 0; tap < taps; ++tap, right += groups * kPanelGroup) {
    How::add(places<R>(left, tap, first_row), groups, steps, right, c);
  }
  store_sums(c, sums, add);
}
#endif

// Rows of a tile of V vectors: sums enough to hide the latency of dot, and registers for them.
template <class How, int V>
constexpr int kTileOf = V > 1 ? How::kRows : How::kNarrowRows;

template <class How, int V, int R, class Source, class Done>
inline void last_tile(const Source& left, int64_t first_row, int64_t rows, int64_t taps, int64_t groups, int64_t steps,
                      const Right* right, int32_t* sums, bool add, const Done& done) {
  if constexpr (R > 0) {
    if (rows < R) {
      return last_tile<How, V, R - 1>(left, first_row, rows, taps, groups, steps, right, sums, add, done);
    }
    tile_of<How, R, V>(left, first_row, taps, groups, steps, right, sums, add);
    done(first_row, R);
  }
}

template <class How, int V, class Source, class Done>
inline void tiles_of(const Source& left, int64_t rows, int64_t taps, int64_t groups, int64_t steps, const Right* right,
                     int32_t* sums, bool add, const Done& done) {
  constexpr int R = kTileOf<How, V>;
  int64_t i = 0;
  for (; i + R <= rows; i += R) {
    tile_of<How, R, V>(left, i, taps, groups, steps, right, sums + i * kPanel, add);
    done(i, R);
  }
  last_tile<How, V, R - 1>(left, i, rows - i, taps, groups, steps, right, sums + i * kPanel, add, done);
}

template <class How, class Source, class Done>
inline void panel_of(const Source& left, int64_t rows, int64_t columns, int64_t taps, int64_t groups, int64_t steps,
                     const Right* right, int32_t* sums, bool add, const Done& done) {
  if (columns <= W) return tiles_of<How, 1>(left, rows, taps, groups, steps, right, sums, add, done);
  if (columns <= 2 * W) return tiles_of<How, 2>(left, rows, taps, groups, steps, right, sums, add, done);
  tiles_of<How, kVectors>(left, rows, taps, groups, steps, right, sums, add, done);
}

// All rows of a block, and at least the first `columns` of its panel; done(i, n) is called as soon as the sums of rows
// i … i + n − 1 are there, so that their stores to memory overlap with the next tile's arithmetic.
template <class Source, class Done>
inline void block_of(const Source& left, const Plan& p, int64_t rows, int64_t columns, int64_t taps, int64_t groups,
                     const Right* right, int32_t* sums, bool add, const Done& done) {
#if defined(FQT_NARROW)
  const int64_t n = p.steps;
  if (p.left_signed) {
    if (n > 1) return panel_of<Narrower<true>>(left, rows, columns, taps, groups, n, right, sums, add, done);
    return panel_of<Narrow<true>>(left, rows, columns, taps, groups, n, right, sums, add, done);
  }
  if (n > 1) return panel_of<Narrower<false>>(left, rows, columns, taps, groups, n, right, sums, add, done);
  panel_of<Narrow<false>>(left, rows, columns, taps, groups, n, right, sums, add, done);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  if (p.left_signed) return panel_of<Pairs<true, true>>(left, rows, columns, taps, groups, 1, right, sums, add, done);
  if (p.right_signed) return panel_of<Pairs<false, true>>(left, rows, columns, taps, groups, 1, right, sums, add, done);
  panel_of<Pairs<false, false>>(left, rows, columns, taps, groups, 1, right, sums, add, done);
#elif defined(__ARM_FEATURE_DOTPROD)
  if (p.left_signed) return panel_of<Lanes<true>>(left, rows, columns, taps, groups, 1, right, sums, add, done);
  panel_of<Lanes<false>>(left, rows, columns, taps, groups, 1, right, sums, add, done);
#else
  panel_of<Exact>(left, rows, columns, taps, groups, p.steps, right, sums, add, done);
#endif
}
#endif

}  // namespace fqt

#if defined(__AMX_INT8__)
#include "products/amx.h"
#endif
