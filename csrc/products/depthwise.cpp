// Depthwise convolution of codes (see depthwise.h): a vector of channels times a vector of their weights at every tap.
//
// Codes are widened to 32 bits, and multiplied as pairs of 16 bits of which one is zero: a multiplication of 32 bits
// costs twice as much. What is read at every tap comes from the table of pointers that other convolutions use.
#include "products/depthwise.h"

#include <atomic>
#include <memory>
#include <new>

#include "common/memory.h"
#include "common/platform.h"

using namespace fqt;

namespace {

constexpr int64_t kRows = 16;    // pixels whose sums are finished together
constexpr int64_t kAtOnce = 4;   // pixels that share a weight's load
constexpr int kMostTaps = 8;     // of a row of the kernel, summed in registers

#if defined(__SSE2__)
// A code with its upper half zero, and its product with another of any sign.
inline vi low_half(vi code) { return code & splat(0xffff); }
inline vi times(vi code, vi low) {
#if defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)code, (__m512i)low);
#elif defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)code, (__m256i)low);
#else
  return (vi)_mm_madd_epi16((__m128i)code, (__m128i)low);
#endif
}
#else
inline vi low_half(vi code) { return code; }
inline vi times(vi code, vi low) { return code * low; }
#endif

template <bool Signed>
inline vi codes_at(const uint8_t* from, int64_t n) {
  return from_bytes<Signed>(n == W ? load<vb>(from) : load_part<vb>(from, n));
}

// Sums over all taps for P pixels × V vectors of channels, sums' rows kPanel apart. weights: [tap][width].
template <bool Signed, int P, int V>
inline void sum_whole(const uint8_t* const* table, int64_t taps, int64_t channel, const int32_t* weights, int64_t width,
                      int32_t* sums) {
  vi c[P][V] = {};
  for (int64_t t = 0; t < taps; ++t, table += kBlockRows, weights += width) {
    vi w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = load<vi>(weights + channel + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) {
      const uint8_t* from = table[i] + channel;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) c[i][v] += times(from_bytes<Signed>(load<vb>(from + v * W)), w[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sums + i * kPanel + v * W, c[i][v]);
  }
}

template <bool Signed, int V>
void sum_rows(const uint8_t* const* table, int64_t rows, int64_t taps, int64_t channel, const int32_t* weights,
              int64_t width, int32_t* sums) {
  int64_t i = 0;
  for (; i + kAtOnce <= rows; i += kAtOnce) {
    sum_whole<Signed, kAtOnce, V>(table + i, taps, channel, weights, width, sums + i * kPanel);
  }
  for (; i < rows; ++i) sum_whole<Signed, 1, V>(table + i, taps, channel, weights, width, sums + i * kPanel);
}

// The last n < W channels, from `channel` on: read with those before them, if there are so many.
template <bool Signed>
void sum_last(const uint8_t* const* table, int64_t rows, int64_t taps, int64_t channel, int64_t n,
              const int32_t* weights, int64_t width, int32_t* sums) {
  const int64_t before = channel + n < W ? 0 : W - n, wide = before + n;
  for (int64_t i = 0; i < rows; ++i, ++table, sums += kPanel) {
    vi sum{};
    for (int64_t t = 0; t < taps; ++t) {
      const vi code = codes_at<Signed>(table[t * kBlockRows] + channel - before, wide);
      sum += times(code, load<vi>(weights + t * width + channel - before));
    }
    int32_t lanes[W];
    store(lanes, sum);
    std::memcpy(sums, lanes + before, n * sizeof *sums);
  }
}

// Sums of n ≤ kPanel channels for at most kRows pixels.
template <bool Signed>
void sum_panel(const uint8_t* const* table, int64_t rows, int64_t taps, int64_t channel, int64_t n,
               const int32_t* weights, int64_t width, int32_t* sums) {
  int64_t done = 0;
  if (n == kPanel) return sum_rows<Signed, kVectors>(table, rows, taps, channel, weights, width, sums);
  for (; done + W <= n; done += W) {
    sum_rows<Signed, 1>(table, rows, taps, channel + done, weights, width, sums + done);
  }
  if (done < n) sum_last<Signed>(table, rows, taps, channel + done, n - done, weights, width, sums + done);
}

// [tap][width] of a phase's taps, as `times` takes them; zeros beyond the last channel.
Buffer<int32_t> pack_weights(const uint8_t* weight, int64_t weight_taps, int64_t across, const Phase& phase,
                             int64_t channels, int64_t width) {
  Buffer<int32_t> packed = make_buffer<int32_t>(phase.taps() * width);
  if (!packed) return packed;
  int32_t* to = packed.get();
  for (int64_t p = 0; p < phase.rows.taps; ++p) {
    for (int64_t q = 0; q < phase.columns.taps; ++q, to += width) {
      const uint8_t* from = weight + phase.rows.index[p] * across + phase.columns.index[q];
      for (int64_t c = 0; c < width; ++c) to[c] = c < channels ? static_cast<int8_t>(from[c * weight_taps]) : 0;
      for (int64_t c = 0; c < width; c += W) store(to + c, low_half(load<vi>(to + c)));
    }
  }
  return packed;
}

}  // namespace

int fqt::depthwise_phase(const Source<uint8_t>& source, bool is_signed, const uint8_t* weight, int64_t weight_taps,
                         int64_t across, const Phase& phase, const Epilogue& e, int threads) {
  const int64_t channels = source.depth, width = ceil_div(channels, W) * W + W, taps = phase.taps();
  const Buffer<int32_t> weights = pack_weights(weight, weight_taps, across, phase, channels, width);
  if (!weights) return kNoMemory;
  const auto sum = is_signed ? sum_panel<true> : sum_panel<false>;
  const int64_t blocks = ceil_div(phase.pixels(), kBlockRows);
  std::atomic<bool> failed{false};
  parallel_for(blocks, phase.pixels() * channels * (taps + 1) / 16, threads, [&](int64_t block) {
    const int64_t first = block * kBlockRows;
    const int64_t n = phase.pixels() - first < kBlockRows ? phase.pixels() - first : kBlockRows;
    alignas(64) int32_t sums[kRows * kPanel];
    Place places[kBlockRows];
    const Buffer<const uint8_t*> table = make_buffer<const uint8_t*>(taps * kBlockRows);
    if (!table) {
      failed = true;
      return;
    }
    locate(phase, source, 0, first, n, places, table.get());
    for (int64_t i = 0; i < n; i += kRows) {
      const int64_t rows = n - i < kRows ? n - i : kRows;
      for (int64_t c = 0; c < channels; c += kPanel) {
        const int64_t now = channels - c < kPanel ? channels - c : kPanel;
        sum(table.get() + i, rows, taps, c, now, weights.get(), width, sums);
        write_rows(e, sums, rows, Listed{places + i}, c, now);
      }
    }
  });
  return failed.load() ? kNoMemory : kDone;
}

namespace {

// The weight's gradient: sums of a thread's lines, [tap][vector][W]. The last vector begins W before the last channel,
// if there are so many.
struct Part {
  Buffer<int32_t> sums;
  Buffer<int64_t> total;
};

struct Task {
  const Conv& c;
  const uint8_t *grad, *input;

