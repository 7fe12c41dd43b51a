// Row transforms, column tile by column tile. Every sum runs in the order of the reference, and no multiply-add
// is contracted: a last bit that differs here flips codes later.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"
#include "platform.h"
#include "simd.h"

using namespace fqt;

namespace {

// A tile's columns; whole vectors, padded with zeros at the right edge.
constexpr int kVectors = 4;
constexpr int64_t kTile = kVectors * W;

struct TileRow {
  vf v[kVectors];
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

inline TileRow operator+(const TileRow& a, const TileRow& b) {
  TileRow sum;
  for (int k = 0; k < kVectors; ++k) sum.v[k] = a.v[k] + b.v[k];
  return sum;
}

inline TileRow operator-(const TileRow& a, const TileRow& b) {
  TileRow difference;
  for (int k = 0; k < kVectors; ++k) difference.v[k] = a.v[k] - b.v[k];
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

// out row order[i] = output i of the butterflies over x's rows order[0], order[1], …; blocks of the given sizes,
// powers of two that sum to rows. kBadIndex unless they are, and unless 0 ≤ order[i] < rows.
FQT_API int fqt_hadamard(const float* x, int64_t rows, int64_t columns, const int64_t* order, const int64_t* sizes,
                         int64_t blocks, float* out, int threads) {
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
    // Rows lie far apart, so the processor does not guess what comes next: ask for the output's lines and for the
    // next tile's, which arrive during the arithmetic.
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = row[i] * columns + first;
      y[i] = load_row(x + at, width);
      for (int64_t line = 0; line < kTile && line < width; line += 16) {
        __builtin_prefetch(out + at + line, 1);
        if (first + kTile + line < columns) __builtin_prefetch(x + at + kTile + line, 0);
      }
    }
    butterflies(y, size);
    for (int64_t i = 0; i < size; ++i) store_row(out + row[i] * columns + first, y[i], width);
  });
  return failed.load() ? kNoMemory : kDone;
}

// out_r = x_r − n_r f_g Σ_q n_q x_q, q over the rows of r's group g in ascending order.
// kBadIndex unless 0 ≤ group[r] < rows.
FQT_API int fqt_reflect(const float* x, int64_t rows, int64_t columns, const int64_t* group, const float* normal,
                        const float* factor, float* out, int threads) {
  if (!in_range(group, rows)) return kBadIndex;
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
      const TileRow row = load_row(x + r * columns + first, width);
      TileRow& sum = total[group[r]];
      for (int k = 0; k < kVectors; ++k) sum.v[k] += row.v[k] * normal[r];
    }
    for (int64_t g = 0; g < rows; ++g) {
      for (int k = 0; k < kVectors; ++k) total[g].v[k] *= factor[g];
    }
    for (int64_t r = 0; r < rows; ++r) {
      TileRow row = load_row(x + r * columns + first, width);
      const TileRow& sum = total[group[r]];
      for (int k = 0; k < kVectors; ++k) row.v[k] = row.v[k] - normal[r] * sum.v[k];
      store_row(out + r * columns + first, row, width);
    }
  });
  return failed.load() ? kNoMemory : kDone;
}
