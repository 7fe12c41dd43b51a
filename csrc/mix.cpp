// Row transforms, column tile by column tile. Every sum runs in the order of the reference, and no multiply-add
// is contracted: a last bit that differs here flips codes later.
#include <atomic>
#include <cfloat>
#include <cstdlib>
#include <memory>
#include <new>

#include "epilogue.h"
#include "parallel.h"
#include "platform.h"
#include "simd.h"
#include "source.h"

using namespace fqt;

namespace {

// A tile's columns; whole vectors, padded with zeros at the right edge.
constexpr int kTileVectors = 4;
constexpr int64_t kTile = kTileVectors * W;

struct TileRow {
  vf v[kTileVectors];
};

inline TileRow load_row(const float* p, int64_t width) {
  TileRow row{};
  if (width == kTile) {  // a copy of known length takes no call
    std::memcpy(&row, p, sizeof row);
  } else {
    std::memcpy(&row, p, 4 * width);
  }
  return row;
}

inline void store_row(float* p, const TileRow& row, int64_t width) {
  if (width == kTile) {
    std::memcpy(p, &row, sizeof row);
  } else {
    std::memcpy(p, &row, 4 * width);
  }
}

// What becomes of a row on its way in: (x · half − offset · half) · scale, or x itself where scale is null.
struct RowsIn {
  const Source* source;
  const float *half, *offset, *scale;  // one per row
  int64_t columns;

  TileRow operator()(int64_t r, int64_t first, int64_t width) const {
    float buffer[kTile + W];
    TileRow row = load_row(values(*source, r * columns + first, width, buffer), width);
    if (scale) {
      const vf h = splat(half[r]), o = splat(offset[r] * half[r]), s = splat(scale[r]);
      for (int k = 0; k < kTileVectors; ++k) row.v[k] = (row.v[k] * h - o) * s;
    }
    return row;
  }
  void prefetch(int64_t r, int64_t first) const {
    const char* from = static_cast<const char*>(source->x) + (r * columns + first) * (source->type == kFloat32In ? 4 : 2);
    for (int64_t line = 0; line < kTile * 4; line += 64) __builtin_prefetch(from + line, 0);
  }
};

// And on its way out: y · scale + offset · right, clamped to the finite floats, or y itself where scale is null.
struct RowsOut {
  void* out;
  int32_t type;                               // kFloat32 or kBfloat16
  const float *scale, *offset, *right;        // one per row, one per row, one per column (null: 1)
  int64_t columns;

  void operator()(int64_t r, int64_t first, int64_t width, TileRow row) const {
    if (scale) {
      const vf s = splat(scale[r]), o = splat(offset[r]);
      const TileRow factors = right ? load_row(right + first, width) : TileRow{};
      for (int k = 0; k < kTileVectors; ++k) {
        const vf v = row.v[k] * s + (right ? o * factors.v[k] : o);
        const vf below = v > FLT_MAX ? splat(FLT_MAX) : v;  // NaN stays
        row.v[k] = below < -FLT_MAX ? splat(-FLT_MAX) : below;
      }
    }
    const int64_t at = r * columns + first;
    if (type == kFloat32) return store_row(static_cast<float*>(out) + at, row, width);
    uint16_t rounded[kTile];
    for (int k = 0; k < kTileVectors; ++k) store(rounded + k * W, to_bfloat16(row.v[k]));
    std::memcpy(static_cast<uint16_t*>(out) + at, rounded, 2 * width);
  }
};

inline TileRow operator+(const TileRow& a, const TileRow& b) {
  TileRow sum;
  for (int k = 0; k < kTileVectors; ++k) sum.v[k] = a.v[k] + b.v[k];
  return sum;
}

inline TileRow operator-(const TileRow& a, const TileRow& b) {
  TileRow difference;
  for (int k = 0; k < kTileVectors; ++k) difference.v[k] = a.v[k] - b.v[k];
  return difference;
}

// Butterflies over y[0 … size), strides 1, 2, 4, …; two stages at a time to halve the memory traffic.
void butterflies(TileRow* y, int64_t size) {
  int64_t stride = 1;
  for (; 4 * stride <= size; stride *= 4) {
    for (int64_t base = 0; base < size; base += 4 * stride) {
      for (int64_t i = base; i < base + stride; ++i) {
        const TileRow a = y[i], b = y[i + stride], c = y[i + 2 * stride], d = y[i + 3 * stride];
        const TileRow ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        y[i] = ab + cd;
        y[i + stride] = a_b + c_d;
        y[i + 2 * stride] = ab - cd;
        y[i + 3 * stride] = a_b - c_d;
      }
    }
  }
  if (2 * stride <= size) {
    for (int64_t i = 0; i < stride; ++i) {
      const TileRow a = y[i], b = y[i + stride];
      y[i] = a + b;
      y[i + stride] = a - b;
    }
  }
}

// Memory for tiles, aligned for vectors; null when there is none.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
typedef std::unique_ptr<TileRow[], Free> Tile;

Tile make_tile(int64_t rows) {
  return Tile(static_cast<TileRow*>(std::aligned_alloc(64, ceil_div(rows * sizeof(TileRow), 64) * 64)));
}

bool in_range(const int64_t* index, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] < 0 || index[i] >= n) return false;
  }
  return true;
}

}  // namespace

