// Range, parameters and codes of a matrix in one call.
#include <cstring>
#include <memory>
#include <new>

#include "common/parallel.h"
#include "common/platform.h"
#include "quantize/encode.h"
#include "quantize/range.h"
#include "quantize/variance.h"

using namespace fqt;

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

// Σ of values by column of a matrix with `period` columns, of which the rows that are seen are whole rows: runs of 32
// in float32, runs in float64.
class ColumnSums {
 public:
  ColumnSums(float* run, double* total, int64_t period) : run_(run), total_(total), period_(period) {
    for (int64_t j = 0; j < period; ++j) run[j] = 0, total[j] = 0;
  }

  // The next n entries, in the order of the matrix.
  void add(const float* x, int64_t n) {
    if (at_ == 0 && n % period_ == 0) {  // few columns stay in registers; through memory every row waits for the last
      switch (period_) {
        case 1 * W: return add_rows<1>(x, n / period_);
        case 2 * W: return add_rows<2>(x, n / period_);
        case 4 * W: return add_rows<4>(x, n / period_);
        case 8 * W: return add_rows<8>(x, n / period_);
      }
    }
    for (int64_t i = 0; i < n;) {
      const int64_t length = period_ - at_ < n - i ? period_ - at_ : n - i;
      float* to = run_ + at_;
      int64_t j = 0;
      for (; j + W <= length; j += W) store(to + j, load<vf>(to + j) + load<vf>(x + i + j));
      for (; j < length; ++j) to[j] += x[i + j];
      i += length;
      at_ += length;
      if (at_ == period_) {
        at_ = 0;
        if (++rows_ == 32) flush();
      }
    }
  }

