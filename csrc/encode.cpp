// Codes of a matrix.
//
// Work is cut into chunks of the flat row-major index, since that index is also the noise counter: each chunk's
// noise is made once, into a buffer that stays in the first-level cache, whatever the length of a row.
#include <memory>
#include <new>
#include <type_traits>

#include "grid.h"
#include "parallel.h"
#include "philox.h"
#include "platform.h"
#include "range.h"
#include "source.h"

using namespace fqt;

namespace {

// The first four are the C interface's; the last two are arithmetic for the same codes.
enum Rounding : int { kNearest = 0, kStochastic = 1, kDithered = 2, kBest = 3, kStochasticFixed = 4, kDitheredFixed = 5 };

constexpr int64_t kChunk = 2048;  // a multiple of kNoiseWords
static_assert(kChunk % kNoiseWords == 0, "chunks start at whole vectors of noise");

struct Task {
  const Source& source;
  const float *step, *offset;
  int64_t columns;
  float low, high;
  uint8_t* codes;
  const uint32_t *row_noise, *column_noise;  // dithered only
};

// What one run of neighbouring entries of a row needs beside its entries.
struct Run {
  int64_t column;         // of the first entry
  Groups groups;          // unless the groups are columns
  const uint32_t* noise;  // of the first entry, stochastic only
  int32_t row_noise;      // dithered only
};

constexpr bool is_stochastic(int rounding) { return rounding == kStochastic || rounding == kStochasticFixed; }
constexpr bool is_dithered(int rounding) { return rounding == kDithered || rounding == kDitheredFixed; }

template <int Rounding, bool Columns>
inline vb encode_vector(const Task& task, const Run& run, vf x, int64_t i, int64_t n) {
  const int64_t column = run.column + i;
  Groups g = run.groups;
  if (Columns) {
    g = n == W ? Groups::of(load<vf>(task.step + column), load<vf>(task.offset + column))
               : Groups::of(load_part<vf>(task.step + column, n), load_part<vf>(task.offset + column, n));
  }
  const vf t = position(x, g, splat(task.low), splat(task.high));
  vi code;
  if (Rounding == kNearest) {
    code = round_nearest(t);
  } else if (is_stochastic(Rounding)) {
    const vi u = load<vi>(run.noise + i);
    code = Rounding == kStochastic ? round_stochastic(t, u) : round_stochastic_fixed(t, u);
  } else {
    const uint32_t* noise = task.column_noise + column;
    const vi k = run.row_noise + (n == W ? load<vi>(noise) : load_part<vi>(noise, n));
    code = Rounding == kDithered ? round_dithered(t, k) : round_dithered_fixed(t, k);
  }
  return to_bytes(code);
}

template <int Rounding, bool Columns>
void encode_run(Task task, Run run, const float* x, uint8_t* codes, int64_t n) {  // copies: no store can reach them
  int64_t i = 0;
  for (; i + W <= n; i += W) store(codes + i, encode_vector<Rounding, Columns>(task, run, load<vf>(x + i), i, W));
  if (i < n) {
    const vf last = load_part<vf>(x + i, n - i);
    store_part(codes + i, encode_vector<Rounding, Columns>(task, run, last, i, n - i), n - i);
  }
}

template <int Rounding, bool Rows, bool Columns>
void encode_all(const Task& task, int64_t rows, uint64_t seed, int threads) {
  const int64_t size = rows * task.columns;
  const Philox philox(seed, kRounding);
  parallel_for(ceil_div(size, 8 * kChunk), size, threads, [&](int64_t item) {
    uint32_t noise[kChunk + W];  // the tail of the last row may read one vector past the noise
    float buffer[kChunk + W];
    for (int64_t start = item * 8 * kChunk; start < size && start < (item + 1) * 8 * kChunk; start += kChunk) {
      const int64_t end = start + kChunk < size ? start + kChunk : size;
      if (is_stochastic(Rounding)) philox.fill_u24(start, end - start, noise);
      const float* x = values(task.source, start, end - start, buffer);
      for (int64_t i = start; i < end;) {
        const int64_t row = i / task.columns, column = i % task.columns;
        const int64_t n = task.columns - column < end - i ? task.columns - column : end - i;
        Run run{column, {}, noise + (i - start), 0};
        if (!Columns) {
          const int64_t group = Rows ? row : 0;
          run.groups = Groups::of(Group::of(task.step[group], task.offset[group]));
        }
        if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
        encode_run<Rounding, Columns>(task, run, x + (i - start), task.codes + i, n);
        i += n;
      }
    }
  });
}

// The entries start … end − 1 of one group.
template <int Rounding>
void encode_group(const Task& task, const Philox& philox, Group group, int64_t row, int64_t start, int64_t end) {
  uint32_t noise[kChunk + 2 * W];
  float buffer[kChunk + W];
  Run run{start - row * task.columns, Groups::of(group), nullptr, 0};
  if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
  for (int64_t i = start; i < end; i += kChunk) {
    const int64_t n = end - i < kChunk ? end - i : kChunk, skipped = i % 4;  // noise comes in blocks of four
    if (is_stochastic(Rounding)) philox.fill_u24(i - skipped, n + skipped, noise);
    run.noise = noise + skipped;
    encode_run<Rounding, false>(task, run, values(task.source, i, n, buffer), task.codes + i, n);
    run.column += n;
  }
}

// Σ of values by column of a matrix with `period` columns, of which the rows that are seen are whole rows: runs of 32
// in float32, runs in float64.
class ColumnSums {
 public:
  ColumnSums(float* run, double* total, int64_t period) : run_(run), total_(total), period_(period) {
    for (int64_t j = 0; j < period; ++j) run[j] = 0, total[j] = 0;
  }

