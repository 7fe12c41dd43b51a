// A convolution's three products of quantized images: sums of codes over the taps that padding leaves, the corrections
// made of them, and the product. A correction is a map of one sample, in which a missing tap counts as the value 0.
#include "common/parallel.h"
#include "common/platform.h"
#include "products/products.h"
#include "products/quantized.h"

using namespace fqt;

namespace {

// Which pixels of one axis a tap meets: meets[pixel · taps + tap].
struct Meetings {
  int64_t size, taps;
  Buffer<uint8_t> meets;

  const uint8_t* at(int64_t pixel) const { return meets.get() + pixel * taps; }
  bool same(int64_t a, int64_t b) const { return std::memcmp(at(a), at(b), taps) == 0; }
  int64_t count(int64_t tap) const {
    int64_t n = 0;
    for (int64_t i = 0; i < size; ++i) n += at(i)[tap];
    return n;
  }
};

// The two axes of a map.
struct Taps {
  Meetings rows, columns;
  bool there() const { return rows.meets && columns.meets; }
  int64_t taps() const { return rows.taps * columns.taps; }
  int64_t pixels() const { return rows.size * columns.size; }
};

// Of the output's pixels: tap t of pixel i reads i · stride + t · dilation − padding, if that is in the input.
Meetings of_output(int64_t out, int64_t in, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  Meetings m{out, taps, make_buffer<uint8_t>(out * taps)};
  for (int64_t i = 0; m.meets && i < out; ++i) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = i * stride + t * dilation - padding;
      m.meets[i * taps + t] = at >= 0 && at < in;
    }
  }
  return m;
}

// Of the input's pixels: whether some output pixel reads pixel i by tap t.
Meetings of_input(int64_t out, int64_t in, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  Meetings m{in, taps, make_buffer<uint8_t>(in * taps)};
  for (int64_t i = 0; m.meets && i < in; ++i) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = i + padding - t * dilation;
      m.meets[i * taps + t] = at >= 0 && at % stride == 0 && at / stride < out;
    }
  }
  return m;
}

Taps output_taps(const Conv& c) {
  return {of_output(c.out_height, c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height),
          of_output(c.out_width, c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width)};
}

Taps input_taps(const Conv& c) {
  return {of_input(c.out_height, c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height),
          of_input(c.out_width, c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width)};
}

// map (pixels, depth): the sum of by_tap (taps, depth) over the taps that a pixel meets. Most pixels meet the taps of
// their neighbour.
bool sum_over_taps(const Taps& t, const int64_t* by_tap, int64_t depth, int64_t* map) {
  const int64_t across = t.columns.taps, width = t.columns.size;
  Buffer<int64_t> line = make_buffer<int64_t>(across * depth);
  if (!line) return false;
  for (int64_t h = 0; h < t.rows.size; ++h) {
    int64_t* to = map + h * width * depth;
    if (h && t.rows.same(h, h - 1)) {
      std::memcpy(to, to - width * depth, width * depth * sizeof *to);
      continue;
    }
    std::memset(line.get(), 0, across * depth * sizeof *to);
    for (int64_t p = 0; p < t.rows.taps; ++p) {
      if (!t.rows.at(h)[p]) continue;
      for (int64_t j = 0; j < across * depth; ++j) line[j] += by_tap[p * across * depth + j];
    }
    for (int64_t w = 0; w < width; ++w, to += depth) {
      if (w && t.columns.same(w, w - 1)) {
        std::memcpy(to, to - depth, depth * sizeof *to);
        continue;
      }
      std::memset(to, 0, depth * sizeof *to);
      for (int64_t q = 0; q < across; ++q) {
        if (!t.columns.at(w)[q]) continue;
        for (int64_t j = 0; j < depth; ++j) to[j] += line[q * depth + j];
      }
    }
  }
  return true;
}

// by_tap (taps, depth): the sum of a map (pixels, depth) over the pixels that a tap meets.
bool sum_over_pixels(const Taps& t, const int64_t* map, int64_t depth, int64_t* by_tap) {
  const int64_t width = t.columns.size, across = t.columns.taps;
  Buffer<int64_t> lines = make_buffer<int64_t>(width * depth);
  if (!lines) return false;
  for (int64_t p = 0; p < t.rows.taps; ++p) {
    std::memset(lines.get(), 0, width * depth * sizeof *by_tap);
    for (int64_t h = 0; h < t.rows.size; ++h) {
      if (!t.rows.at(h)[p]) continue;
      for (int64_t j = 0; j < width * depth; ++j) lines[j] += map[h * width * depth + j];
    }
    int64_t* to = by_tap + p * across * depth;
    std::memset(to, 0, across * depth * sizeof *to);
    for (int64_t w = 0; w < width; ++w) {
      for (int64_t q = 0; q < across; ++q) {
        if (!t.columns.at(w)[q]) continue;
        for (int64_t j = 0; j < depth; ++j) to[q * depth + j] += lines[w * depth + j];
      }
    }
  }
  return true;
}

