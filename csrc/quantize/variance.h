// The variance of stochastic rounding p(1 − p), p the fraction of a position, in units of 2⁻²⁴ squared steps.
#pragma once

#include <cstdint>

#include "common/platform.h"
#include "common/source.h"
#include "quantize/grid.h"

namespace fqt {

constexpr int64_t kVariancePiece = 256 * W;  // 256 additions per lane

// Their sums over the n ≤ kVariancePiece entries from `start` on, all of one group, on each of G grids; each variance
// rounded to an integer.
template <int G>
void sums_of_variances(const Source& source, int64_t start, int64_t n, const Groups (&g)[G], vf low, vf high,
                       int64_t (&total)[G]);

// Where codes lie, one step and offset per group, and where the groups' sums go.
struct Grid {
  const float *step, *offset;
  int64_t* sums;
};

// The sums of all groups on each of G grids, in one pass; as fqt_variance_sums.
template <int G>
void sum_variances(const Source& source, int64_t rows, int64_t columns, const Grid (&grids)[G], bool by_row,
                   bool by_column, int low, int high, int threads);

}  // namespace fqt