  // The next n entries, in the order of the matrix.
  void add(const float* x, int64_t n) {
    for (int64_t i = 0; i < n;) {
      const int64_t length = period_ - at_ < n - i ? period_ - at_ : n - i;
      float* to = run_ + at_;
      for (int64_t j = 0; j < length; ++j) to[j] += x[i + j];
      i += length;
      at_ += length;
      if (at_ == period_) {
        at_ = 0;
        if (++rows_ == 32) flush();
      }
    }
  }

  void flush() {
    for (int64_t j = 0; j < period_; ++j) total_[j] += run_[j], run_[j] = 0;
    rows_ = 0;
  }

 private:
  float* run_;
  double* total_;
  int64_t period_, at_ = 0, rows_ = 0;
};

}  // namespace

namespace fqt {

// What one quantizer's pass over a matrix finds out for others; the matrix has no factors then.
struct Findings {
  float lo, hi;       // of all entries: a result, or known and used
  int32_t known;
  int32_t has_sums;   // a result: whether `sums` was written
  double* sums;       // (period,) Σ of the values by column of the matrix (entries ÷ period, period); null: not wanted
  int64_t period;
};

}  // namespace fqt

namespace {

// The range of all entries from those of the rows; NaN if there is one.
void find_range(const float* lo, const float* hi, int64_t rows, Findings* findings) {
  findings->lo = lo[0], findings->hi = hi[0];
  for (int64_t r = 1; r < rows; ++r) {
    if (findings->lo == findings->lo && !(lo[r] >= findings->lo)) findings->lo = lo[r];
    if (findings->hi == findings->hi && !(hi[r] <= findings->hi)) findings->hi = hi[r];
  }
  findings->known = 1;
}

// Rows as groups: range, step and codes of a row while it is in the cache. step and offset are written. In items of
// rows whose number does not depend on the threads, so that sums do not either.
template <int Rounding>
bool quantize_rows(const Task& task, int64_t rows, int mode, int steps, uint64_t seed, float* step, float* offset,
                   Findings* findings, int threads) {
  const Philox philox(seed, kRounding);
  const int64_t columns = task.columns, per_item = 1 + 8 * kChunk / columns, items = ceil_div(rows, per_item);
  const int64_t period = findings && findings->sums ? findings->period : 0;
  std::unique_ptr<float[]> lo, hi, runs;
  std::unique_ptr<double[]> totals;
  if (findings) {
    lo.reset(new (std::nothrow) float[rows]), hi.reset(new (std::nothrow) float[rows]);
    runs.reset(new (std::nothrow) float[items * period]), totals.reset(new (std::nothrow) double[items * period]);
    if (!lo || !hi || !runs || !totals) return false;
  }
  parallel_for(items, rows * columns, threads, [&](int64_t item) {
    float buffer[kChunk + W];
    ColumnSums sums(runs.get() + item * period, totals.get() + item * period, period);
    for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) {
      const int64_t start = r * columns;
      float least, greatest;
      range_of_entries(task.source, start, columns, &least, &greatest);
      group_parameters(least, greatest, mode, steps, step + r, offset + r);
      encode_group<Rounding>(task, philox, Group::of(step[r], offset[r]), r, start, start + columns);
      if (findings) lo[r] = least, hi[r] = greatest;
      for (int64_t i = 0; period && i < columns; i += kChunk) {
        const int64_t n = columns - i < kChunk ? columns - i : kChunk;
        sums.add(values(task.source, start + i, n, buffer), n);
      }
    }
    if (period) sums.flush();
  });
  if (!findings) return true;
  find_range(lo.get(), hi.get(), rows, findings);
  findings->has_sums = period != 0;
  for (int64_t j = 0; j < period; ++j) {
    findings->sums[j] = 0;
    for (int64_t item = 0; item < items; ++item) findings->sums[j] += totals[item * period + j];
  }
  return true;
}

