// Codes of a matrix.
//
// Work is cut into chunks of the flat row-major index, since that index is also the noise counter: each chunk's
// noise is made once, into a buffer that stays in the first-level cache, whatever the length of a row.
#include <memory>
#include <new>
#include <type_traits>

#include "encode.h"
#include "parallel.h"
#include "platform.h"
#include "range.h"

using namespace fqt;

namespace {

// What one run of neighbouring entries of a row needs beside its entries.
struct Run {
  int64_t column;         // of the first entry
  Groups groups;          // unless the groups are columns
  const uint32_t* noise;  // of the first entry, stochastic only
  int32_t row_noise;      // dithered only
};

constexpr bool is_stochastic(int rounding) { return rounding == kStochastic || rounding == kStochasticFixed; }
constexpr bool is_dithered(int rounding) { return rounding == kDithered || rounding == kDitheredFixed; }

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
  } else if (is_stochastic(Rounding)) {
    const vi u = load<vi>(run.noise + i);
    code = Rounding == kStochastic ? round_stochastic(t, u) : round_stochastic_fixed(t, u);
  } else {
    const uint32_t* noise = task.column_noise + column;
    const vi k = run.row_noise + (n == W ? load<vi>(noise) : load_part<vi>(noise, n));
    code = Rounding == kDithered ? round_dithered(t, k) : round_dithered_fixed(t, k);
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
    float buffer[kChunk + W];
    for (int64_t start = item * 8 * kChunk; start < size && start < (item + 1) * 8 * kChunk; start += kChunk) {
      const int64_t end = start + kChunk < size ? start + kChunk : size;
      if (is_stochastic(Rounding)) philox.fill_u24(start, end - start, noise);
      const float* x = values(task.source, start, end - start, buffer);
      for (int64_t i = start; i < end;) {
        const int64_t row = i / task.columns, column = i % task.columns;
        const int64_t n = task.columns - column < end - i ? task.columns - column : end - i;
        Run run{column, {}, noise + (i - start), 0};
        if (!Columns) {
          const int64_t group = Rows ? row : 0;
          run.groups = Groups::of(Group::of(task.step[group], task.offset[group]));
        }
        if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
        encode_run<Rounding, Columns>(task, run, x + (i - start), task.codes + i, n);
        i += n;
      }
    }
  });
}

// The entries start … end − 1 of one group.
template <int Rounding>
void encode_group(const Task& task, const Philox& philox, Group group, int64_t row, int64_t start, int64_t end) {
  uint32_t noise[kChunk + 2 * W];
  float buffer[kChunk + W];
  Run run{start - row * task.columns, Groups::of(group), nullptr, 0};
  if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
  for (int64_t i = start; i < end; i += kChunk) {
    const int64_t n = end - i < kChunk ? end - i : kChunk, skipped = i % 4;  // noise comes in blocks of four
    if (is_stochastic(Rounding)) philox.fill_u24(i - skipped, n + skipped, noise);
    run.noise = noise + skipped;
    encode_run<Rounding, false>(task, run, values(task.source, i, n, buffer), task.codes + i, n);
    run.column += n;
  }
}

template <int Rounding>
void encode_piece(const Task& task, const Philox& philox, Group group, int64_t row, int64_t column, const float* x,
                  int64_t n) {
  uint32_t noise[kChunk + 2 * W];
  Run run{column, Groups::of(group), nullptr, 0};
  if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
  const int64_t at = row * task.columns + column, skipped = at % 4;
  if (is_stochastic(Rounding)) philox.fill_u24(at - skipped, n + skipped, noise);
  run.noise = noise + skipped;
  encode_run<Rounding, false>(task, run, x, task.codes + at, n);
}

// Rows as groups: range, step and codes of a row while it is in the cache. step and offset are written.
template <int Rounding>
void quantize_rows(const Task& task, int64_t rows, int symmetric, int steps, uint64_t seed, float* step,
                   float* offset, int threads) {
  const Philox philox(seed, kRounding);
  const int64_t per_item = 1 + 8 * kChunk / task.columns;
  parallel_for(ceil_div(rows, per_item), rows * task.columns, threads, [&](int64_t item) {
    for (int64_t r = item * per_item; r < rows && r < (item + 1) * per_item; ++r) {
      const int64_t start = r * task.columns;
      float lo, hi;
      range_of_entries(task.source, start, task.columns, &lo, &hi);
      group_parameters(lo, hi, symmetric, steps, step + r, offset + r);
      encode_group<Rounding>(task, philox, Group::of(step[r], offset[r]), r, start, start + task.columns);
    }
  });
}

