// Row transforms of whole matrices. Every sum runs in the order of the reference, and no multiply-add is
// contracted: a last bit that differs here flips codes later.
#include <atomic>
#include <cfloat>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "common/platform.h"
#include "transform/butterflies.h"
#include "transform/reflection.h"
#include "transform/row_groups.h"

using namespace fqt;

namespace {

// What becomes of a row on its way out: y · scale + offset · right, clamped to the finite floats, or y itself where
// scale is null.
struct RowsOut {
  void* out;
  int32_t type;                         // kFloat32 or kBfloat16
  const float *scale, *offset, *right;  // one per row, one per row, one per column (null: 1)
  int64_t columns;

  inline void operator()(int64_t r, int64_t column, vf v) const {
    const int64_t left = columns - column, at = r * columns + column;
    if (scale) {
      v = v * scale[r];
      if (right) {
        v = v + offset[r] * (left >= W ? load<vf>(right + column) : load_part<vf>(right + column, left));
      } else {
        v = v + offset[r];
      }
      v = v > FLT_MAX ? splat(FLT_MAX) : v;  // NaN stays
      v = v < -FLT_MAX ? splat(-FLT_MAX) : v;
    }
    if (type == kFloat32) {
      float* to = static_cast<float*>(out) + at;
      left >= W ? store(to, v) : store_part(to, v, left);
    } else {
      uint16_t* to = static_cast<uint16_t*>(out) + at;
      left >= W ? store(to, to_bfloat16(v)) : store_part(to, to_bfloat16(v), left);
    }
  }
};

std::vector<RowScaling> scalings(int64_t rows, const float* half, const float* offset, const float* scale) {
  std::vector<RowScaling> found(scale ? rows : 0);
  for (int64_t r = 0; scale && r < rows; ++r) found[r] = {half[r], offset[r] * half[r], scale[r]};
  return found;
}

bool in_range(const int64_t* index, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] < 0 || index[i] >= n) return false;
  }
  return true;
}

// A block of rows and a strip of columns.
struct Part {
  int64_t block, first, width;
};

template <bool Scaled>
int hadamard(SourceRows rows, const std::vector<int64_t>& start, const bool* keep, const RowsOut& give, int64_t n,
             int threads) {
  const int64_t *order = rows.order, columns = rows.columns;
  std::vector<Part> parts;
  for (int64_t b = 0; b + 1 < static_cast<int64_t>(start.size()); ++b) {
    const int64_t strip = strip_columns(start[b + 1] - start[b], columns);
    for (int64_t first = 0; first < columns; first += strip) {
      parts.push_back({b, first, columns - first < strip ? columns - first : strip});
    }
  }
  std::atomic<bool> failed{false};
  parallel_for(parts.size(), n * columns, threads, [&](int64_t item) {
    const Part part = parts[item];
    const int64_t size = start[part.block + 1] - start[part.block], *row = order + start[part.block];
    bool any = !keep;
    for (int64_t i = 0; i < size; ++i) any = any || keep[row[i]];
    if (any) {
      float* scratch = thread_scratch(size * scratch_stride(part.width));
      if (!scratch) {
        failed = true;
        return;
      }
      SourceRows block = rows;
      block.order = row;
      mix_strip<Scaled>(block, size, part.first, part.width, scratch,
                        [&](int64_t i, int64_t j, vf v) { give(row[i], part.first + j, v); });
    }
    for (int64_t i = 0; keep && i < size; ++i) {
      if (keep[row[i]]) continue;
      float buffer[kReflected + W];
      for (int64_t j = 0; j < part.width; j += kReflected) {
        const int64_t count = part.width - j < kReflected ? part.width - j : kReflected;
        const float* x = row_piece<Scaled>(rows, row[i], part.first + j, count, buffer);
        for (int64_t k = 0; k < count; k += W) give(row[i], part.first + j + k, load<vf>(x + k));
      }
    }
  });
  return failed.load() ? kNoMemory : kDone;
}

template <bool Scaled>
void reflect(const SourceRows& rows, const RowGroups& groups, const float* normal, const float* factor,
             const RowsOut& give, int64_t n, int threads) {
  std::vector<Part> parts;
  for (int64_t g = 0; g < n; ++g) {
    if (!groups.size(g)) continue;
    const int64_t fitting = strip_columns(groups.size(g), rows.columns);
    const int64_t strip = fitting < kReflected ? fitting : kReflected;
    for (int64_t first = 0; first < rows.columns; first += strip) {
      parts.push_back({g, first, rows.columns - first < strip ? rows.columns - first : strip});
    }
  }
  parallel_for(parts.size(), n * rows.columns, threads, [&](int64_t item) {
    const Part part = parts[item];
    const int64_t *member = groups.of(part.block), size = groups.size(part.block);
    float total[kReflected + W];
    reflection_sum<Scaled>(rows, member, size, normal, factor[part.block], part.first, part.width, total);
    for (int64_t i = 0; i < size; ++i) {
      reflect_row<Scaled>(rows, member[i], normal[member[i]], total, part.first, part.width,
                          [&](int64_t j, vf v) { give(member[i], part.first + j, v); });
    }
  });
}

}  // namespace

// Row order[i] of the result = output i of the butterflies over the rows order[0], order[1], … of what comes in; blocks
// of the given sizes, powers of two that sum to rows. Rows with keep false (null: none) come out as they came in.
// kBadIndex unless the sizes are such, and unless 0 ≤ order[i] < rows.
FQT_API int fqt_hadamard(const Source* source, int64_t rows, int64_t columns, const int64_t* order,
                         const int64_t* sizes, int64_t blocks, const float* half, const float* in_offset,
                         const float* in_scale, const bool* keep, const float* scale, const float* offset,
                         const float* right, int type, void* out, int threads) try {
  std::vector<int64_t> start(blocks + 1);
  for (int64_t b = 0; b < blocks; ++b) {
    if (sizes[b] < 1 || (sizes[b] & (sizes[b] - 1))) return kBadIndex;
    start[b + 1] = start[b] + sizes[b];
  }
  if (start[blocks] != rows || !in_range(order, rows)) return kBadIndex;
  const std::vector<RowScaling> scaling = scalings(rows, half, in_offset, in_scale);
  const SourceRows in{source, columns, order, scaling.data()};
  const RowsOut give{out, type, scale, offset, right, columns};
  return (in_scale ? hadamard<true> : hadamard<false>)(in, start, keep, give, rows, threads);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Row r of the result = x_r − n_r f_g Σ_q n_q x_q, q over the rows of r's group g in ascending order, x what comes in.
// kBadIndex unless 0 ≤ group[r] < rows.
FQT_API int fqt_reflect(const Source* source, int64_t rows, int64_t columns, const int64_t* group,
                        const float* normal, const float* factor, const float* half, const float* in_offset,
                        const float* in_scale, const float* scale, const float* offset, const float* right,
                        int type, void* out, int threads) try {
  if (!in_range(group, rows)) return kBadIndex;
  const RowGroups groups(group, rows);
  const std::vector<RowScaling> scaling = scalings(rows, half, in_offset, in_scale);
  const SourceRows in{source, columns, nullptr, scaling.data()};
  const RowsOut give{out, type, scale, offset, right, columns};
  (in_scale ? reflect<true> : reflect<false>)(in, groups, normal, factor, give, rows, threads);
  return kDone;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}
