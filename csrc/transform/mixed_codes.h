// Codes of a matrix whose rows are mixed block by block: mixing, ranges, the guard's choice and rounding in one go.
//
// Mixed rows never go to memory. Blocks that fit the second-level cache whole are mixed once; longer rows are mixed
// strip by strip, once for their ranges and again for their codes, which costs less than writing and reading floats.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "quantize/encode.h"
#include "quantize/range.h"
#include "transform/plain_rows.h"
#include "transform/row_groups.h"

namespace fqt {

constexpr int64_t kPieceColumns = 1024;  // what is handed on at a time

// How rows are rounded; the results' arrays hold one entry per row.
struct MixedRounding {
  bool guard;        // whether plain rows stay where the step bound says so
  int levels, high;  // steps of a range for the guard, and for the codes
  Task task;         // its step and offset are the results below
  EncodePiece encode;
  RoundingNoise noise;
  float *step, *offset;
  bool* keep;  // whether the row's block is mixed
};

// A mixer knows the blocks' rows (`members`, `size`), mixes a strip of columns into a scratch of `scratch_floats`
// (`prepare`), and hands out pieces of it: `piece(b, i, first, j, n, width, …)`, entries j … j + n − 1 of the
// strip from column `first` in the block's i-th row, n ≤ kPieceColumns. Blocks of one row stay plain and are never prepared.
template <class Mixer>
class MixedCodes {
 public:
  // groups: the mixer's blocks with their rows ascending, for sums of a fixed order. cost: of each mixed row's step.
  MixedCodes(const Mixer& mixer, const RowGroups& groups, const PlainRows& plain, const double* cost,
             const MixedRounding& how)
      : mixer_(mixer), groups_(groups), plain_(plain), cost_(cost), how_(how),
        lo_(plain.lo.size()), hi_(plain.lo.size()) {}

  int run(int64_t blocks, int threads) {
    std::vector<int64_t> whole, long_rows;
    for (int64_t b = 0; b < blocks; ++b) {
      if (groups_.size(b)) (mixer_.whole(b) ? whole : long_rows).push_back(b);
    }
    const int64_t rows = lo_.size(), columns = how_.task.columns;
    if (static_cast<int64_t>(whole.size()) < 4 * threads && rows * columns > 2 * kGrain) {  // too few to share out
      long_rows.insert(long_rows.end(), whole.begin(), whole.end());
      whole.clear();
    }
    parallel_for(whole.size(), rows * columns, threads, [&](int64_t i) {
      const int64_t b = whole[i], size = groups_.size(b);
      float* scratch = scratch_of(b, columns);
      if (!scratch) return;
      if (size > 1) {
        mixer_.prepare(b, 0, columns, scratch);
        for (int64_t m = 0; m < size; ++m) range(b, m, 0, columns, scratch, &lo_[row(b, m)], &hi_[row(b, m)]);
      }
      decide(b);
      for (int64_t m = 0; m < size; ++m) encode(b, m, 0, columns, scratch);
    });
    for (int64_t b : long_rows) by_strips(b, threads);
    return failed_.load() ? kNoMemory : kDone;
  }

 private:
  int64_t row(int64_t b, int64_t member) const { return mixer_.members(b)[member]; }

  float* scratch_of(int64_t b, int64_t width) {
    float* scratch = thread_scratch(mixer_.scratch_floats(b, width));
    if (!scratch) failed_ = true;
    return scratch;
  }