// The dither of a matrix, set in the task; null when there is no memory.
std::unique_ptr<uint32_t[]> draw_dither(uint64_t seed, int64_t rows, int64_t columns, bool transposed, Task* task) {
  std::unique_ptr<uint32_t[]> noise(new (std::nothrow) uint32_t[rows + columns + 2 * kNoiseWords]);
  if (!noise) return noise;
  uint32_t* column_noise = noise.get() + rows + kNoiseWords;
  Philox(seed, transposed ? kDitherColumn : kDitherRow).fill_u24(0, rows, noise.get());
  Philox(seed, transposed ? kDitherRow : kDitherColumn).fill_u24(0, columns, column_noise);
  task->row_noise = noise.get();
  task->column_noise = column_noise;
  return noise;
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

EncodePiece fqt::piece_encoder(int rounding, int low) {
  const bool fixed = kFixedPoint && low == 0;
  switch (rounding) {
    case kNearest: return encode_piece<kNearest>;
    case kStochastic: return fixed ? encode_piece<kStochasticFixed> : encode_piece<kStochastic>;
    default: return fixed ? encode_piece<kDitheredFixed> : encode_piece<kDithered>;
  }
}

// codes (rows, columns) bytes of the source: unsigned where low is 0, else signed.
// step and offset hold one number, one per row, or one per column. Contract, checked by the caller:
// −128 ≤ low ≤ high and high ≤ 127, or low = 0 and high ≤ 255 (254 dithered); by_row and by_column not both.
// transposed: the dither's row stream runs along the columns and its column stream along the rows.
FQT_API int fqt_encode(const Source* source, int64_t rows, int64_t columns, const float* step, const float* offset,
                       int by_row, int by_column, int low, int high, int rounding, const int64_t* seed,
                       int transposed, uint8_t* codes, int threads) {
  if (rows == 0 || columns == 0) return kDone;
  Task task{*source, step, offset, columns, static_cast<float>(low), static_cast<float>(high), codes, nullptr, nullptr};
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  if (rounding != kDithered && !by_row && !by_column) {  // one group: rows do not matter
    task.columns = columns = rows * columns;
    rows = 1;
  }
  const bool fixed = kFixedPoint && low == 0;
  if (rounding == kNearest) {
    encode_groups<kNearest>(task, rows, by_row, by_column, key, threads);
  } else if (rounding == kStochastic && fixed) {
    encode_groups<kStochasticFixed>(task, rows, by_row, by_column, key, threads);
  } else if (rounding == kStochastic) {
    encode_groups<kStochastic>(task, rows, by_row, by_column, key, threads);
  } else {
    const std::unique_ptr<uint32_t[]> noise = draw_dither(key, rows, columns, transposed != 0, &task);
    if (!noise) return kNoMemory;
    if (fixed) {
      encode_groups<kDitheredFixed>(task, rows, by_row, by_column, key, threads);
    } else {
      encode_groups<kDithered>(task, rows, by_row, by_column, key, threads);
    }
  }
  return kDone;
}

// Range, parameters and codes in one: group 0 the tensor, 1 rows, 2 columns; as fqt_range_*, fqt_parameters with
// `steps`, fqt_encode. step and offset are results here. At least one entry.
FQT_API int fqt_quantize(const Source* source, int64_t rows, int64_t columns, int group, int symmetric, int steps,
                         int low, int high, int rounding, const int64_t* seed, int transposed, float* step,
                         float* offset, uint8_t* codes, int threads) {
  if (group == 1) {
    std::unique_ptr<uint32_t[]> noise;
    Task task{*source, step, offset, columns, static_cast<float>(low), static_cast<float>(high), codes, nullptr, nullptr};
    const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
    if (rounding == kDithered) {
      noise = draw_dither(key, rows, columns, transposed != 0, &task);
      if (!noise) return kNoMemory;
    }
    const bool fixed = kFixedPoint && low == 0;
    const auto run = [&](auto kind) {
      quantize_rows<decltype(kind)::value>(task, rows, symmetric, steps, key, step, offset, threads);
    };
    if (rounding == kNearest) {
      run(std::integral_constant<int, kNearest>{});
    } else if (rounding == kStochastic) {
      fixed ? run(std::integral_constant<int, kStochasticFixed>{}) : run(std::integral_constant<int, kStochastic>{});
    } else {
      fixed ? run(std::integral_constant<int, kDitheredFixed>{}) : run(std::integral_constant<int, kDithered>{});
    }
    return kDone;
  }
  const int64_t groups = group == 0 ? 1 : columns;
  std::unique_ptr<float[]> range(new (std::nothrow) float[2 * groups]);
  if (!range) return kNoMemory;
  float *lo = range.get(), *hi = lo + groups;
  const int status = group == 0 ? fqt_range_tensor(source, rows * columns, lo, hi, threads)
                                : fqt_range_columns(source, rows, columns, lo, hi, threads);
  if (status != kDone) return status;
  for (int64_t g = 0; g < groups; ++g) group_parameters(lo[g], hi[g], symmetric, steps, step + g, offset + g);
  return fqt_encode(source, rows, columns, step, offset, 0, group == 2, low, high, rounding, seed, transposed, codes,
                    threads);
}

namespace {

// p(1 − p), p the fraction of t.
inline vf unit_variance(vf t) {
  const vf p = t - to_float(floor_int(t));
  return p * (1.0f - p);
}

// The same in units of 2⁻²⁴, to the nearest integer: at most 2²², so that 511 of them fit 31 bits.
inline vi counted_variance(vf t) { return round_nearest(unit_variance(t) * 0x1p24f); }

}  // namespace

// out (rows, columns): p(1 − p) of each entry, p the fraction of its position.
FQT_API int fqt_code_variance(const float* x, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, float* out,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  parallel_for(rows, rows * columns, threads, [&](int64_t row) {
    const int64_t group = by_row ? row : 0;
    Groups g = by_column ? Groups{} : Groups::of(Group::of(step[group], offset[group]));
    const float* from = x + row * columns;
    float* to = out + row * columns;
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      if (by_column) g = Groups::of(load<vf>(step + j), load<vf>(offset + j));
      store(to + j, unit_variance(position(load<vf>(from + j), g, least_code, last_code)));
    }
    if (j < columns) {
      const int64_t n = columns - j;
      if (by_column) g = Groups::of(load_part<vf>(step + j, n), load_part<vf>(offset + j, n));
      store_part(to + j, unit_variance(position(load_part<vf>(from + j, n), g, least_code, last_code)), n);
    }
  });
  return kDone;
}

