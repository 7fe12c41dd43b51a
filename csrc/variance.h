// The variance of stochastic rounding p(1 − p), p the fraction of a position, in units of 2⁻²⁴ squared steps.
#pragma once

#include <cstdint>

#include "grid.h"
#include "platform.h"
#include "source.h"

namespace fqt {

constexpr int64_t kVariancePiece = 256 * W;  // 256 additions per lane

// Their sum over the n ≤ kVariancePiece entries from `start` on, all of one group; each rounded to an integer.
int64_t sum_of_variances(const Source& source, int64_t start, int64_t n, const Groups& g, vf low, vf high);

}  // namespace fqt

FQT_API int fqt_variance_sums(const fqt::Source* source, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, int64_t* sums,
                              int threads);