// The dither of a matrix, set in the task; null when there is no memory.
std::unique_ptr<uint32_t[]> draw_dither(uint64_t seed, int64_t rows, int64_t columns, bool transposed, Task* task) {
  std::unique_ptr<uint32_t[]> noise(new (std::nothrow) uint32_t[rows + columns + 2 * kNoiseWords]);
  if (!noise) return noise;
  uint32_t* column_noise = noise.get() + rows + kNoiseWords;
  Philox(seed, transposed ? kDitherColumn : kDitherRow).fill_u24(0, rows, noise.get());
  Philox(seed, transposed ? kDitherRow : kDitherColumn).fill_u24(0, columns, column_noise);
  task->row_noise = noise.get();
  task->column_noise = column_noise;
  return noise;
}

template <int Rounding>
void encode_groups(const Task& task, int64_t rows, bool by_row, bool by_column, uint64_t seed, int threads) {
  if (by_column) {
    encode_all<Rounding, false, true>(task, rows, seed, threads);
  } else if (by_row) {
    encode_all<Rounding, true, false>(task, rows, seed, threads);
  } else {
    encode_all<Rounding, false, false>(task, rows, seed, threads);
  }
}

}  // namespace

// codes (rows, columns) bytes of the source: unsigned where low is 0, else signed.
// step and offset hold one number, one per row, or one per column. Contract, checked by the caller:
// −128 ≤ low ≤ high and high ≤ 127, or low = 0 and high ≤ 255 (254 dithered); by_row and by_column not both.
// transposed: the dither's row stream runs along the columns and its column stream along the rows.
FQT_API int fqt_encode(const Source* source, int64_t rows, int64_t columns, const float* step, const float* offset,
                       int by_row, int by_column, int low, int high, int rounding, const int64_t* seed,
                       int transposed, uint8_t* codes, int threads) {
  if (rows == 0 || columns == 0) return kDone;
  Task task{*source, step, offset, columns, static_cast<float>(low), static_cast<float>(high), codes, nullptr, nullptr};
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  if (rounding != kDithered && !by_row && !by_column) {  // one group: rows do not matter
    task.columns = columns = rows * columns;
    rows = 1;
  }
  const bool fixed = kFixedPoint && low == 0;
  if (rounding == kNearest) {
    encode_groups<kNearest>(task, rows, by_row, by_column, key, threads);
  } else if (rounding == kStochastic && fixed) {
    encode_groups<kStochasticFixed>(task, rows, by_row, by_column, key, threads);
  } else if (rounding == kStochastic) {
    encode_groups<kStochastic>(task, rows, by_row, by_column, key, threads);
  } else {
    const std::unique_ptr<uint32_t[]> noise = draw_dither(key, rows, columns, transposed != 0, &task);
    if (!noise) return kNoMemory;
    if (fixed) {
      encode_groups<kDitheredFixed>(task, rows, by_row, by_column, key, threads);
    } else {
      encode_groups<kDithered>(task, rows, by_row, by_column, key, threads);
    }
  }
  return kDone;
}

