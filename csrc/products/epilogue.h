// From integer sums to results: out = (sum − zero · ones) · row_scale · column_scale + Σ_r left_r · right_r + bias.
//
// zero · ones is exact, in integers: an offset's large part, which would cancel most of the sum after its rounding.
// Evaluated from left to right without contraction, so that it equals the reference bit for bit.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/bfloat16.h"
#include "common/platform.h"
#include "products/dot.h"

namespace fqt {

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
  const int64_t* ones;         // (period, columns)
  int64_t zero_step;           // 0 for one number, else 1
};

// Where a row of sums goes: the row of the result, and the sample that it belongs to (row ÷ period, which the callers
// know without a division).
struct Place {
  int64_t row, sample;
};

// Neighbouring rows of a result of period 1.
struct Neighbours {
  static constexpr bool kOnePosition = true;
  int64_t first;

  Place operator[](int64_t i) const { return {first + i, first + i}; }
};

// Any rows.
struct Listed {
  static constexpr bool kOnePosition = false;
  const Place* first;

  Place operator[](int64_t i) const { return first[i]; }
};

inline vf sums_to_float(const int32_t* sums) { return to_float(load<vi>(sums)); }
inline vf sums_to_float(const int64_t* sums) {
#if defined(__AVX512DQ__)
  const __m256 low = _mm512_cvtepi64_ps(_mm512_loadu_si512(sums)), high = _mm512_cvtepi64_ps(_mm512_loadu_si512(sums + 8));
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#endif
  vf value;
  for (int j = 0; j < W; ++j) value[j] = static_cast<float>(sums[j]);
  return value;
}

// What the float results of one row of the result need beside their sums, in copies that no store can alias.
struct RowOf {
  int64_t sample, position, first, right_stride;
  int32_t rank;
  bool one_column_scale;
  float row_scale;
  const float *column_scale, *left, *right, *bias;

  RowOf(const Epilogue& e, const Place& place, int64_t first_column)
      : sample(place.sample),
        position(place.row - place.sample * e.period),
        first(first_column),
        right_stride(e.period * e.columns),
        rank(e.rank),
        one_column_scale(e.column_scale && !e.column_scale_step),
        row_scale(e.row_scale ? e.row_scale[sample * e.row_scale_step] : 1.0f),
        column_scale(e.column_scale && e.column_scale_step ? e.column_scale + first : e.column_scale),
        left(e.left + sample * e.rank),
        right(e.right + position * e.columns + first),
        bias(e.bias ? e.bias + first : nullptr) {}

  // One vector of results, from column `first` + j; unless Whole only n < W columns are there.
  template <bool Whole>
  vf result(vf sum, int64_t j, int64_t n) const {
    const auto vector = [&](const float* p) { return Whole ? load<vf>(p + j) : load_part<vf>(p + j, n); };
    vf value = sum * splat(row_scale);
    if (column_scale) value *= one_column_scale ? splat(*column_scale) : vector(column_scale);
    for (int32_t r = 0; r < rank; ++r) value += splat(left[r]) * vector(right + r * right_stride);
    return bias ? value + vector(bias) : value;
  }
};

// W entries modulo 2³².
inline vi load_low(const int64_t* p) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_cvtepi64_epi32(_mm512_loadu_si512(p)), high = _mm512_cvtepi64_epi32(_mm512_loadu_si512(p + 8));
  return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  vi low;
  for (int j = 0; j < W; ++j) low[j] = static_cast<int32_t>(p[j]);
  return low;
#endif
}

// sums − zero · ones, modulo 2³² for int32: the difference fits, whatever its parts do.
template <class Sum>
inline void subtract_zero(const Epilogue& e, const RowOf& row, const Sum* sums, int64_t n, Sum* out) {
  typedef std::make_unsigned_t<Sum> Modular;
  const Modular zero = static_cast<Modular>(static_cast<Sum>(e.zero[row.sample * e.zero_step]));
  const int64_t* ones = e.ones + row.position * e.columns + row.first;
  for (int64_t j = 0; j < n; ++j) {
    out[j] = static_cast<Sum>(static_cast<Modular>(sums[j]) - zero * static_cast<Modular>(ones[j]));
  }
}

inline vf as_stored(vf value, const float*) { return value; }
inline vh as_stored(vf value, const uint16_t*) { return to_bfloat16(value); }

template <bool Whole, class Sum, class Out>
inline void write_floats(const RowOf& row, const Sum* sums, int64_t n, Out* out) {
  int64_t j = 0;
#pragma GCC unroll 16
  for (; j + W <= n; j += W) {
    store(out + j, as_stored(row.template result<true>(sums_to_float(sums + j), j, W), out));
  }
  if (!Whole && j < n) {
    const auto last = as_stored(row.template result<false>(sums_to_float(sums + j), j, n - j), out);
    store_part(out + j, last, n - j);
  }
}