  int64_t taps() const { return c.kernel_height * c.kernel_width; }
  int64_t vectors() const { return ceil_div(c.channels, W); }
  int64_t size() const { return taps() * vectors() * W; }
  int64_t first(int64_t vector) const {
    const int64_t at = vector * W, last = c.channels - W;
    return last < 0 ? 0 : at < last ? at : last;
  }
  int64_t width() const { return c.channels < W ? c.channels : W; }
};

// sums[q · step] += Σ over n pixels of grad · input at tap q, for Q neighbouring taps.
template <bool GradSigned, bool InputSigned, int Q>
inline void add_pixels(const uint8_t* grad, int64_t grad_step, const uint8_t* input, int64_t input_step,
                       int64_t tap_step, int64_t n, int64_t width, int32_t* sums, int64_t step) {
  vi c[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) c[q] = load<vi>(sums + q * step);
  for (int64_t i = 0; i < n; ++i, grad += grad_step, input += input_step) {
    const vi g = low_half(codes_at<GradSigned>(grad, width));
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) c[q] += times(codes_at<InputSigned>(input + q * tap_step, width), g);
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) store(sums + q * step, c[q]);
}

template <bool GradSigned, bool InputSigned, int Q = kMostTaps>
void add_taps(int64_t taps, const uint8_t* grad, int64_t grad_step, const uint8_t* input, int64_t input_step,
              int64_t tap_step, int64_t n, int64_t width, int32_t* sums, int64_t step) {
  if constexpr (Q > 1) {
    if (taps < Q) {
      return add_taps<GradSigned, InputSigned, Q - 1>(taps, grad, grad_step, input, input_step, tap_step, n, width, sums,
                                                      step);
    }
  }
  if (width == W) {
    add_pixels<GradSigned, InputSigned, Q>(grad, grad_step, input, input_step, tap_step, n, W, sums, step);
  } else {
    add_pixels<GradSigned, InputSigned, Q>(grad, grad_step, input, input_step, tap_step, n, width, sums, step);
  }
}

// One line of grad_output on one line of the input, for a vector of channels and taps q … q + count − 1 of a row of
// the kernel; the pixels where all of them are inside together, the others tap by tap.
template <bool GradSigned, bool InputSigned>
void add_line(const Task& task, const uint8_t* grad, const uint8_t* input, int64_t q, int64_t count, int32_t* sums) {
  const Conv& c = task.c;
  const int64_t stride = c.stride_width, step = task.vectors() * W, tap_step = c.dilation_width * c.channels;
  int64_t begin[kMostTaps], end[kMostTaps], from = 0, to = c.out_width;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = (q + k) * c.dilation_width - c.padding_width;
    begin[k] = at < 0 ? ceil_div(-at, stride) : 0;
    end[k] = at < c.width ? ceil_div(c.width - at, stride) : 0;
    if (end[k] > c.out_width) end[k] = c.out_width;
    if (from < begin[k]) from = begin[k];
    if (to > end[k]) to = end[k];
  }
  const auto add = [&](int64_t k, int64_t taps, int64_t first, int64_t last) {
    if (first >= last) return;
    const int64_t at = (q + k) * c.dilation_width - c.padding_width + first * stride;
    add_taps<GradSigned, InputSigned>(taps, grad + first * c.channels, c.channels, input + at * c.channels,
                                      stride * c.channels, tap_step, last - first, task.width(), sums + k * step, step);
  };
  if (from > to) from = to = c.out_width;  // nowhere all of them
  add(0, count, from, to);
  for (int64_t k = 0; k < count; ++k) {
    add(k, 1, begin[k], end[k] < from ? end[k] : from);
    add(k, 1, begin[k] > to ? begin[k] : to, end[k]);
  }
}

