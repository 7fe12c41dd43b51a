// Codes of a matrix.
//
// Work is cut into chunks of the flat row-major index, since that index is also the noise counter: each chunk's
// noise is made once, into a buffer that stays in the first-level cache, whatever the length of a row.
#include <memory>
#include <new>
#include <type_traits>

#include "common/parallel.h"
#include "common/platform.h"
#include "quantize/encode.h"
#include "quantize/range.h"

using namespace fqt;

namespace {

// What one run of neighbouring entries of a row needs beside its entries; the noise is that of the first one on.
struct Run {
  int64_t column;        // of the first entry
  Groups groups;         // unless the groups are columns
  const uint16_t* high;  // stochastic only
  const uint8_t* low;    // stochastic only, once it is needed
  int32_t row_noise;     // dithered only
};

constexpr bool is_stochastic(int rounding) { return rounding == kStochastic || rounding == kStochasticFixed; }
constexpr bool is_dithered(int rounding) { return rounding == kDithered || rounding == kDitheredFixed; }

// Sure: with all bits of the noise. Else *sure falls below 255 in lanes where the low ones may matter.
template <int Rounding, bool Columns, bool Sure>
inline vb encode_vector(const Task& task, const Run& run, vf x, int64_t i, int64_t n, vu* sure) {
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
    vi u = from_halves(load<vh>(run.high + i)) << 8;
    if (Sure) {
      u |= from_bytes<false>(load<vb>(run.low + i));
      code = Rounding == kStochastic ? round_stochastic(t, u) : round_stochastic_fixed(t, u);
    } else {
      code = Rounding == kStochastic ? round_stochastic_high(t, u, sure) : round_stochastic_fixed_high(t, u, sure);
    }
  } else {
    const uint32_t* noise = task.column_noise + column;
    const vi k = run.row_noise + (n == W ? load<vi>(noise) : load_part<vi>(noise, n));
    code = Rounding == kDithered ? round_dithered(t, k) : round_dithered_fixed(t, k);
  }
  return to_bytes(code);
}

// Codes of n entries; whether they are right for any low bits of the noise. Inlined, with a task and a run that are
// locals of the caller and go nowhere else: bytes stored could otherwise be theirs, and they were loaded anew each time.
template <int Rounding, bool Columns, bool Sure>
[[gnu::always_inline]] inline bool encode_vectors(const Task& task, const Run& run, const float* x, uint8_t* codes,
                                                  int64_t n) {
  vu sure = ~vu{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    store(codes + i, encode_vector<Rounding, Columns, Sure>(task, run, load<vf>(x + i), i, W, &sure));
  }
  if (i < n) {
    const vf last = load_part<vf>(x + i, n - i);
    store_part(codes + i, encode_vector<Rounding, Columns, Sure>(task, run, last, i, n - i, &sure), n - i);
  }
  return !any((vi)(sure < 255));
}

// With all bits of the noise, for the few runs that need them. Task and run are copies, so that the caller's go nowhere.
template <int Rounding, bool Columns>
[[gnu::noinline]] void encode_surely(Task task, Run run, const RoundingNoise& noise, int64_t at, const float* x,
                                     int64_t n) {
  uint32_t low[kNoiseChunk / 4 + kNoiseWords];
  noise.low.fill(at / 16, (at % 16 + n + 3) / 4, 0, low);
  run.low = reinterpret_cast<const uint8_t*>(low) + at % 16;
  encode_vectors<Rounding, Columns, true>(task, run, x, task.codes + at, n);
}

// Codes of n entries from the flat index `at` on.
template <int Rounding, bool Columns>
[[gnu::always_inline]] inline void encode_run(const Task& task, Run run, NoiseChunk* noise, int64_t at, const float* x,
                                              int64_t n) {
  if (!is_stochastic(Rounding)) {
    encode_vectors<Rounding, Columns, true>(task, run, x, task.codes + at, n);
    return;
  }
  while (n) {
    const int64_t number = at / kNoiseChunk, skipped = at % kNoiseChunk;
    const int64_t now = n < kNoiseChunk - skipped ? n : kNoiseChunk - skipped;
    run.high = noise->high(number, skipped, skipped + now);
    if (!encode_vectors<Rounding, Columns, false>(task, run, x, task.codes + at, now)) {
      encode_surely<Rounding, Columns>(task, run, noise->noise, at, x, now);
    }
    at += now, x += now, n -= now, run.column += now;
  }
}