// Writes n ≤ kPanel sums to one row, columns first … first + n − 1. Whole panels have a length that the compiler
// knows; the sums are readable up to the panel's end either way.
template <bool Whole, class Sum>
inline void write_part(const Epilogue& e, const Sum* sums, const Place& place, int64_t first, int64_t width) {
  const int64_t n = Whole ? kPanel : width;
  const int64_t at = place.row * e.columns + first;
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
  const RowOf context(e, place, first);
  Sum centred[kPanel];
  if (e.zero) {
    subtract_zero(e, context, sums, n, centred);
    sums = centred;
  }
  if (e.type == kFloat32) {
    write_floats<Whole>(context, sums, n, static_cast<float*>(e.out) + at);
  } else {
    write_floats<Whole>(context, sums, n, static_cast<uint16_t*>(e.out) + at);
  }
}

template <class Sum>
inline void write_row(const Epilogue& e, const Sum* sums, const Place& place, int64_t first, int64_t n) {
  if (n == kPanel) {
    write_part<true>(e, sums, place, first, n);
  } else {
    write_part<false>(e, sums, place, first, n);
  }
}

template <int V>
inline void store_all(float* out, const vf (&value)[V]) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(out + v * W, value[v]);
}
template <int V>
inline void store_all(uint16_t* out, const vf (&value)[V]) {
#pragma GCC unroll 8
  for (int v = 0; v + 2 <= V; v += 2) store_bfloat16(out + v * W, value[v], value[v + 1]);
  if (V % 2) store(out + (V - 1) * W, to_bfloat16(value[V - 1]));
}

// n rows of V whole vectors as floats; what belongs to the columns stays in registers. No zero but for Neighbours.
template <int V, int Rank, class Out, class Places>
void write_tile(const Epilogue& e, const int32_t* sums, int64_t n, const Places places, int64_t first) {
  constexpr bool kOnePosition = Places::kOnePosition;
  const int64_t columns = e.columns, period = e.period, right_stride = e.period * e.columns;
  const int64_t scale_step = e.row_scale ? e.row_scale_step : 0, zero_step = e.zero_step;
  const float one = 1.0f, *row_scale = e.row_scale ? e.row_scale : &one, *lefts = e.left, *rights = e.right + first;
  const float* column_scales = e.column_scale ? e.column_scale : &one;
  const int32_t* zeros = e.zero;
  Out* all = static_cast<Out*>(e.out) + first;
  vf column_scale[V], bias[V], right[Rank + 1][V];
  vi ones[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    column_scale[v] = e.column_scale_step ? load<vf>(column_scales + first + v * W) : splat(*column_scales);
    bias[v] = e.bias ? load<vf>(e.bias + first + v * W) : splat(-0.0f);  // x + −0 is x, also for x = −0
    ones[v] = kOnePosition && zeros ? load_low(e.ones + first + v * W) : vi{};
#pragma GCC unroll 2
    for (int r = 0; r < Rank; ++r) right[r][v] = kOnePosition ? load<vf>(rights + r * right_stride + v * W) : vf{};
  }
  for (int64_t i = 0; i < n; ++i, sums += kPanel) {
    const Place place = places[i];
    const float* from = rights + (place.row - place.sample * period) * columns;
    const vf scale = splat(row_scale[place.sample * scale_step]);
    const vi zero = splat(kOnePosition && zeros ? zeros[place.sample * zero_step] : 0);
    vf value[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      vi sum = load<vi>(sums + v * W);
      if (kOnePosition && zeros) sum = (vi)((vu)sum - (vu)zero * (vu)ones[v]);  // modulo 2³²: the difference fits
      value[v] = to_float(sum) * scale * column_scale[v];
#pragma GCC unroll 2
      for (int r = 0; r < Rank; ++r) {
        const vf part = kOnePosition ? right[r][v] : load<vf>(from + r * right_stride + v * W);
        value[v] += splat(lefts[place.sample * Rank + r]) * part;
      }
      value[v] += bias[v];
    }
    store_all(all + place.row * columns, value);
  }
}

template <int V, class Out, class Places>
void write_tile(const Epilogue& e, const int32_t* sums, int64_t n, const Places& places, int64_t first) {
  if (e.rank == 0) return write_tile<V, 0, Out>(e, sums, n, places, first);
  if (e.rank == 1) return write_tile<V, 1, Out>(e, sums, n, places, first);
  return write_tile<V, 2, Out>(e, sums, n, places, first);
}

template <int V, class Places>
bool write_tile(const Epilogue& e, const int32_t* sums, int64_t n, const Places& places, int64_t first) {
  if (e.type == kFloat32) return write_tile<V, float>(e, sums, n, places, first), true;
  if (e.type == kBfloat16) return write_tile<V, uint16_t>(e, sums, n, places, first), true;
  return false;
}

// Writes n rows of `width` ≤ kPanel sums, at distances of kPanel, to places[0] … places[n − 1].
template <class Sum, class Places>
void write_rows(const Epilogue& e, const Sum* sums, int64_t n, const Places& places, int64_t first, int64_t width) {
  if constexpr (std::is_same_v<Sum, int32_t>) {
    if (e.rank <= 2 && (Places::kOnePosition || !e.zero)) {
      if (width == kPanel && write_tile<kVectors>(e, sums, n, places, first)) return;
      if (width == 2 * W && write_tile<2>(e, sums, n, places, first)) return;
      if (width == W && write_tile<1>(e, sums, n, places, first)) return;
    }
  }
  for (int64_t i = 0; i < n; ++i) write_row(e, sums + i * kPanel, places[i], first, width);
}

}  // namespace fqt