namespace {

// p(1 − p), p the fraction of t.
inline vf unit_variance(vf t) {
  const vf p = t - to_float(floor_int(t));
  return p * (1.0f - p);
}

// The same in units of 2⁻²⁴, to the nearest integer: at most 2²², so that 511 of them fit 31 bits.
inline vi counted_variance(vf t) { return round_nearest(unit_variance(t) * 0x1p24f); }

constexpr int64_t kVariancePiece = 256 * W;  // 256 additions per lane

// Their sum over the n ≤ kVariancePiece entries from `start` on, all of one group.
int64_t sum_of_variances(const Source& source, int64_t start, int64_t n, const Groups& g, vf low, vf high) {
  float buffer[kVariancePiece + W];
  const float* x = values(source, start, n, buffer);
  vi sum{};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum += counted_variance(position(load<vf>(x + i), g, low, high));
  int64_t total = 0;
  for (int j = 0; j < W; ++j) total += sum[j];
  if (i < n) {
    const vi last = counted_variance(position(load_part<vf>(x + i, n - i), g, low, high));
    for (int64_t j = 0; j < n - i; ++j) total += last[j];
  }
  return total;
}

}  // namespace

// out (rows, columns): p(1 − p) of each entry, p the fraction of its position.
FQT_API int fqt_code_variance(const float* x, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, float* out,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  parallel_for(rows, rows * columns, threads, [&](int64_t row) {
    const int64_t group = by_row ? row : 0;
    Groups g = by_column ? Groups{} : Groups::of(Group::of(step[group], offset[group]));
    const float* from = x + row * columns;
    float* to = out + row * columns;
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      if (by_column) g = Groups::of(load<vf>(step + j), load<vf>(offset + j));
      store(to + j, unit_variance(position(load<vf>(from + j), g, least_code, last_code)));
    }
    if (j < columns) {
      const int64_t n = columns - j;
      if (by_column) g = Groups::of(load_part<vf>(step + j, n), load_part<vf>(offset + j, n));
      store_part(to + j, unit_variance(position(load_part<vf>(from + j, n), g, least_code, last_code)), n);
    }
  });
  return kDone;
}

