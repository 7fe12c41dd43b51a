// Rows as they are: their ranges, and what a transform takes off them and divides by.
#pragma once

#include <cstdint>
#include <vector>

#include "common/source.h"
#include "transform/butterflies.h"

namespace fqt {

// Vectors of one entry per row. Members throw std::bad_alloc.
struct PlainRows {
  std::vector<float> lo, hi;
  std::vector<float> size;    // hi − lo, halved where that could overflow: only a size
  std::vector<float> middle;  // about it a row is no larger than half its range, so that undoing cannot overflow
  std::vector<float> half;    // ½ for rows too wide for a float, else 1
  bool finite;                // all ranges are

  // At least one row and one column.
  PlainRows(const Source& source, int64_t rows, int64_t columns, int threads);

  bool constant(int64_t r) const { return lo[r] == hi[r]; }

  // What becomes of row r under a scale.
  RowScaling scaling(int64_t r, double scale) const {
    return {half[r], middle[r] * half[r], static_cast<float>(scale / static_cast<double>(half[r]))};
  }

  // The rows by size, the largest first; equal ones in ascending order.
  std::vector<int64_t> by_size() const;
};

}  // namespace fqt