  template <int Vectors>
  void add_rows(const float* x, int64_t n) {
    while (n) {
      const int64_t now = 32 - rows_ < n ? 32 - rows_ : n;
      vf sum[Vectors];
      for (int v = 0; v < Vectors; ++v) sum[v] = load<vf>(run_ + v * W);
      for (int64_t r = 0; r < now; ++r, x += Vectors * W) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[v] += load<vf>(x + v * W);
      }
      for (int v = 0; v < Vectors; ++v) store(run_ + v * W, sum[v]);
      n -= now;
      if ((rows_ += now) == 32) flush();
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
bool quantize_rows(const Task& task, int64_t rows, int mode, int steps, EncodePiece encode, uint64_t seed, float* step,
                   float* offset, Findings* findings, int threads) {
  const RoundingNoise noise(seed);
  const int64_t columns = task.columns, period = findings && findings->sums && columns % findings->period == 0 ? findings->period : 0;
  // With sums at most 64 items: each has sums of its own.
  const int64_t few = 1 + 8 * kChunk / columns, many = ceil_div(rows, 64), per_item = period && many > few ? many : few;
  const int64_t items = ceil_div(rows, per_item);
  std::unique_ptr<float[]> lo, hi, runs;
  std::unique_ptr<double[]> totals;
  if (findings) {
    lo.reset(new (std::nothrow) float[rows]), hi.reset(new (std::nothrow) float[rows]);
    runs.reset(new (std::nothrow) float[items * period]), totals.reset(new (std::nothrow) double[items * period]);
    if (!lo || !hi || !runs || !totals) return false;
  }
  parallel_for(items, rows * columns, threads, [&](int64_t item) {
    NoiseChunk chunk(noise);
    float buffer[kChunk + W];
    ColumnSums sums(runs.get() + item * period, totals.get() + item * period, period);
    for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) {
      const int64_t start = r * columns;
      float least, greatest;
      range_of_entries(task.source, start, columns, &least, &greatest);
      group_parameters(least, greatest, mode, steps, step + r, offset + r);
      if (findings) lo[r] = least, hi[r] = greatest;
      const Group group = Group::of(step[r], offset[r]);
      for (int64_t i = 0; i < columns; i += kChunk) {
        const int64_t n = columns - i < kChunk ? columns - i : kChunk;
        if (columns <= kChunk) prefetch(task.source, start + columns, n);  // the next row, while this one computes
        const float* x = values(task.source, start + i, n, buffer);
        encode(task, &chunk, group, r, i, x, n);
        if (period) sums.add(x, n);
      }
    }
    if (period) sums.flush();
  });
  if (!findings) return true;
  find_range(lo.get(), hi.get(), rows, findings);
  findings->has_sums = period != 0;
  for (int64_t j = 0; j < period; ++j) findings->sums[j] = 0;
  for (int64_t item = 0; item < items; ++item) {
    for (int64_t j = 0; j < period; ++j) findings->sums[j] += totals[item * period + j];
  }
  return true;
}

// One of the ways that kBest chooses from: each group's step and offset, its stochastic codes' sums of variances.
struct Candidate {
  float *step, *offset;
  int64_t* sums;  // null: dithered, whose variance is known
  int mode, steps;
};

// Rows as groups: ranges, steps, and the variances of stochastic codes on G grids of a row while it is in the cache.
template <int G>
void measure_rows(const Source& source, int64_t rows, int64_t columns, const Candidate* candidates, float* lo, float* hi,
                  int threads) {
  const vf least_code = splat(0.0f), last_code = splat(static_cast<float>(candidates->steps));
  const int64_t per_item = 1 + 8 * kChunk / columns;
  parallel_for(ceil_div(rows, per_item), rows * columns, threads, [&](int64_t item) {
    for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) {
      range_of_entries(source, r * columns, columns, lo + r, hi + r);
      Groups g[G];
      int64_t sums[G] = {};
      for (int k = 0; k < G; ++k) {
        const Candidate& c = candidates[k];
        group_parameters(lo[r], hi[r], c.mode, c.steps, c.step + r, c.offset + r);
        g[k] = Groups::of(Group::of(c.step[r], c.offset[r]));
      }
      for (int64_t j = 0; j < columns; j += kVariancePiece) {
        const int64_t n = columns - j < kVariancePiece ? columns - j : kVariancePiece;
        if (columns <= kChunk) prefetch(source, (r + 1) * columns + j, n);
        int64_t piece[G];
        sums_of_variances(source, r * columns + j, n, g, least_code, last_code, piece);
        for (int k = 0; k < G; ++k) sums[k] += piece[k];
      }
      for (int k = 0; k < G; ++k) candidates[k].sums[r] = sums[k];
    }
  });
}

// The exact variance of a candidate, its groups added in ascending order, as fqt.kernels.choice adds them.
double variance_of(const Candidate& c, int64_t groups, int64_t entries) {
  double total = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const double square = static_cast<double>(c.step[g]) * c.step[g];
    total += c.sums ? static_cast<double>(c.sums[g]) / kLevels * square : square * (entries * (1.0 / 12));
  }
  return total;
}

// For kBest: ranges, and of all candidates (the stochastic ones first, the dithered one last) the parameters and sums.
template <int G>
int measure(const Source& source, int64_t rows, int64_t columns, int group, Candidate* candidates, float* lo, float* hi,
            Findings* findings, int threads) {
  const int64_t groups = group == 0 ? 1 : group == 1 ? rows : columns;
  if (group == 1) {
    measure_rows<G>(source, rows, columns, candidates, lo, hi, threads);
    if (findings) find_range(lo, hi, rows, findings);
  } else {
    Grid grids[G];
    for (int k = 0; k < G; ++k) {
      const Candidate& c = candidates[k];
      for (int64_t g = 0; g < groups; ++g) group_parameters(lo[g], hi[g], c.mode, c.steps, c.step + g, c.offset + g);
      grids[k] = {c.step, c.offset, c.sums};
    }
    sum_variances(source, rows, columns, grids, false, group == 2, 0, candidates->steps, threads);
  }
  const Candidate& last = candidates[G];
  for (int64_t g = 0; g < groups; ++g) group_parameters(lo[g], hi[g], last.mode, last.steps, last.step + g, last.offset + g);
  int best = 0;
  const int64_t entries = rows * columns / groups;
  double least = variance_of(candidates[0], groups, entries);
  for (int k = 1; k <= G; ++k) {
    const double variance = variance_of(candidates[k], groups, entries);
    if (variance < least) least = variance, best = k;
  }
  return best;
}

}  // namespace