// sums: Σ p(1 − p) of every group, each entry rounded to units of 2⁻²⁴, so that the order of the sum does not matter.
// One number, one per row or one per column, like step and offset; fewer than 2⁴¹ entries.
FQT_API int fqt_variance_sums(const Source* source, int64_t rows, int64_t columns, const float* step,
                              const float* offset, int by_row, int by_column, int low, int high, int64_t* sums,
                              int threads) {
  const vf least_code = splat(static_cast<float>(low)), last_code = splat(static_cast<float>(high));
  constexpr int64_t kPiece = 256 * W;  // 256 additions per lane
  const int64_t groups = by_row ? rows : by_column ? columns : 1;
  for (int64_t g = 0; g < groups; ++g) sums[g] = 0;
  if (rows == 0 || columns == 0) return kDone;
  if (by_column) {
    constexpr int64_t kStrip = 1024;
    const int64_t strips = ceil_div(columns, kStrip), bands = 1 + rows * columns / (1 << 17) / strips;
    parallel_for(strips * bands, rows * columns, threads, [&](int64_t item) {
      const int64_t first = item % strips * kStrip, width = columns - first < kStrip ? columns - first : kStrip;
      const int64_t band = item / strips, begin = rows * band / bands, end = rows * (band + 1) / bands;
      float buffer[kStrip + W];
      int64_t total[kStrip] = {};
      for (int64_t start = begin; start < end; start += 256) {
        vi sum[kStrip / W] = {};
        for (int64_t r = start; r < end && r < start + 256; ++r) {
          const float* x = values(*source, r * columns + first, width, buffer);
          for (int64_t j = 0; j < width; j += W) {
            const int64_t n = width - j;
            const Groups g = n >= W ? Groups::of(load<vf>(step + first + j), load<vf>(offset + first + j))
                                    : Groups::of(load_part<vf>(step + first + j, n), load_part<vf>(offset + first + j, n));
            sum[j / W] += counted_variance(position(n >= W ? load<vf>(x + j) : load_part<vf>(x + j, n), g, least_code, last_code));
          }
        }
        for (int64_t j = 0; j < width; ++j) total[j] += sum[j / W][j % W];
      }
      for (int64_t j = 0; j < width; ++j) __atomic_fetch_add(sums + first + j, total[j], __ATOMIC_RELAXED);
    });
    return kDone;
  }
  // Rows, or pieces of all entries; integer sums may be added up in any order.
  const int64_t length = by_row ? columns : rows * columns, pieces = ceil_div(length, kPiece);
  const int64_t items = groups * pieces, per_item = 1 + kPiece / (length < kPiece ? length : kPiece);
  parallel_for(ceil_div(items, per_item), rows * columns, threads, [&](int64_t chunk) {
    float buffer[kPiece + W];
    for (int64_t item = chunk * per_item; item < items && item < (chunk + 1) * per_item; ++item) {
      const int64_t group = item / pieces, first = item % pieces * kPiece;
      const int64_t n = length - first < kPiece ? length - first : kPiece;
      const Groups g = Groups::of(Group::of(step[group], offset[group]));
      const float* x = values(*source, group * length + first, n, buffer);
      vi sum{};
      int64_t i = 0;
      for (; i + W <= n; i += W) sum += counted_variance(position(load<vf>(x + i), g, least_code, last_code));
      int64_t total = 0;
      for (int j = 0; j < W; ++j) total += sum[j];
      if (i < n) {
        const vi last = counted_variance(position(load_part<vf>(x + i, n - i), g, least_code, last_code));
        for (int64_t j = 0; j < n - i; ++j) total += last[j];
      }
      __atomic_fetch_add(sums + group, total, __ATOMIC_RELAXED);
    }
  });
  return kDone;
}