// by_tap (taps, channels): the sum of the weight's codes over the output channels that an input channel meets.
int sum_over_outputs(const uint8_t* weight, const Conv& c, int64_t taps, int64_t* by_tap, int threads) {
  if (c.groups == 1) return fqt_column_sums(weight, 1, c.out_channels, taps * c.channels, nullptr, by_tap, nullptr, threads);
  const int64_t in = c.channels / c.groups, rows = c.out_channels / c.groups, columns = taps * in;
  Buffer<int64_t> sums = make_buffer<int64_t>(columns);
  if (!sums) return kNoMemory;
  for (int64_t group = 0; group < c.groups; ++group) {
    const uint8_t* codes = weight + group * rows * columns;
    const int status = fqt_column_sums(codes, 1, rows, columns, nullptr, sums.get(), nullptr, threads);
    if (status != kDone) return status;
    for (int64_t t = 0; t < taps; ++t) {
      std::memcpy(by_tap + t * c.channels + group * in, sums.get() + t * in, in * sizeof *by_tap);
    }
  }
  return kDone;
}

inline uint8_t noise_plane(int32_t noise, int plane) {
  return static_cast<uint8_t>(noise >> (24 - kNoiseBits * (plane + 1)) & kNoiseRange.high);
}

// What the planes' sums stand for, as fractions again: rounded once.
inline double from_planes(const int64_t* sums, int64_t stride) {
  double total = 0;
  for (int k = 0; k < kNoisePlanes; ++k) total = total * (1 << kNoiseBits) + static_cast<double>(sums[k * stride]);
  return total * 0x1p-24;
}

}  // namespace

// The output, (samples, out_height, out_width, out_channels) floats of `type`. x: with `many` one step per sample; w
// (out_channels, kernel_height, kernel_width, channels ÷ groups), symmetric; bias or null. At least one entry each.
FQT_API int fqt_conv_output(const Quantized* x, const Quantized* w, const float* bias, const Conv* conv, int type,
                            void* out, int threads) {
  const Conv& c = *conv;
  const int64_t pixels = c.out_height * c.out_width, outputs = c.out_channels;
  Epilogue e{out, type, 0, outputs, pixels};
  e.row_scale = x->step, e.row_scale_step = x->many ? 1 : 0, e.bias = bias;
  e.column_scale = w->step, e.column_scale_step = w->many ? 1 : 0;
  Buffer<float> left, right;
  if (x->many || x->offset[0] != 0) {
    const Taps taps = output_taps(c);
    const int64_t n = taps.taps();
    Buffer<int64_t> by_tap = make_buffer<int64_t>(n * outputs), sums = make_buffer<int64_t>(n * outputs);
    Buffer<int64_t> map = make_buffer<int64_t>(pixels * outputs);
    left = make_buffer<float>(c.samples), right = make_buffer<float>(pixels * outputs);
    if (!taps.there() || !by_tap || !sums || !map || !left || !right) return kNoMemory;
    const int status = fqt_row_sums(w->codes, 1, outputs * n, c.channels / c.groups, sums.get(), threads);
    if (status != kDone) return status;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t t = 0; t < n; ++t) by_tap[t * outputs + o] = sums[o * n + t];
    }
    if (!sum_over_taps(taps, by_tap.get(), outputs, map.get())) return kNoMemory;
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t at = i * outputs + o;
        right[at] = static_cast<float>(map[at]) * w->step[w->many ? o : 0];
      }
    }
    for (int64_t s = 0; s < c.samples; ++s) left[s] = x->offset[x->many ? s : 0];
    e.rank = 1, e.left = left.get(), e.right = right.get();
  }
  return fqt_conv2d(x->codes, x->range(), w->codes, w->range(), conv, 0, &e, threads);
}

