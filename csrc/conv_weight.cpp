// The gradient of a convolution for its weight, on 8-bit codes: for every tap the product of grad_output's and the
// input's channels over all pixels.
//
// The contraction runs over pixels, and in channels-last codes neighbouring pixels' channels interleave into the
// layout of the inner kernel at the speed of a copy. Each thread takes a share of the lines of pixels with sums of
// its own; the result is cut into chunks of panels whose sums stay in the second-level cache. The columns are
// (tap, channel) pairs, so that few channels still fill a panel.
#include <atomic>

#include "conv.h"
#include "dot.h"
#include "epilogue.h"
#include "pack.h"
#include "parallel.h"
#include "platform.h"

using namespace fqt;

namespace {

constexpr int64_t kBlockPixels = 512;
constexpr int64_t kChunkBytes = 384 << 10;

struct Task {
  const Conv& c;
  const uint8_t *grad, *input;
  LeftReader read_grad;
  RightReader read_input;
  int64_t group;

  int64_t outputs() const { return c.out_channels / c.groups; }
  int64_t inputs() const { return c.channels / c.groups; }
  int64_t columns() const { return c.kernel_height * c.kernel_width * inputs(); }
  int64_t padded() const { return ceil_div(outputs(), 16) * 16; }
  int64_t groups_per_line() const { return ceil_div(c.out_width, kGroup); }
  int64_t lines() const { return c.samples * c.out_height; }
};

// One thread's sums of a chunk of panels.
struct Part {
  Buffer<int32_t> sums;         // [panel][padded output][kPanel]
  Buffer<int64_t> total;        // the same, for more than kMaxTerms terms; else null
  Buffer<int64_t> left_sums;    // (outputs,) Σ of grad_output's operands
  Buffer<int64_t> right_sums;   // (panels · kPanel,) Σ of the input's
};

// grad_output of a run of lines: [group of pixels][output][kGroup], zeros beyond a line's end.
void pack_grad(const Task& task, int64_t first_line, int64_t lines, int64_t padded, Left* out) {
  const int64_t pixel = task.c.out_channels, width = task.c.out_width;
  for (int64_t line = first_line; line < first_line + lines; ++line) {
    const uint8_t* from = task.grad + line * width * pixel + task.group * task.outputs();
    for (int64_t g = 0; g < task.groups_per_line(); ++g, out += padded * kGroup) {
      const uint8_t* row[kGroup];
      const int64_t n = width - g * kGroup < kGroup ? width - g * kGroup : kGroup;
      for (int64_t j = 0; j < n; ++j) row[j] = from + (g * kGroup + j) * pixel;
      interleave_rows<Left>(row, n, task.outputs(), padded, 0, task.read_grad, out);
    }
  }
}

// The input under columns first … first + kPanel − 1 of a run of lines: [group of pixels][kPanel][kGroup]. Missing
// taps hold code 0, what is beyond a line's end or the last column holds zeros.
void pack_input(const Task& task, int64_t first_line, int64_t lines, int64_t first, Right* out) {
  const Conv& c = task.c;
  const int64_t last = first + kPanel < task.columns() ? first + kPanel : task.columns();
  static const uint8_t no_pixel[kPanel] = {};
  for (int64_t column = first; column < last;) {
    const int64_t tap = column / task.inputs(), channel = column % task.inputs();
    const int64_t n = task.inputs() - channel < last - column ? task.inputs() - channel : last - column;
    const int64_t tap_h = tap / c.kernel_width * c.dilation_height - c.padding_height;
    const int64_t tap_w = tap % c.kernel_width * c.dilation_width - c.padding_width;
    Right* to = out + (column - first) * kGroup;
    for (int64_t line = first_line; line < first_line + lines; ++line) {
      const int64_t h = line % c.out_height * c.stride_height + tap_h;
      const bool inside = h >= 0 && h < c.height;
      const uint8_t* from = task.input + (line / c.out_height * c.height + h) * c.width * c.channels +
                            task.group * task.inputs() + channel;
      for (int64_t g = 0; g < task.groups_per_line(); ++g, to += kPanel * kGroup) {
        const uint8_t* row[kGroup];
        const int64_t pixels = c.out_width - g * kGroup < kGroup ? c.out_width - g * kGroup : kGroup;
        for (int64_t j = 0; j < kGroup; ++j) {
          const int64_t w = (g * kGroup + j) * c.stride_width + tap_w;
          row[j] = inside && w >= 0 && w < c.width ? from + w * c.channels : no_pixel;
        }
        interleave_group(row, n, task.read_input, to);
        for (int64_t j = pixels; j < kGroup; ++j) {
          for (int64_t i = 0; i < n; ++i) to[i * kGroup + j] = 0;
        }
      }
    }
    column += n;
  }
  if (last - first < kPanel) {
    const int64_t groups = lines * task.groups_per_line(), used = (last - first) * kGroup;
    for (int64_t g = 0; g < groups; ++g) {
      std::memset(out + g * kPanel * kGroup + used, 0, (kPanel * kGroup - used) * sizeof(Right));
    }
  }
}

void sum_rows(const Left* packed, int64_t groups, int64_t padded, int64_t outputs, int64_t* sums) {
  for (int64_t i = 0; i < outputs; i += W) {
    vi sum{};
    for (int64_t g = 0; g < groups; ++g) sum = dot(sum, load<vi>(packed + (g * padded + i) * kGroup), ones());
    for (int64_t j = 0; j < W && i + j < outputs; ++j) sums[i + j] += sum[j];
  }
}

// Adds lines first … last − 1 of panels first_panel … first_panel + panels − 1 to a part.
bool run_part(const Task& task, int64_t first, int64_t last, int64_t first_panel, int64_t panels, Part* part) {
  const int64_t outputs = task.outputs(), padded = task.padded(), per_line = task.groups_per_line();
  int64_t step = per_line ? kBlockPixels / (per_line * kGroup) : 1;
  step = step < 1 ? 1 : step;
  Buffer<Left> left = make_buffer<Left>((step * per_line * kGroup + kTerms) * padded);
  Buffer<Right> right = make_buffer<Right>((step * per_line * kGroup + kTerms) * kPanel);
  const int64_t size = panels * padded * kPanel;
  const bool wide = (last - first) * per_line * kGroup > kMaxTerms;
  part->sums = make_buffer<int32_t>(size);
  if (wide) part->total = make_buffer<int64_t>(size);
  part->left_sums = make_buffer<int64_t>(outputs);
  part->right_sums = make_buffer<int64_t>(panels * kPanel);
  if (!left || !right || !part->sums || !part->left_sums || !part->right_sums) return false;
  if (wide) {
    if (!part->total) return false;
    std::memset(part->total.get(), 0, size * sizeof(int64_t));
  }
  if (first == last || per_line == 0) std::memset(part->sums.get(), 0, size * sizeof(int32_t));
  for (int64_t i = 0; i < outputs; ++i) part->left_sums[i] = 0;
  for (int64_t i = 0; i < panels * kPanel; ++i) part->right_sums[i] = 0;
  const Signs signs{task.read_grad.is_signed, task.read_input.is_signed};
  int64_t terms = 0;  // in sums
  const auto widen = [&] {
    for (int64_t i = 0; terms && i < size; ++i) part->total[i] += part->sums[i];
    terms = 0;
  };
  for (int64_t line = first; line < last; line += step) {
    const int64_t lines = last - line < step ? last - line : step, groups = lines * per_line;
    if (terms + groups * kGroup > kMaxTerms) widen();
    pack_grad(task, line, lines, padded, left.get());
    if (task.read_input.shift()) sum_rows(left.get(), groups, padded, outputs, part->left_sums.get());
    const int64_t all = ceil_div(groups * kGroup, kTerms) * kTerms / kGroup;
    std::memset(left.get() + groups * padded * kGroup, 0, (all - groups) * padded * kGroup * sizeof(Left));
    finish_interleaved(all, padded, left.get());
    for (int64_t p = 0; p < panels; ++p) {
      pack_input(task, line, lines, (first_panel + p) * kPanel, right.get());
      if (task.read_grad.shift()) sum_columns(right.get(), groups, part->right_sums.get() + p * kPanel);
      block_of(LeftInterleaved{left.get(), padded * kGroup}, signs, outputs, 1, groups, right.get(),
               part->sums.get() + p * padded * kPanel, terms != 0, [](int64_t, int64_t) {});
    }
    terms += groups * kGroup;
  }
  if (wide) widen();
  return true;
}

}  // namespace