// Range, parameters and codes in one: group 0 the tensor, 1 rows, 2 columns; as fqt_range_*, fqt_parameters with
// `steps`, fqt_encode. step and offset are results here. At least one entry. Rounding kBest (low = 0, high = steps):
// whichever has the least exact variance, summed over the matrix, and the first of equals: stochastic on the grid of
// `mode`, stochastic on the affine one, dithered on the affine one of a step less.
// findings, unless it is null: the range of all entries, taken from it where it is known and needed, else found with
// rows as groups; so are the sums. The dither that was added, in fractions of a step, goes to row_noise (rows,) and
// column_noise (columns,); *dithered says whether there was any.
FQT_API int fqt_quantize(const Source* source, int64_t rows, int64_t columns, int group, int mode, int steps,
                         int low, int high, int rounding, const int64_t* seed, int transposed, float* step,
                         float* offset, uint8_t* codes, float* row_noise, float* column_noise, int32_t* dithered,
                         Findings* findings, int threads) {
  const int64_t groups = group == 0 ? 1 : group == 1 ? rows : columns;
  const bool in_advance = group != 1 || rounding == kBest;  // step and offset are known before a row is encoded
  std::unique_ptr<float[]> range;
  if (in_advance) {
    range.reset(new (std::nothrow) float[6 * groups]);
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
  }
  if (rounding == kBest) {
    const int stochastic = mode == kZero ? 2 : 1;
    const std::unique_ptr<int64_t[]> sums(new (std::nothrow) int64_t[stochastic * groups]);
    if (!sums) return kNoMemory;
    Candidate candidates[3];
    float* parameters = hi + groups;
    candidates[0] = {step, offset, sums.get(), mode, steps};
    for (int k = 1; k <= stochastic; ++k, parameters += 2 * groups) {
      const bool last = k == stochastic;
      candidates[k] = {parameters, parameters + groups, last ? nullptr : sums.get() + groups, kAffine, steps - last};
    }
    const int best = stochastic == 2 ? measure<2>(*source, rows, columns, group, candidates, lo, hi, findings, threads)
                                     : measure<1>(*source, rows, columns, group, candidates, lo, hi, findings, threads);
    rounding = best == stochastic ? kDithered : kStochastic;
    if (rounding == kDithered) --high;
    if (best) {
      std::memcpy(step, candidates[best].step, groups * sizeof(float));
      std::memcpy(offset, candidates[best].offset, groups * sizeof(float));
    }
  } else if (group != 1) {
    for (int64_t g = 0; g < groups; ++g) group_parameters(lo[g], hi[g], mode, steps, step + g, offset + g);
  }
  *dithered = rounding == kDithered;
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  Task task{*source, step, offset, columns, static_cast<float>(low), static_cast<float>(high), codes, nullptr, nullptr};
  const std::unique_ptr<uint32_t[]> noise = rounding == kDithered ? draw_dither(key, rows, columns, transposed != 0, &task)
                                                                  : nullptr;
  if (rounding == kDithered) {
    if (!noise) return kNoMemory;
    as_fractions(task.row_noise, rows, row_noise);
    as_fractions(task.column_noise, columns, column_noise);
  }
  if (in_advance) {
    encode_matrix(task, rows, group == 1, group == 2, rounding, key, threads);
    return kDone;
  }
  const EncodePiece encode = piece_encoder(rounding, low);
  return quantize_rows(task, rows, mode, steps, encode, key, step, offset, findings, threads) ? kDone : kNoMemory;
}