// The input's gradient, (samples, height, width, channels) floats of `type`. g (samples, out_height, out_width,
// out_channels): one step or one per sample, its noise along samples and along all else; w as above, its steps in g
// already if `folded`, else one. ones (height, width, channels), unless it is null, receives what a g of ones gives.
FQT_API int fqt_conv_grad_input(const Quantized* g, const Quantized* w, const Conv* conv, int folded, float* ones,
                                int type, void* out, int threads) {
  const Conv& c = *conv;
  const Taps taps = input_taps(c);
  const int64_t pixels = c.height * c.width, size = pixels * c.channels, n = taps.taps();
  const int rank = g->row_noise ? 2 : 1;
  Buffer<int64_t> by_tap = make_buffer<int64_t>(n * c.channels), map = make_buffer<int64_t>(size);
  Buffer<float> left = make_buffer<float>(rank * c.samples), right = make_buffer<float>(rank * size);
  if (!taps.there() || !by_tap || !map || !left || !right) return kNoMemory;
  int status = sum_over_outputs(w->codes, c, n, by_tap.get(), threads);
  if (status != kDone) return status;
  if (!sum_over_taps(taps, by_tap.get(), c.channels, map.get())) return kNoMemory;
  for (int64_t i = 0; i < size; ++i) right[i] = static_cast<float>(map[i]);
  if (rank == 2) {
    const int64_t plane = c.out_height * c.out_width * c.out_channels;
    Buffer<uint8_t> planes = make_buffer<uint8_t>(kNoisePlanes * plane);
    Buffer<int64_t> sums = make_buffer<int64_t>(kNoisePlanes * size);
    if (!planes || !sums) return kNoMemory;
    for (int k = 0; k < kNoisePlanes; ++k) {
      for (int64_t j = 0; j < plane; ++j) planes[k * plane + j] = noise_plane(noise_integer(g->column_noise[j]), k);
    }
    Conv of_planes = c;
    of_planes.samples = kNoisePlanes;
    const Epilogue exact{sums.get(), kInt64, 0, c.channels, pixels};
    status = fqt_conv2d(planes.get(), kNoiseRange, w->codes, w->range(), &of_planes, 1, &exact, threads);
    if (status != kDone) return status;
    for (int64_t i = 0; i < size; ++i) {
      right[size + i] = static_cast<float>(from_planes(sums.get() + i, size));
    }
  }
  for (int64_t i = 0; !folded && i < rank * size; ++i) right[i] *= w->step[0];
  for (int64_t s = 0; s < c.samples; ++s) {
    const float step = g->step[g->many ? s : 0], offset = g->offset[g->many ? s : 0];
    left[rank * s] = g->row_noise ? with_noise(offset, step, g->row_noise[s]) : offset;
    if (rank == 2) left[rank * s + 1] = -step;
  }
  if (ones) std::memcpy(ones, right.get(), size * sizeof(float));
  Epilogue e{out, type, rank, c.channels, pixels};
  e.row_scale = g->step, e.row_scale_step = g->many ? 1 : 0, e.column_scale = folded ? nullptr : w->step;
  e.left = left.get(), e.right = right.get();
  return fqt_conv2d(g->codes, g->range(), w->codes, w->range(), conv, 1, &e, threads);
}

namespace {

// What the weight gradient's columns need, made of the sums of its planes: of ones and, with dither, of those of the
// pixels' noise. Columns are (tap, channel).
struct Windows {
  double step, offset;     // of the input
  int64_t columns, channels;  // of one group
  const int64_t *met;      // (taps,): Σ over the pixels of all samples that a tap serves of the samples' weights
  const int64_t *totals;   // (taps,): the same times their noise; null without dither
  int64_t* sums;           // of the planes
  float* right;            // (rank, columns): Σ of the values that a tap reads, plain and weighted by noise

  static void ready(void* state, int64_t first, int64_t last) {
    const Windows& s = *static_cast<const Windows*>(state);
    for (int64_t j = first; j < last; ++j) {
      const int64_t tap = j / s.channels;
      s.right[j] = static_cast<float>(s.step * static_cast<double>(s.sums[j]) + s.offset * static_cast<double>(s.met[tap]));
      if (!s.totals) continue;
      const double weighted = from_planes(s.sums + s.columns + j, s.columns);
      const double total = static_cast<double>(s.totals[tap]) * 0x1p-24;
      s.right[s.columns + j] = static_cast<float>(s.step * weighted + s.offset * total);
    }
  }
};

}  // namespace