// sums: Σ p(1 − p) of every group, each entry rounded to units of 2⁻²⁴, so that the order of the sum does not matter.
// One number, one per row or one per column, like step and offset; fewer than 2⁴¹ entries.
FQT_API int fqt_variance_sums(const Source* source, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, int64_t* sums,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  constexpr int64_t kPiece = kVariancePiece;
  const int64_t groups = by_row ? rows : by_column ? columns : 1;
  for (int64_t g = 0; g < groups; ++g) sums[g] = 0;
  if (rows == 0 || columns == 0) return kDone;
  if (by_column) {
    constexpr int64_t kStrip = 1024;
    const int64_t strips = ceil_div(columns, kStrip), bands = 1 + rows * columns / (1 << 17) / strips;
    parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
      const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
      const int64_t band = item / strips, begin = rows * band / bands, end = rows * (band + 1) / bands;
      float buffer[kStrip + W];
      int64_t total[kStrip] = {};
      for (int64_t start = begin; start < end; start += 256) {
        vi sum[kStrip / W] = {};
        for (int64_t r = start; r < end && r < start + 256; ++r) {
          const float* x = values(*source, r * columns + first, width, buffer);
          for (int64_t j = 0; j < width; j += W) {
            const int64_t n = width - j;
            const Groups g = n >= W ? Groups::of(load<vf>(step + first + j), load<vf>(offset + first + j))
                                    : Groups::of(load_part<vf>(step + first + j, n), load_part<vf>(offset + first + j, n));
            sum[j / W] += counted_variance(position(n >= W ? load<vf>(x + j) : load_part<vf>(x + j, n), g, least_code, last_code));
          }
        }
        for (int64_t j = 0; j < width; ++j) total[j] += sum[j / W][j % W];
      }
      for (int64_t j = 0; j < width; ++j) __atomic_fetch_add(sums + first + j, total[j], __ATOMIC_RELAXED);
    });
    return kDone;
  }
  // Rows, or pieces of all entries; integer sums may be added up in any order.
  const int64_t length = by_row ? columns : rows * columns, pieces = ceil_div(length, kPiece);
  const int64_t items = groups * pieces, per_item = 1 + kPiece / (length < kPiece ? length : kPiece);
  parallel_for(ceil_div(items, per_item), rows * columns, threads, [&](int64_t chunk) {
    for (int64_t item = chunk * per_item; item < items && item < (chunk + 1) * per_item; ++item) {
      const int64_t group = item / pieces, first = item % pieces * kPiece;
      const int64_t n = length - first < kPiece ? length - first : kPiece;
      const Groups g = Groups::of(Group::of(step[group], offset[group]));
      const int64_t total = sum_of_variances(*source, group * length + first, n, g, least_code, last_code);
      __atomic_fetch_add(sums + group, total, __ATOMIC_RELAXED);
    }
  });
  return kDone;
}

namespace {

// Rows as groups: range, step and the variance of stochastic codes of a row while it is in the cache.
void measure_rows(const Source& source, int64_t rows, int64_t columns, int mode, int steps, float* lo, float* hi, float* step,
                  float* offset, int64_t* sums, int threads) {
  const vf least_code = splat(0.0f), last_code = splat(static_cast<float>(steps));
  const int64_t per_item = 1 + 8 * kChunk / columns;
  parallel_for(ceil_div(rows, per_item), rows * columns, threads, [&](int64_t item) {
    for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) {
      range_of_entries(source, r * columns, columns, lo + r, hi + r);
      group_parameters(lo[r], hi[r], mode, steps, step + r, offset + r);
      const Groups g = Groups::of(Group::of(step[r], offset[r]));
      sums[r] = 0;
      for (int64_t j = 0; j < columns; j += kVariancePiece) {
        const int64_t n = columns - j < kVariancePiece ? columns - j : kVariancePiece;
        sums[r] += sum_of_variances(source, r * columns + j, n, g, least_code, last_code);
      }
    }
  });
}

// Whether dithered rounding on an affine grid has the lower exact variance; its steps and offsets are written. In the
// order of Quantizer's own sum.
bool dithered_is_better(const float* lo, const float* hi, const float* step, const int64_t* sums, int64_t groups,
                        int64_t entries, int steps, float* other_step, float* other_offset) {
  double gain = 0;
  for (int64_t g = 0; g < groups; ++g) {
    group_parameters(lo[g], hi[g], kAffine, steps - 1, other_step + g, other_offset + g);
    const double square = static_cast<double>(step[g]) * step[g];
    const double other = static_cast<double>(other_step[g]) * other_step[g];
    gain += static_cast<double>(sums[g]) / kLevels * square - other * (entries * (1.0 / 12));
  }
  return gain > 0;
}

}  // namespace

