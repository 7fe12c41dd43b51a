// Codes of matrices, and of pieces of rows for kernels that make their rows themselves.
#pragma once

#include <cstdint>
#include <memory>

#include "grid.h"
#include "philox.h"
#include "source.h"

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

// One thread's noise, chunk by chunk.
struct NoiseChunk {
  const RoundingNoise& noise;
  int64_t number = -1;                // of the chunk of the flat index whose high bits are here
  uint32_t high[kNoiseChunk / 2 + W];  // the tail of a row may read one vector past it

  explicit NoiseChunk(const RoundingNoise& all) : noise(all) {}
};

struct Task {
  const Source& source;
  const float *step, *offset;
  int64_t columns;
  float low, high;
  uint8_t* codes;
  const uint32_t *row_noise, *column_noise;  // dithered only
};

// Codes of the entries x of row `row` from `column` on, at most kChunk of them; they may come from elsewhere than
// the task's source.
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
