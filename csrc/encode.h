// Codes of pieces of rows, for kernels that make their rows themselves.
#pragma once

#include <cstdint>

#include "grid.h"
#include "philox.h"
#include "source.h"

namespace fqt {

enum Rounding : int { kNearest = 0, kStochastic = 1, kDithered = 2, kStochasticFixed = 3, kDitheredFixed = 4 };

constexpr int64_t kChunk = 2048;  // entries whose noise is made at a time; a multiple of kNoiseWords
static_assert(kChunk % kNoiseWords == 0, "chunks start at whole vectors of noise");

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
typedef void (*EncodePiece)(const Task& task, const Philox& philox, Group group, int64_t row, int64_t column,
                            const float* x, int64_t n);
EncodePiece piece_encoder(int rounding, int low);

}  // namespace fqt