// Row order[i] of the result = output i of the butterflies over the rows order[0], order[1], … of what comes in; blocks
// of the given sizes, powers of two that sum to rows. Rows with keep false (null: none) come out as they came in.
// kBadIndex unless the sizes are such, and unless 0 ≤ order[i] < rows.
FQT_API int fqt_hadamard(const Source* source, int64_t rows, int64_t columns, const int64_t* order,
                         const int64_t* sizes, int64_t blocks, const float* half, const float* in_offset,
                         const float* in_scale, const bool* keep, const float* scale, const float* offset,
                         const float* right, int type, void* out, int threads) {
  int64_t total = 0, largest_size = 1;
  for (int64_t b = 0; b < blocks; ++b) {
    if (sizes[b] < 1 || (sizes[b] & (sizes[b] - 1))) return kBadIndex;
    total += sizes[b];
    largest_size = sizes[b] > largest_size ? sizes[b] : largest_size;
  }
  if (total != rows || !in_range(order, rows)) return kBadIndex;
  std::unique_ptr<int64_t[]> start(new (std::nothrow) int64_t[blocks + 1]);
  if (!start) return kNoMemory;
  start[0] = 0;
  for (int64_t b = 0; b < blocks; ++b) start[b + 1] = start[b] + sizes[b];

  const RowsIn take{source, half, in_offset, in_scale, columns};
  const RowsOut give{out, type, scale, offset, right, columns};
  const int64_t tiles = ceil_div(columns, kTile);
  std::atomic<bool> failed{false};
  parallel_for(blocks * tiles, rows * columns, threads, [&](int64_t item) {
    constexpr int64_t kOnStack = 128;
    const int64_t block = item / tiles, first = item % tiles * kTile, size = sizes[block];
    const int64_t width = columns - first < kTile ? columns - first : kTile;
    const int64_t* row = order + start[block];
    TileRow stack[kOnStack];
    Tile heap;
    TileRow* y = stack;
    if (size > kOnStack) {
      heap = make_tile(size);
      y = heap.get();
      if (!y) {
        failed = true;
        return;
      }
    }
    // Rows lie far apart, so the processor does not guess what comes next: ask for the next tile's lines, which
    // arrive during the arithmetic.
    bool any = !keep;
    for (int64_t i = 0; i < size; ++i) {
      y[i] = take(row[i], first, width);
      any = any || keep[row[i]];
      if (first + 2 * kTile <= columns) take.prefetch(row[i], first + kTile);
    }
    if (any) butterflies(y, size);  // the guard keeps whole blocks
    for (int64_t i = 0; i < size; ++i) {
      const bool mixed = !keep || keep[row[i]];
      give(row[i], first, width, mixed || !any ? y[i] : take(row[i], first, width));
    }
  });
  return failed.load() ? kNoMemory : kDone;
}

// Row r of the result = x_r − n_r f_g Σ_q n_q x_q, q over the rows of r's group g in ascending order, x what comes in.
// kBadIndex unless 0 ≤ group[r] < rows.
FQT_API int fqt_reflect(const Source* source, int64_t rows, int64_t columns, const int64_t* group,
                        const float* normal, const float* factor, const float* half, const float* in_offset,
                        const float* in_scale, const float* scale, const float* offset, const float* right,
                        int type, void* out, int threads) {
  if (!in_range(group, rows)) return kBadIndex;
  const RowsIn take{source, half, in_offset, in_scale, columns};
  const RowsOut give{out, type, scale, offset, right, columns};
  std::atomic<bool> failed{false};
  parallel_for(ceil_div(columns, kTile), rows * columns, threads, [&](int64_t item) {
    const int64_t first = item * kTile, width = columns - first < kTile ? columns - first : kTile;
    const Tile total = make_tile(rows);
    if (!total) {
      failed = true;
      return;
    }
    std::memset(static_cast<void*>(total.get()), 0, rows * sizeof(TileRow));
    for (int64_t r = 0; r < rows; ++r) {
      const TileRow row = take(r, first, width);
      TileRow& sum = total[group[r]];
      for (int k = 0; k < kTileVectors; ++k) sum.v[k] += row.v[k] * normal[r];
    }
    for (int64_t g = 0; g < rows; ++g) {
      for (int k = 0; k < kTileVectors; ++k) total[g].v[k] *= factor[g];
    }
    for (int64_t r = 0; r < rows; ++r) {
      TileRow row = take(r, first, width);
      const TileRow& sum = total[group[r]];
      for (int k = 0; k < kTileVectors; ++k) row.v[k] = row.v[k] - normal[r] * sum.v[k];
      give(r, first, width, row);
    }
  });
  return failed.load() ? kNoMemory : kDone;
}