// The weight's gradient from codes of grad_output and input: rows are output channels, columns
// (kernel_height, kernel_width, channels ÷ groups); finished by *e with period 1. Missing taps count as code 0.
// Exact: partial sums of at most kMaxTerms products in int32, added up in int64. Contract, checked by the caller: a
// line of the output has at most kMaxTerms pixels; kInt32 only where the exact sum fits.
FQT_API int fqt_conv2d_grad_weight(const uint8_t* grad, int grad_signed, const uint8_t* input, int input_signed,
                                   const Conv* conv, const Epilogue* e, int threads) {
  const Conv& c = *conv;
  for (int64_t group = 0; group < c.groups; ++group) {
    const Task task{c, grad, input, LeftReader{grad_signed != 0}, RightReader{input_signed != 0}, group};
    // As in matmul.cpp: Σ ab = Σ (a + s)(b − t) + t·Σ (a + s) − s·Σ (b − t) − pixels·s·t.
    const int64_t s = task.read_grad.shift(), t = -task.read_input.shift(), outputs = task.outputs();
    const int64_t columns = task.columns(), panels = ceil_div(columns, kPanel), lines = task.lines();
    if (outputs == 0 || columns == 0) return kDone;
    const int64_t pixels = lines * c.out_width, work = pixels * outputs * columns / 256;
    int64_t chunk = kChunkBytes / (outputs * kPanel * 4);
    chunk = chunk < 1 ? 1 : chunk > panels ? panels : chunk;
    int64_t parts = threads < lines ? threads : lines;
    if (parts > work / kGrain) parts = work / kGrain;
    if (parts < 1) parts = 1;
    std::unique_ptr<Part[]> part(new (std::nothrow) Part[parts]);
    if (!part) return kNoMemory;
    for (int64_t first_panel = 0; first_panel < panels; first_panel += chunk) {
      const int64_t now = panels - first_panel < chunk ? panels - first_panel : chunk;
      std::atomic<bool> failed{false};
      parallel_for(parts, work, threads, [&](int64_t i) {
        if (!run_part(task, lines * i / parts, lines * (i + 1) / parts, first_panel, now, &part[i])) failed = true;
      });
      if (failed) return kNoMemory;
      parallel_for(outputs, outputs * now * kPanel, threads, [&](int64_t row) {
        int64_t left_sum = 0;
        for (int64_t i = 0; i < parts; ++i) left_sum += part[i].left_sums[row];
        for (int64_t p = 0; p < now; ++p) {
          const int64_t first = (first_panel + p) * kPanel, n = columns - first < kPanel ? columns - first : kPanel;
          int64_t sums[kPanel];
          for (int64_t j = 0; j < kPanel; ++j) {
            int64_t sum = t * left_sum - pixels * s * t;
            for (int64_t i = 0; i < parts; ++i) {
              const int64_t at = (p * task.padded() + row) * kPanel + j;
              sum += (part[i].total ? part[i].total[at] : part[i].sums[at]) - s * part[i].right_sums[p * kPanel + j];
            }
            sums[j] = sum;
          }
          const int64_t to = group * outputs + row;
          write_row(*e, sums, Place{to, to}, first, n);
        }
      });
    }
  }
  return kDone;
}
