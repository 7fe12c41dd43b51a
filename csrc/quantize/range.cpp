// Least and greatest values: order-free, so every split of the work gives the same result. NaN if there is one.
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "common/parallel.h"
#include "common/platform.h"
#include "common/simd.h"
#include "common/source.h"
#include "quantize/range.h"

using namespace fqt;

namespace {

constexpr float kLeastStep = 0x1p-126f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Range {
  float lo = kInfinity, hi = -kInfinity;
  bool nan = false;

  void add(float lo_other, float hi_other) {
    nan = nan || lo_other != lo_other;
    lo = lo_other < lo ? lo_other : lo;
    hi = hi_other > hi ? hi_other : hi;
  }
  float least() const { return nan ? NAN : lo; }
  float greatest() const { return nan ? NAN : hi; }
};

// Over the lanes of a vector without NaN. Rows are short: lane by lane this took as long as the row itself.
inline float least_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)v);
#else
  float least = v[0];
  for (int j = 1; j < W; ++j) least = v[j] < least ? v[j] : least;
  return least;
#endif
}
inline float largest_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int j = 1; j < W; ++j) largest = v[j] > largest ? v[j] : largest;
  return largest;
#endif
}

constexpr int64_t kPiece = 1024;  // entries that are read at a time
constexpr int64_t kAhead = 2048;  // how many entries ahead memory is asked for

Range range_of(const float* x, int64_t n) {
  constexpr int kLanes = 4;  // independent chains, so that the latency of a minimum does not limit the rate
  vf lo[kLanes], hi[kLanes];
  vi nan{};
  for (int k = 0; k < kLanes; ++k) lo[k] = splat(kInfinity), hi[k] = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes * W <= n; i += kLanes * W) {
    for (int k = 0; k < kLanes; ++k) {
      const vf v = load<vf>(x + i + k * W);
      nan |= (vi)(v != v);
      lo[k] = fqt::least(v, lo[k]);
      hi[k] = fqt::largest(v, hi[k]);
    }
  }
  for (int k = 1; k < kLanes; ++k) lo[0] = fqt::least(lo[k], lo[0]), hi[0] = fqt::largest(hi[k], hi[0]);
  Range range;
  range.nan = any(nan);
  range.add(least_of(lo[0]), largest_of(hi[0]));
  for (; i < n; ++i) range.add(x[i], x[i]);
  return range;
}

// Once NaN, NaN for ever.
inline vf least_or_nan(vf v, vf now) {
  const vf least = v < now ? v : now;  // `now` if either is NaN
  return v == v ? least : v;
}
inline vf greatest_or_nan(vf v, vf now) {
  const vf greatest = v > now ? v : now;
  return v == v ? greatest : v;
}

Range range_of(const Source& source, int64_t start, int64_t n) {
  float buffer[kPiece + W];
  Range range;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t length = n - i < kPiece ? n - i : kPiece;
    if (n > kAhead) prefetch(source, start + i + kAhead, length);  // hardware stops at the ends of pages
    const Range part = range_of(values(source, start + i, length, buffer), length);
    range.add(part.least(), part.greatest());
  }
  return range;
}

}  // namespace

// lo, hi: (rows,). At least one column.
FQT_API int fqt_range_rows(const Source* source, int64_t rows, int64_t columns, float* lo, float* hi, int threads) {
  const int64_t rows_per_item = 1 + kPiece / columns;
  parallel_for(ceil_div(rows, rows_per_item), rows * columns, threads, [&](int64_t item) {
    for (int64_t r = item * rows_per_item; r < rows && r < (item + 1) * rows_per_item; ++r) {
      const Range range = range_of(*source, r * columns, columns);
      lo[r] = range.least();
      hi[r] = range.greatest();
    }
  });
  return kDone;
}

// lo, hi: one number each. At least one entry.
FQT_API int fqt_range_tensor(const Source* source, int64_t n, float* lo, float* hi, int threads) {
  constexpr int64_t kChunk = 1 << 14;
  const int64_t chunks = ceil_div(n, kChunk);
  std::unique_ptr<Range[]> part(new (std::nothrow) Range[chunks]);
  if (!part) return kNoMemory;
  parallel_for(chunks, n, threads, [&](int64_t c) {
    part[c] = range_of(*source, c * kChunk, n - c * kChunk < kChunk ? n - c * kChunk : kChunk);
  });
  Range range;
  for (int64_t c = 0; c < chunks; ++c) range.add(part[c].least(), part[c].greatest());
  *lo = range.least();
  *hi = range.greatest();
  return kDone;
}