  void by_strips(int64_t b, int threads) {
    const int64_t size = groups_.size(b), columns = how_.task.columns;
    const int64_t share = ceil_div(ceil_div(columns, 2 * threads), kLeastStrip) * kLeastStrip;
    const int64_t strip = mixer_.strip(b) < share ? mixer_.strip(b) : share, strips = ceil_div(columns, strip);
    const auto for_strips = [&](const auto& f) {  // f(strip's number, first column, width, scratch)
      parallel_for(strips, size * columns, threads, [&](int64_t s) {
        const int64_t first = s * strip, width = columns - first < strip ? columns - first : strip;
        if (float* scratch = scratch_of(b, width)) f(s, first, width, scratch);
      });
    };
    if (size > 1) {
      std::vector<float> lo(size * strips), hi(size * strips);
      for_strips([&](int64_t s, int64_t first, int64_t width, float* scratch) {
        mixer_.prepare(b, first, width, scratch);
        for (int64_t m = 0; m < size; ++m) range(b, m, first, width, scratch, &lo[m * strips + s], &hi[m * strips + s]);
      });
      for (int64_t m = 0; m < size; ++m) range_of_ranges(&lo[m * strips], &hi[m * strips], strips, row(b, m));
    }
    decide(b);
    for_strips([&](int64_t, int64_t first, int64_t width, float* scratch) {
      if (how_.keep[row(b, 0)]) mixer_.prepare(b, first, width, scratch);
      for (int64_t m = 0; m < size; ++m) encode(b, m, first, width, scratch);
    });
  }

  // Least and greatest of a mixed row's strip. Finite rows mix to finite ones: scales shrink what is large.
  void range(int64_t b, int64_t member, int64_t first, int64_t width, const float* scratch, float* lo, float* hi) const {
    float buffer[kPieceColumns + W];
    for (int64_t j = 0; j < width; j += kPieceColumns) {
      const int64_t n = width - j < kPieceColumns ? width - j : kPieceColumns;
      const Source piece{mixer_.piece(b, member, first, j, n, width, scratch, buffer), nullptr, 1, kFloat32In};
      float least, greatest;
      range_of_entries(piece, 0, n, &least, &greatest);
      *lo = j && *lo < least ? *lo : least;
      *hi = j && *hi > greatest ? *hi : greatest;
    }
  }

  void range_of_ranges(const float* lo, const float* hi, int64_t n, int64_t r) {
    lo_[r] = lo[0], hi_[r] = hi[0];
    for (int64_t i = 1; i < n; ++i) {
      lo_[r] = lo[i] < lo_[r] ? lo[i] : lo_[r];
      hi_[r] = hi[i] > hi_[r] ? hi[i] : hi_[r];
    }
  }

  // Whether block b stays mixed, and its rows' steps.
  void decide(int64_t b) {
    const int64_t *rows = groups_.of(b), size = groups_.size(b);
    bool keep = size > 1;
    if (keep && how_.guard) {
      double gain = 0.0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t r = rows[i];
        gain += bound(plain_.lo[r], plain_.hi[r]) - bound(lo_[r], hi_[r]) * cost_[r];
      }
      keep = gain > 0;
    }
    for (int64_t i = 0; i < size; ++i) {
      const int64_t r = rows[i];
      const float lo = keep ? lo_[r] : plain_.lo[r], hi = keep ? hi_[r] : plain_.hi[r];
      group_parameters(lo, hi, 0, how_.high, how_.step + r, how_.offset + r);
      how_.keep[r] = keep;
    }
  }

  // The step bound of a row's variance, for stochastic rounding.
  double bound(float lo, float hi) const {
    float step, offset;
    group_parameters(lo, hi, 0, how_.levels, &step, &offset);
    const double wide = step;
    return wide * wide * static_cast<double>(how_.task.columns) * 0.25;
  }

  void encode(int64_t b, int64_t member, int64_t first, int64_t width, const float* scratch) const {
    const int64_t r = row(b, member);
    const Group group = Group::of(how_.step[r], how_.offset[r]);
    NoiseChunk chunk(how_.noise);
    float buffer[kPieceColumns + W];
    for (int64_t j = 0; j < width; j += kPieceColumns) {
      const int64_t n = width - j < kPieceColumns ? width - j : kPieceColumns;
      const float* x = how_.keep[r] ? mixer_.piece(b, member, first, j, n, width, scratch, buffer)
                                    : values(how_.task.source, r * how_.task.columns + first + j, n, buffer);
      how_.encode(how_.task, &chunk, group, r, first + j, x, n);
    }
  }

  const Mixer& mixer_;
  const RowGroups& groups_;
  const PlainRows& plain_;
  const double* cost_;
  const MixedRounding& how_;
  std::vector<float> lo_, hi_;  // of mixed rows
  std::atomic<bool> failed_{false};
};

}  // namespace fqt