// The weight's gradient, (out_channels, kernel_height, kernel_width, channels ÷ groups) float32. g (samples · out_height ·
// out_width, out_channels), unsigned: one step or one per column, its noise along pixels and along channels; x: one
// step, or folded ones, with a centre per sample.
FQT_API int fqt_conv_grad_weight(const Quantized* g, const Quantized* x, const Conv* conv, const Fold* fold, float* out,
                                 int threads) {
  const Conv& c = *conv;
  const Taps serves = output_taps(c);
  const int64_t n = serves.taps(), channels = c.channels / c.groups, columns = n * channels, outputs = c.out_channels;
  const int64_t places = c.out_height * c.out_width, tokens = c.samples * places;
  const float x_step = fold->step(*x), x_offset = fold->offset(*x);
  const bool dithered = g->row_noise, shifted = x_offset != 0;
  const int rank = 1 + dithered, count = 1 + (dithered ? kNoisePlanes : 0);
  Buffer<uint8_t> codes = make_buffer<uint8_t>(count * tokens);
  Buffer<int64_t> sums = make_buffer<int64_t>(count * columns), by_tap = make_buffer<int64_t>(n * outputs);
  Buffer<int64_t> summed = make_buffer<int64_t>(2 * places * outputs), met = make_buffer<int64_t>(n);
  Buffer<int64_t> totals = make_buffer<int64_t>(n);
  Buffer<float> left = make_buffer<float>((rank + 1) * outputs), right = make_buffer<float>(rank * columns);
  Buffer<int32_t> zero = make_buffer<int32_t>(outputs);
  if (!serves.there() || !codes || !sums || !by_tap || !summed || !met || !totals || !left || !right || !zero) {
    return kNoMemory;
  }
  int64_t weights = 0;
  for (int64_t s = 0; s < c.samples; ++s) weights += fold->weight(s);
  for (int64_t t = 0; t < n; ++t) {
    met[t] = weights * serves.rows.count(t / c.kernel_width) * serves.columns.count(t % c.kernel_width);
  }
  std::memset(codes.get(), 1, tokens);
  if (dithered) {
    std::memset(summed.get(), 0, places * sizeof(int64_t));
    for (int64_t s = 0; s < c.samples; ++s) {
      const float* noise = g->row_noise + s * places;
      uint8_t* plane = codes.get() + tokens + s * places;
      for (int64_t i = 0; i < places; ++i) {
        const int32_t integer = noise_integer(noise[i]);
        summed[i] += fold->weight(s) * integer;
        for (int k = 0; k < kNoisePlanes; ++k) plane[k * tokens + i] = noise_plane(integer, k);
      }
    }
    if (!sum_over_pixels(serves, summed.get(), 1, totals.get())) return kNoMemory;
  }
  Windows windows{x_step, x_offset, columns, channels, met.get(), dithered ? totals.get() : nullptr,
                  sums.get(), right.get()};
  const int32_t high = dithered ? kNoiseRange.high : 1;
  const Planes planes{codes.get(), count, high, sums.get(), Windows::ready, &windows};
  float* scale = left.get() + rank * outputs;
  for (int64_t o = 0; o < outputs; ++o) {
    const Channel channel = Channel::of(*g, o);
    scale[o] = channel.step, zero[o] = channel.zero;
    left[rank * o] = channel.rest;
    if (dithered) left[rank * o + 1] = -channel.step;
  }
  Epilogue e{out, kFloat32, rank, columns, 1};
  e.row_scale = scale, e.row_scale_step = 1, e.column_scale = &x_step;
  e.left = left.get(), e.right = right.get(), e.zero = zero.get(), e.zero_step = 1, e.ones = sums.get();
  int status = conv_grad_weight(g->codes, g->range(), x->codes, x->range(), conv, &planes, &e, threads);
  if (status != kDone || !(shifted || fold->share)) return status;
  // What meets every code of g that a tap serves is one number per tap and channel, added last.
  if (shifted) {
    int64_t* weighted = fold->centre ? summed.get() + places * outputs : nullptr;
    status = fqt_column_sums(g->codes, 0, c.samples, places * outputs, fold->centre, summed.get(), weighted, threads);
    if (status != kDone) return status;
    if (!sum_over_pixels(serves, weighted ? weighted : summed.get(), outputs, by_tap.get())) return kNoMemory;
  }
  parallel_for(outputs, outputs * columns, threads, [&](int64_t o) {
    for (int64_t t = 0; t < n; ++t) {
      float add = shifted ? static_cast<float>(by_tap[t * outputs + o] - zero[o] * met[t]) * (scale[o] * x_offset) : 0.0f;
      if (fold->share) add = shifted ? add + fold->share[t * outputs + o] : fold->share[t * outputs + o];
      float* to = out + o * columns + t * channels;
      for (int64_t j = 0; j < channels; ++j) to[j] += add;
    }
  });
  return kDone;
}
