// The C interface of the kernels that mix rows and round them: what is asked, and where the results go.
#pragma once

#include <algorithm>
#include <cstdint>

#include "transform/mixed_codes.h"

namespace fqt {

// Every array has one entry per row but for `column_dither` (one per column) and `codes` (rows × columns).
struct Mixed {
  const int64_t* seed;  // null only for kNearest
  int32_t guard, levels, high, rounding;  // as in MixedRounding; kNearest, kStochastic or kDithered
  float *inverse, *middle;                // 1/s, and what is added back; 1 and 0 where rows stay plain
  double* cost;                           // of a step on the transformed row; 1 where it stays plain
  float *step, *offset;
  float *row_dither, *column_dither;  // dithered only
  bool* keep;
  uint8_t* codes;
  int32_t finite;  // result: 0 if an entry is NaN or infinite, and then nothing else is written
  float lo, hi;    // result: the least and the greatest entry
};

// Codes, and the results that do not depend on the transform. inverse, cost: of mixed rows.
template <class Mixer>
int mixed_codes(const Mixer& mixer, const RowGroups& groups, int64_t blocks, const PlainRows& plain,
                const std::vector<double>& inverse, const std::vector<double>& cost, const Source& source,
                int64_t columns, Mixed& how, int threads) {
  const int64_t rows = inverse.size();
  how.lo = *std::min_element(plain.lo.begin(), plain.lo.end());
  how.hi = *std::max_element(plain.hi.begin(), plain.hi.end());
  const uint64_t seed = how.seed ? static_cast<uint64_t>(*how.seed) : 0;
  Task task{source, how.step, how.offset, columns, 0.0f, static_cast<float>(how.high), how.codes, nullptr, nullptr};
  std::unique_ptr<uint32_t[]> noise;
  if (how.rounding == kDithered) {
    noise = draw_dither(seed, rows, columns, false, &task);
    if (!noise) return kNoMemory;
    as_fractions(task.row_noise, rows, how.row_dither);
    as_fractions(task.column_noise, columns, how.column_dither);
  }
  const MixedRounding rounding{how.guard != 0, how.levels, how.high, task, piece_encoder(how.rounding, 0),
                               RoundingNoise(seed), how.step, how.offset, how.keep};
  const int status = MixedCodes<Mixer>(mixer, groups, plain, cost.data(), rounding).run(blocks, threads);
  for (int64_t r = 0; r < rows; ++r) {
    how.inverse[r] = how.keep[r] ? static_cast<float>(inverse[r]) : 1.0f;
    how.middle[r] = how.keep[r] ? plain.middle[r] : 0.0f;
    how.cost[r] = how.keep[r] ? cost[r] : 1.0;
  }
  return status;
}

}  // namespace fqt