// Range, parameters and codes in one: group 0 the tensor, 1 rows, 2 columns; as fqt_range_*, fqt_parameters with
// `steps`, fqt_encode. step and offset are results here. At least one entry. Rounding kBest (low = 0, high = steps):
// stochastic, or dithered on the affine grid of a step less where its exact variance, summed over the matrix, is lower.
// findings, unless it is null: the range of all entries, taken from it where it is known and needed, else found with
// rows as groups; so are the sums. The dither that was added, in fractions of a step, goes to row_noise (rows,) and column_noise (columns,); *dithered
// says whether there was any.
FQT_API int fqt_quantize(const Source* source, int64_t rows, int64_t columns, int group, int mode, int steps,
                         int low, int high, int rounding, const int64_t* seed, int transposed, float* step,
                         float* offset, uint8_t* codes, float* row_noise, float* column_noise, int32_t* dithered,
                         Findings* findings, int threads) {
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  const int64_t groups = group == 0 ? 1 : group == 1 ? rows : columns;
  std::unique_ptr<float[]> range;
  bool known = false;  // step and offset
  if (group != 1 || rounding == kBest) {
    range.reset(new (std::nothrow) float[4 * groups]);
    if (!range) return kNoMemory;
  }
  float *lo = range.get(), *hi = lo + groups;
  if (group != 1) {
    int status = kDone;
    if (group == 2) {
      status = fqt_range_columns(source, rows, columns, lo, hi, threads);
    } else if (findings && findings->known) {
      *lo = findings->lo, *hi = findings->hi;
    } else {
      status = fqt_range_tensor(source, rows * columns, lo, hi, threads);
    }
    if (status != kDone) return status;
    for (int64_t g = 0; g < groups; ++g) group_parameters(lo[g], hi[g], mode, steps, step + g, offset + g);
    known = true;
  }
  if (rounding == kBest) {
    const std::unique_ptr<int64_t[]> sums(new (std::nothrow) int64_t[groups]);
    if (!sums) return kNoMemory;
    if (group == 1) {
      measure_rows(*source, rows, columns, mode, steps, lo, hi, step, offset, sums.get(), threads);
      if (findings) find_range(lo, hi, rows, findings);
      known = true;
    } else {
      fqt_variance_sums(source, rows, columns, step, offset, 0, group == 2, low, high, sums.get(), threads);
    }
    float *other_step = hi + groups, *other_offset = other_step + groups;
    const int64_t entries = rows * columns / groups;
    rounding = kStochastic;
    if (dithered_is_better(lo, hi, step, sums.get(), groups, entries, steps, other_step, other_offset)) {
      rounding = kDithered;
      --high;
      std::memcpy(step, other_step, groups * sizeof(float));
      std::memcpy(offset, other_offset, groups * sizeof(float));
    }
  }
  Task task{*source, step, offset, columns, static_cast<float>(low), static_cast<float>(high), codes, nullptr, nullptr};
  std::unique_ptr<uint32_t[]> noise;
  *dithered = rounding == kDithered;
  if (rounding == kDithered) {
    noise = draw_dither(key, rows, columns, transposed != 0, &task);
    if (!noise) return kNoMemory;
    for (int64_t i = 0; i < rows; ++i) row_noise[i] = static_cast<float>(task.row_noise[i]) * 0x1p-24f;
    for (int64_t j = 0; j < columns; ++j) column_noise[j] = static_cast<float>(task.column_noise[j]) * 0x1p-24f;
  }
  if (group == 0 && rounding != kDithered) {  // one group: rows do not matter
    task.columns = rows * columns;
    rows = 1;
  }
  const bool fixed = kFixedPoint && low == 0;
  bool done = true;
  const auto run = [&](auto kind) {
    constexpr int kRounding = decltype(kind)::value;
    if (known) {
      encode_groups<kRounding>(task, rows, group == 1, group == 2, key, threads);
    } else {
      done = quantize_rows<kRounding>(task, rows, mode, steps, key, step, offset, findings, threads);
    }
  };
  if (rounding == kNearest) {
    run(std::integral_constant<int, kNearest>{});
  } else if (rounding == kStochastic) {
    fixed ? run(std::integral_constant<int, kStochasticFixed>{}) : run(std::integral_constant<int, kStochastic>{});
  } else {
    fixed ? run(std::integral_constant<int, kDitheredFixed>{}) : run(std::integral_constant<int, kDithered>{});
  }
  return done ? kDone : kNoMemory;
}