// lo, hi: (columns,). At least one row.
FQT_API int fqt_range_columns(const Source* source, int64_t rows, int64_t columns, float* lo, float* hi,
                              int threads) {
  constexpr int64_t kStrip = 1024;  // its running minima and maxima stay in the first-level cache
  const int64_t strips = ceil_div(columns, kStrip);
  int64_t bands = ceil_div(rows * columns, int64_t{1} << 16) / (strips ? strips : 1);
  bands = bands < 1 ? 1 : bands > rows ? rows : bands;
  std::unique_ptr<float[]> part(new (std::nothrow) float[2 * bands * columns]);
  if (!part) return kNoMemory;
  parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
    const int64_t band = item / strips, first = item % strips * kStrip;
    const int64_t width = columns - first < kStrip ? columns - first : kStrip;
    float buffer[kStrip + W];
    float* least_part = part.get() + 2 * band * columns + first;
    float* greatest_part = least_part + columns;
    for (int64_t j = 0; j < width; ++j) least_part[j] = kInfinity, greatest_part[j] = -kInfinity;
    for (int64_t r = rows * band / bands; r < rows * (band + 1) / bands; ++r) {
      const float* row = values(*source, r * columns + first, width, buffer);
      int64_t j = 0;
      for (; j + W <= width; j += W) {
        const vf v = load<vf>(row + j);
        store(least_part + j, least_or_nan(v, load<vf>(least_part + j)));
        store(greatest_part + j, greatest_or_nan(v, load<vf>(greatest_part + j)));
      }
      for (; j < width; ++j) {
        const vf v = splat(row[j]);
        least_part[j] = least_or_nan(v, splat(least_part[j]))[0];
        greatest_part[j] = greatest_or_nan(v, splat(greatest_part[j]))[0];
      }
    }
  });
  for (int64_t j = 0; j < columns; ++j) {
    Range range;
    for (int64_t b = 0; b < bands; ++b) {
      range.add(part[2 * b * columns + j], part[(2 * b + 1) * columns + j]);
    }
    lo[j] = range.least();
    hi[j] = range.greatest();
  }
  return kDone;
}

namespace fqt {

void range_of_entries(const Source& source, int64_t start, int64_t n, float* lo, float* hi) {
  const Range range = range_of(source, start, n);
  *lo = range.least();
  *hi = range.greatest();
}

static float affine_step(float lo, float hi, float count) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const float half = hi * 0.5f - lo * 0.5f > kMax / 4 ? 0.5f : 1.0f, s = (hi * half - lo * half) / count / half;
  return s < kLeastStep ? kLeastStep : s;
}

// As reference._zero_on_code, for finite lo ≤ hi that are not both zero.
static void zero_on_code(float lo, float hi, float count, float* step, float* offset) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const float widest = static_cast<float>(static_cast<double>(kMax) * (1 - 0x1p-15));
  lo = lo < 0 ? lo : 0.0f;
  hi = hi > 0 ? hi : 0.0f;
  const float least_code = lo < 0 ? 1.0f : 0.0f, most = count - (hi > 0 ? 1.0f : 0.0f);
  const auto clamped = [&](float z) {
    const float above = z < least_code ? least_code : z;
    return above > most ? most : above;
  };
  const auto widened = [&](float z) {
    const float below = lo < 0 ? -lo / z : 0.0f, above = hi > 0 ? hi / (count - z) : 0.0f;
    return below > above ? below : above;
  };
  const float floor = std::floor(-lo / affine_step(lo, hi, count));
  const float below = clamped(floor), above = clamped(floor + 1);
  const float z = widened(below) <= widened(above) ? below : above;
  float s = widened(z);
  s = s < kLeastStep ? kLeastStep : s > widest ? widest : s;
  uint32_t bits;
  std::memcpy(&bits, &s, 4);
  bits = (bits + 0xff) & ~uint32_t{0xff};
  std::memcpy(&s, &bits, 4);
  *step = s;
  *offset = z == 0 ? 0.0f : -z * s < -kMax ? -kMax : -z * s;
}

void group_parameters(float lo, float hi, int mode, int steps, float* step, float* offset) {
  const float count = static_cast<float>(steps);
  if (!std::isfinite(lo) || !std::isfinite(hi)) {
    *step = NAN;
    *offset = 0.0f;
  } else if (mode == kSymmetric) {
    const float magnitude = std::fabs(lo) > std::fabs(hi) ? std::fabs(lo) : std::fabs(hi), s = magnitude / count;
    *step = lo == hi ? magnitude : s < kLeastStep ? kLeastStep : s;
    *offset = 0.0f;
  } else if (lo == hi) {
    *step = 0.0f;
    *offset = lo;
  } else if (mode == kZero) {
    zero_on_code(lo, hi, count, step, offset);
  } else {
    *step = affine_step(lo, hi, count);
    *offset = lo;
  }
}

}  // namespace fqt

// step and offset (n,) of groups with ranges lo … hi: as reference.parameters; mode is a fqt::Mode.
FQT_API int fqt_parameters(const float* lo, const float* hi, int64_t n, int mode, int steps, float* step, float* offset,
                           int) {
  for (int64_t i = 0; i < n; ++i) group_parameters(lo[i], hi[i], mode, steps, step + i, offset + i);
  return kDone;
}
