// Where the pixels of a convolution's output, or of its gradient for the input, read the other map at every tap.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "products/epilogue.h"

namespace fqt {

constexpr int64_t kBlockRows = 96;  // pixels at a time
constexpr int64_t kMaxTaps = 1 << 12;

// One axis of a phase: its pixels first, first + step, …, each reading scale · i + offset[t] at tap index[t].
struct Axis {
  int64_t first, step, count, scale, taps;
  int64_t index[kMaxTaps], offset[kMaxTaps];
};

inline void output_axis(int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, Axis* axis) {
  axis->first = 0, axis->step = 1, axis->count = out, axis->scale = stride, axis->taps = kernel;
  for (int64_t t = 0; t < kernel; ++t) axis->index[t] = t, axis->offset[t] = t * dilation - padding;
}

// Of grad_input: the pixels h ≡ phase modulo stride; tap t reads grad_output at (h + padding − t · dilation)/stride
// where that is an integer.
inline void input_axis(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t phase,
                Axis* axis) {
  axis->first = phase, axis->step = stride, axis->scale = 1, axis->taps = 0;
  axis->count = phase < size ? ceil_div(size - phase, stride) : 0;
  for (int64_t t = kernel; t-- > 0;) {
    const int64_t numerator = phase + padding - t * dilation;
    if (numerator % stride) continue;
    axis->index[axis->taps] = t;
    axis->offset[axis->taps++] = numerator / stride;
  }
}

// The map that is read: (pixels, groups, depth), of codes or of operands made of them.
template <class T>
struct Source {
  const T* pixels;
  int64_t samples, height, width, groups, depth;
  const T* missing;  // (depth,) of code 0
};

// The pixels of a phase, and the map that they belong to.
struct Phase {
  const Axis &rows, &columns;
  int64_t samples, height, width;

  int64_t taps() const { return rows.taps * columns.taps; }
  int64_t pixels() const { return samples * rows.count * columns.count; }
};

// Where the pixels first … first + n − 1 go, and what they read at every tap of a group. Runs of
// pixels on one line read at equal distances.
template <class T>
void locate(const Phase& phase, const Source<T>& s, int64_t group, int64_t first, int64_t n, Place* places,
            const T** table) {
  const int64_t pixel = s.groups * s.depth, scale = phase.columns.scale;
  for (int64_t i = 0; i < n;) {
    const int64_t w = (first + i) % phase.columns.count, line = (first + i) / phase.columns.count;
    const int64_t h = line % phase.rows.count, sample = line / phase.rows.count;
    const int64_t run = phase.columns.count - w < n - i ? phase.columns.count - w : n - i;
    const int64_t out_line = (sample * phase.height + phase.rows.first + h * phase.rows.step) * phase.width;
    for (int64_t r = 0; r < run; ++r) {
      places[i + r] = {out_line + phase.columns.first + (w + r) * phase.columns.step, sample};
    }
    const T** to = table + i;
    for (int64_t p = 0; p < phase.rows.taps; ++p) {
      const int64_t y = h * phase.rows.scale + phase.rows.offset[p];
      const bool inside = y >= 0 && y < s.height;
      const T* row = s.pixels + (sample * s.height + y) * s.width * pixel + group * s.depth;
      for (int64_t q = 0; q < phase.columns.taps; ++q, to += kBlockRows) {
        const int64_t x = w * scale + phase.columns.offset[q];
        // x + r · scale lies in 0 … width − 1 for begin ≤ r < end.
        int64_t begin = x < 0 ? ceil_div(-x, scale) : 0, end = x < s.width ? ceil_div(s.width - x, scale) : 0;
        begin = !inside || begin > run ? run : begin;
        end = end > run ? run : end < begin ? begin : end;
        for (int64_t r = 0; r < begin; ++r) to[r] = s.missing;
        for (int64_t r = begin; r < end; ++r) to[r] = row + (x + r * scale) * pixel;
        for (int64_t r = end; r < run; ++r) to[r] = s.missing;
      }
    }
    i += run;
  }
}

}  // namespace fqt