template <int Rounding, bool Rows, bool Columns>
void encode_all(const Task& all, int64_t rows, uint64_t seed, int threads) {
  const int64_t size = rows * all.columns;
  const RoundingNoise noise(seed);
  parallel_for(ceil_div(size, 8 * kChunk), size, threads, [&](int64_t item) {
    const Task task = all;
    NoiseChunk chunk(noise);
    float buffer[kChunk + W];
    for (int64_t start = item * 8 * kChunk; start < size && start < (item + 1) * 8 * kChunk; start += kChunk) {
      const int64_t end = start + kChunk < size ? start + kChunk : size;
      const float* x = values(task.source, start, end - start, buffer);
      for (int64_t i = start; i < end;) {
        const int64_t row = i / task.columns, column = i % task.columns;
        const int64_t n = task.columns - column < end - i ? task.columns - column : end - i;
        Run run{column, {}, nullptr, nullptr, 0};
        if (!Columns) {
          const int64_t group = Rows ? row : 0;
          run.groups = Groups::of(Group::of(task.step[group], task.offset[group]));
        }
        if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
        encode_run<Rounding, Columns>(task, run, &chunk, i, x + (i - start), n);
        i += n;
      }
    }
  });
}

template <int Rounding>
void encode_piece(const Task& whole, NoiseChunk* noise, Group group, int64_t row, int64_t column, const float* x,
                  int64_t n) {
  const Task task = whole;
  Run run{column, Groups::of(group), nullptr, nullptr, 0};
  if (is_dithered(Rounding)) run.row_noise = static_cast<int32_t>(task.row_noise[row]);
  encode_run<Rounding, false>(task, run, noise, row * task.columns + column, x, n);
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

std::unique_ptr<uint32_t[]> fqt::draw_dither(uint64_t seed, int64_t rows, int64_t columns, bool transposed, Task* task) {
  std::unique_ptr<uint32_t[]> noise(new (std::nothrow) uint32_t[rows + columns + 2 * kNoiseWords]);
  if (!noise) return noise;
  uint32_t* column_noise = noise.get() + rows + kNoiseWords;
  Philox(seed, transposed ? kDitherColumn : kDitherRow).fill(0, rows, 8, noise.get());
  Philox(seed, transposed ? kDitherRow : kDitherColumn).fill(0, columns, 8, column_noise);
  task->row_noise = noise.get();
  task->column_noise = column_noise;
  return noise;
}

void fqt::encode_matrix(Task task, int64_t rows, bool by_row, bool by_column, int rounding, uint64_t seed, int threads) {
  if (rounding != kDithered && !by_row && !by_column) {  // one group: rows do not matter
    task.columns *= rows;
    rows = 1;
  }
  const bool fixed = kFixedPoint && task.low == 0;
  if (rounding == kNearest) {
    encode_groups<kNearest>(task, rows, by_row, by_column, seed, threads);
  } else if (rounding == kStochastic) {
    fixed ? encode_groups<kStochasticFixed>(task, rows, by_row, by_column, seed, threads)
          : encode_groups<kStochastic>(task, rows, by_row, by_column, seed, threads);
  } else {
    fixed ? encode_groups<kDitheredFixed>(task, rows, by_row, by_column, seed, threads)
          : encode_groups<kDithered>(task, rows, by_row, by_column, seed, threads);
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
  std::unique_ptr<uint32_t[]> noise;
  if (rounding == kDithered && !(noise = draw_dither(key, rows, columns, transposed != 0, &task))) return kNoMemory;
  encode_matrix(task, rows, by_row != 0, by_column != 0, rounding, key, threads);
  return kDone;
}
