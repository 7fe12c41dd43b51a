// Values of codes: step · (code − dither) + offset, on sixteenths where the range is wide, never beyond the largest
// float.
#include <cfloat>

#include "common/parallel.h"
#include "common/platform.h"
#include "quantize/grid.h"

using namespace fqt;

namespace {

struct Parameters {
  vf step, offset, scale;  // (code·step + offset)·scale, scale 1 or 16

  static Parameters of(vf step, vf offset) {
    const vf half = step > kWideStep ? splat(kNarrowing) : splat(1.0f);
    return {step * half, offset * half, splat(1.0f) / half};
  }
};

inline vf value(vf code, const Parameters& p) {
  const vf v = (code * p.step + p.offset) * p.scale;
  const vf below = v > FLT_MAX ? splat(FLT_MAX) : v;  // NaN stays
  return below < -FLT_MAX ? splat(-FLT_MAX) : below;
}

struct Task {
  const uint8_t* codes;
  const float *step, *offset, *dither;
  int64_t columns;
  bool by_row, by_column, dither_by_row, dither_by_column;
  float* out;
};

template <bool Signed>
void decode_row(const Task& task, int64_t row) {
  const uint8_t* codes = task.codes + row * task.columns;
  float* out = task.out + row * task.columns;
  const int64_t group = task.by_row ? row : 0;
  Parameters p{};
  if (!task.by_column) p = Parameters::of(splat(task.step[group]), splat(task.offset[group]));
  const bool dithered = task.dither != nullptr;
  vf dither{};
  if (dithered && !task.dither_by_column) dither = splat(task.dither[task.dither_by_row ? row : 0]);

  const auto entry = [&](vb bytes, int64_t j, int64_t n) {
    vf code = to_float(from_bytes<Signed>(bytes));
    if (task.by_column) {
      p = n == W ? Parameters::of(load<vf>(task.step + j), load<vf>(task.offset + j))
                 : Parameters::of(load_part<vf>(task.step + j, n), load_part<vf>(task.offset + j, n));
    }
    if (dithered) {
      if (task.dither_by_column) dither = n == W ? load<vf>(task.dither + j) : load_part<vf>(task.dither + j, n);
      code -= dither;
    }
    return value(code, p);
  };
  int64_t j = 0;
  for (; j + W <= task.columns; j += W) store(out + j, entry(load<vb>(codes + j), j, W));
  if (j < task.columns) {
    const int64_t n = task.columns - j;
    store_part(out + j, entry(load_part<vb>(codes + j, n), j, n), n);
  }
}

}  // namespace

// out (rows, columns). step, offset and dither (which may be null) hold one number, one per row or one per column.
FQT_API int fqt_decode(const uint8_t* codes, int is_signed, int64_t rows, int64_t columns, const float* step,
                       const float* offset, int by_row, int by_column, const float* dither, int dither_by_row,
                       int dither_by_column, float* out, int threads) {
  const Task task{codes,         step,           offset,
                  dither,        columns,        by_row != 0,
                  by_column != 0, dither_by_row != 0, dither_by_column != 0,
                  out};
  parallel_for(rows, rows * columns, threads, [&](int64_t row) {
    if (is_signed) {
      decode_row<true>(task, row);
    } else {
      decode_row<false>(task, row);
    }
  });
  return kDone;
}
