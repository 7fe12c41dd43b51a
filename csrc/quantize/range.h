// Ranges and parameters of groups, for quantizing in one pass.
#pragma once

#include "common/platform.h"
#include "common/source.h"

namespace fqt {

// Least and greatest of n ≥ 1 entries from the flat index `start`; NaN if there is one.
void range_of_entries(const Source& source, int64_t start, int64_t n, float* lo, float* hi);

enum Mode : int { kAffine = 0, kSymmetric = 1, kZero = 2 };

// Step and offset of one group, as reference.parameters.
void group_parameters(float lo, float hi, int mode, int steps, float* step, float* offset);

}  // namespace fqt

FQT_API int fqt_range_rows(const fqt::Source* source, int64_t rows, int64_t columns, float* lo, float* hi,
                           int threads);
FQT_API int fqt_range_tensor(const fqt::Source* source, int64_t n, float* lo, float* hi, int threads);
FQT_API int fqt_range_columns(const fqt::Source* source, int64_t rows, int64_t columns, float* lo, float* hi,
                              int threads);
