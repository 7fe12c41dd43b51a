// Codes of a matrix.
//
// Work is cut into chunks of the flat row-major index, since that index is also the noise counter: each chunk's
// noise is made once, into a buffer that stays in the first-level cache, whatever the length of a row.
#include <memory>
#include <new>

#include "grid.h"
#include "parallel.h"
#include "philox.h"
#include "platform.h"

using namespace fqt;

namespace {

enum Rounding : int { kNearest = 0, kStochastic = 1, kDithered = 2 };

constexpr int64_t kChunk = 2048;  // a multiple of kNoiseWords
static_assert(kChunk % kNoiseWords == 0, "chunks start at whole vectors of noise");

struct Task {
  const float* x;
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
  } else if (Rounding == kStochastic) {
    code = round_stochastic(t, load<vi>(run.noise + i));
  } else {
    const uint32_t* noise = task.column_noise + column;
    code = round_dithered(t, run.row_noise + (n == W ? load<vi>(noise) : load_part<vi>(noise, n)));
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
    for (int64_t start = item * 8 * kChunk; start < size && start < (item + 1) * 8 * kChunk; start += kChunk) {
      const int64_t end = start + kChunk < size ? start + kChunk : size;
      if (Rounding == kStochastic) philox.fill_u24(start, end - start, noise);
      for (int64_t i = start; i < end;) {
        const int64_t row = i / task.columns, column = i % task.columns;
        const int64_t n = task.columns - column < end - i ? task.columns - column : end - i;
        Run run{column, {}, noise + (i - start), 0};
        if (!Columns) {
          const int64_t group = Rows ? row : 0;
          run.groups = Groups::of(Group::of(task.step[group], task.offset[group]));
        }
        if (Rounding == kDithered) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
        encode_run<Rounding, Columns>(task, run, task.x + i, task.codes + i, n);
        i += n;
      }
    }
  });
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

// codes (rows, columns) bytes of x (rows, columns): unsigned where low is 0, else signed.
// step and offset hold one number, one per row, or one per column. Contract, checked by the caller:
// −128 ≤ low ≤ high and high ≤ 127, or low = 0 and high ≤ 255 (254 dithered); by_row and by_column not both.
FQT_API int fqt_encode(const float* x, int64_t rows, int64_t columns, const float* step, const float* offset,
                       int by_row, int by_column, int low, int high, int rounding, const int64_t* seed,
                       uint8_t* codes, int threads) {
  if (rows == 0 || columns == 0) return kDone;
  Task task{x, step, offset, columns, static_cast<float>(low), static_cast<float>(high), codes, nullptr, nullptr};
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  if (rounding == kNearest) {
    encode_groups<kNearest>(task, rows, by_row, by_column, key, threads);
  } else if (rounding == kStochastic) {
    encode_groups<kStochastic>(task, rows, by_row, by_column, key, threads);
  } else {
    std::unique_ptr<uint32_t[]> noise(new (std::nothrow) uint32_t[rows + columns + 2 * kNoiseWords]);
    if (!noise) return kNoMemory;
    Philox(key, kDitherRow).fill_u24(0, rows, noise.get());
    uint32_t* column_noise = noise.get() + rows + kNoiseWords;
    Philox(key, kDitherColumn).fill_u24(0, columns, column_noise);
    task.row_noise = noise.get();
    task.column_noise = column_noise;
    encode_groups<kDithered>(task, rows, by_row, by_column, key, threads);
  }
  return kDone;
}

// out (rows, columns): p(1 − p) of each entry, p the fraction of its position.
FQT_API int fqt_code_variance(const float* x, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, float* out,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  const auto unit = [&](vf value, const Groups& g) {
    const vf t = position(value, g, least_code, last_code);
    const vf p = t - to_float(floor_int(t));
    return p * (1.0f - p);
  };
  parallel_for(rows, rows * columns, threads, [&](int64_t row) {
    const int64_t group = by_row ? row : 0;
    Groups g = by_column ? Groups{} : Groups::of(Group::of(step[group], offset[group]));
    const float* from = x + row * columns;
    float* to = out + row * columns;
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      if (by_column) g = Groups::of(load<vf>(step + j), load<vf>(offset + j));
      store(to + j, unit(load<vf>(from + j), g));
    }
    if (j < columns) {
      const int64_t n = columns - j;
      if (by_column) g = Groups::of(load_part<vf>(step + j, n), load_part<vf>(offset + j, n));
      store_part(to + j, unit(load_part<vf>(from + j, n), g), n);
    }
  });
  return kDone;
}