template <bool GradSigned, bool InputSigned>
void run_lines(const Task& task, int64_t first, int64_t last, Part* part) {
  const Conv& c = task.c;
  const int64_t size = task.size(), step = task.vectors() * W;
  std::memset(part->sums.get(), 0, size * sizeof(int32_t));
  std::memset(part->total.get(), 0, size * sizeof(int64_t));
  int64_t terms = 0;
  const auto widen = [&] {
    for (int64_t i = 0; i < size; ++i) part->total[i] += part->sums[i];
    std::memset(part->sums.get(), 0, size * sizeof(int32_t));
    terms = 0;
  };
  for (int64_t line = first; line < last; ++line) {
    if (terms + c.out_width > kMaxTerms) widen();
    terms += c.out_width;
    const int64_t sample = line / c.out_height, h = line % c.out_height;
    const uint8_t* grad = task.grad + line * c.out_width * c.channels;
    for (int64_t v = 0; v < task.vectors(); ++v) {
      for (int64_t p = 0; p < c.kernel_height; ++p) {
        const int64_t y = h * c.stride_height + p * c.dilation_height - c.padding_height;
        if (y < 0 || y >= c.height) continue;
        const uint8_t* input = task.input + (sample * c.height + y) * c.width * c.channels + task.first(v);
        for (int64_t q = 0; q < c.kernel_width; q += kMostTaps) {
          const int64_t count = c.kernel_width - q < kMostTaps ? c.kernel_width - q : kMostTaps;
          int32_t* sums = part->sums.get() + (p * c.kernel_width + q) * step + v * W;
          add_line<GradSigned, InputSigned>(task, grad + task.first(v), input, q, count, sums);
        }
      }
    }
  }
  widen();
}

}  // namespace

int fqt::depthwise_grad_weight(const uint8_t* grad, bool grad_signed, const uint8_t* input, bool input_signed,
                               const Conv& c, const Epilogue& e, int threads) {
  const Task task{c, grad, input};
  const int64_t lines = c.samples * c.out_height, taps = task.taps(), step = task.vectors() * W;
  const int64_t work = lines * c.out_width * c.channels * taps / 16;
  int64_t parts = threads < lines ? threads : lines;
  if (parts > work / kGrain) parts = work / kGrain;
  if (parts < 1) parts = 1;
  std::unique_ptr<Part[]> part(new (std::nothrow) Part[parts]);
  if (!part) return kNoMemory;
  for (int64_t i = 0; i < parts; ++i) {
    part[i] = {make_buffer<int32_t>(task.size()), make_buffer<int64_t>(task.size())};
    if (!part[i].sums || !part[i].total) return kNoMemory;
  }
  const auto run = grad_signed ? (input_signed ? run_lines<true, true> : run_lines<true, false>)
                               : (input_signed ? run_lines<false, true> : run_lines<false, false>);
  parallel_for(parts, work, threads, [&](int64_t i) {
    run(task, lines * i / parts, lines * (i + 1) / parts, &part[i]);
  });
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    const int64_t vector = channel / W, at = vector * W + channel - task.first(vector);
    for (int64_t first = 0; first < taps; first += kPanel) {
      const int64_t n = taps - first < kPanel ? taps - first : kPanel;
      int64_t sums[kPanel] = {};
      for (int64_t i = 0; i < parts; ++i) {
        for (int64_t t = 0; t < n; ++t) sums[t] += part[i].total[(first + t) * step + at];
      }
      write_row(e, sums, Place{channel, channel}, first, n);
    }
  }
  return kDone;
}
