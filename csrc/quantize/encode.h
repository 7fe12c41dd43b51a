// Codes of matrices, and of pieces of rows for kernels that make their rows themselves.
#pragma once

#include <cstdint>
#include <memory>

#include "common/source.h"
#include "quantize/grid.h"
#include "quantize/philox.h"

namespace fqt {

// The first four are the C interface's; the last two are arithmetic for the same codes.
enum Rounding : int { kNearest = 0, kStochastic = 1, kDithered = 2, kBest = 3, kStochasticFixed = 4, kDitheredFixed = 5 };

constexpr int64_t kChunk = 2048;  // entries that are read at a time
constexpr int64_t kNoiseChunk = 256;  // entries whose noise is made at a time
static_assert(kNoiseChunk % (2 * kNoiseWords) == 0, "chunks start at whole vectors of noise");

// The noise of stochastic rounding, 24 bits an entry: the high 16 are half words of one stream, the low 8 bytes of
// another, which are made only where the first leave a code open.
struct RoundingNoise {
  Philox high, low;

  explicit RoundingNoise(uint64_t seed) : high(seed, kRounding), low(seed, kRoundingLow) {}
};

// One thread's high bits, for some entries of a chunk of the flat index.
class NoiseChunk {
 public:
  explicit NoiseChunk(const RoundingNoise& noise) : noise(noise) {}

  // The high bits of entries first … last − 1 of a chunk; a vector more may be read.
  [[gnu::always_inline]] inline const uint16_t* high(int64_t number, int64_t first, int64_t last) {
    if (number != number_ || first < first_ || last > last_) make(number, first, last);
    return reinterpret_cast<const uint16_t*>(words_) + first;
  }

  const RoundingNoise& noise;

 private:
  // All of a chunk that is read from its beginning, or from several rows: the next row goes on in it. Rows that are
  // no neighbours get no more than they need.
  [[gnu::always_inline]] inline void make(int64_t number, int64_t first, int64_t last) {
    const bool all = first == 0 || number == number_;
    first_ = all ? 0 : first / 8 * 8, last_ = all ? kNoiseChunk : last, number_ = number;
    noise.high.fill((number * kNoiseChunk + first_) / 8, (last_ - first_ + 1) / 2, 0, words_ + first_ / 2);
  }

  int64_t number_ = -1, first_ = 0, last_ = 0;
  uint32_t words_[kNoiseChunk / 2 + kNoiseWords + W] = {};
};

struct Task {
  const Source& source;
  const float *step, *offset;
  int64_t columns;
  float low, high;
  uint8_t* codes;
  const uint32_t *row_noise, *column_noise;  // dithered only
};

// Codes of n entries x of row `row` from `column` on; they may come from elsewhere than the task's source.
typedef void (*EncodePiece)(const Task& task, NoiseChunk* noise, Group group, int64_t row, int64_t column,
                            const float* x, int64_t n);
EncodePiece piece_encoder(int rounding, int low);

// The dither of a matrix, set in the task; null when there is no memory.
std::unique_ptr<uint32_t[]> draw_dither(uint64_t seed, int64_t rows, int64_t columns, bool transposed, Task* task);

// 24-bit integers in fractions of a step.
inline void as_fractions(const uint32_t* noise, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(noise[i]) * 0x1p-24f;
}

// Codes of the whole matrix; dithered rounding finds its noise in the task.
void encode_matrix(Task task, int64_t rows, bool by_row, bool by_column, int rounding, uint64_t seed, int threads);

}  // namespace fqt
