// The gradient of a convolution for its weight, on 8-bit codes: for every tap the product of grad_output's and the
// input's channels over all pixels.
//
// The contraction runs over pixels, and in channels-last codes neighbouring pixels' channels interleave into the
// layout of the inner kernel at the speed of a copy. Each thread takes a share of the lines of pixels with sums of
// its own; the result is cut into chunks of panels whose sums stay in the second-level cache. The columns are
// (tap, channel) pairs, so that few channels still fill a panel.
#include <memory>
#include <new>

#include "common/parallel.h"
#include "common/platform.h"
#include "products/conv.h"
#include "products/depthwise.h"
#include "products/dot.h"
#include "products/epilogue.h"
#include "products/pack.h"
#include "products/products.h"

using namespace fqt;

namespace {

constexpr int64_t kBlockPixels = 512;
constexpr int64_t kChunkBytes = 640 << 10;

// Codes that the next block of lines reads, asked for bit by bit while this one is multiplied.
struct Ahead {
  const uint8_t* codes;
  int64_t first, end, at = first;

  // Up to part ÷ whole of them.
  void fetch(int64_t part, int64_t whole) {
    for (const int64_t to = first + (end - first) * part / whole; at < to; at += 64) __builtin_prefetch(codes + at, 0, 2);
  }
};

struct Task {
  const Conv& c;
  const uint8_t *grad, *input;
  LeftReader read_grad;
  RightReader read_input;
  Plan plan;
  int64_t group;
  const Planes* planes;

  int64_t outputs() const { return c.out_channels / c.groups; }
  int64_t rows() const { return outputs() + (planes ? planes->count : 0); }
  int64_t inputs() const { return c.channels / c.groups; }
  int64_t columns() const { return c.kernel_height * c.kernel_width * inputs(); }
  int64_t padded() const { return ceil_div(rows(), 16) * 16; }
  int64_t left_width() const { return padded() + 16; }  // so that groups do not share cache sets
  int64_t groups_per_line() const { return ceil_div(c.out_width, kGroup); }
  int64_t line_terms() const { return groups_per_line() * kGroup; }
  int64_t lines() const { return c.samples * c.out_height; }
  // About those codes of a whole map of `size` that belong to lines first … last − 1 of the output.
  Ahead ahead(const uint8_t* codes, int64_t size, int64_t first, int64_t last) const {
    return {codes, size / lines() * first, size / lines() * last};
  }
  int64_t block_lines() const { return line_terms() < kBlockPixels && c.out_width ? kBlockPixels / line_terms() : 1; }
};

// One thread's operands and sums of a chunk of panels.
struct Part {
  Buffer<Left> left;            // grad_output of a block of lines
  Buffer<Right> right;          // a panel of the input under it
  Buffer<int32_t> sums;         // [panel][padded output][kPanel]
  Buffer<int64_t> total;        // the same, for more than kMaxTerms terms; else null
  Buffer<int64_t> left_sums;    // (rows,) Σ of grad_output's operands
  Buffer<int64_t> right_sums;   // (panels · kPanel,) Σ of the input's

  bool allocate(const Task& task, int64_t panels, bool wide) {
    const int64_t size = panels * task.padded() * kPanel, terms = task.block_lines() * task.line_terms() + kTerms;
    left = make_buffer<Left>(terms * task.left_width());
    right = make_buffer<Right>(terms * kPanel);
    sums = make_buffer<int32_t>(size);
    if (wide) total = make_buffer<int64_t>(size);
    left_sums = make_buffer<int64_t>(task.rows());
    right_sums = make_buffer<int64_t>(panels * kPanel);
    return left && right && sums && (total || !wide) && left_sums && right_sums;
  }
};

// grad_output and the planes of a run of lines: [group of pixels][left_width][kGroup], zeros beyond a line's end. AMX
// reads rows up to a multiple of 16, and has zeros there.
void pack_grad(const Task& task, int64_t first_line, int64_t lines, Left* out) {
  const int64_t left_width = task.left_width(), pixel = task.c.out_channels, width = task.c.out_width;
  const int64_t outputs = task.outputs(), count = task.rows() - outputs, tokens = task.lines() * width;
  const int64_t end = kTileRows > 1 ? task.padded() : task.rows();
  for (int64_t line = first_line; line < first_line + lines; ++line) {
    const uint8_t* from = task.grad + line * width * pixel + task.group * outputs;
    for (int64_t g = 0; g < task.groups_per_line(); ++g, out += left_width * kGroup) {
      const uint8_t* row[kGroup];
      const int64_t at = g * kGroup, n = width - at < kGroup ? width - at : kGroup;
      for (int64_t j = 0; j < n; ++j) row[j] = from + (at + j) * pixel;
      interleave_rows<Left>(row, n, outputs, outputs, 0, task.read_grad, out);
      Left* to = out + outputs * kGroup;
      for (int64_t k = 0; k < count; ++k, to += kGroup) {
        const uint8_t* plane = task.planes->codes + k * tokens + line * width + at;
        for (int64_t j = 0; j < kGroup; ++j) to[j] = j < n ? task.read_grad(plane[j]) : Left{0};
      }
      std::memset(to, 0, (end - outputs - count) * kGroup * sizeof(Left));
    }
  }
}

// One line of the input under n columns from `channel` on, for one tap: from[w · channels] is pixel w, if it is
// inside 0 … width − 1; `from` is null if the whole line is missing. Missing taps hold code 0.
void pack_line(const Task& task, const uint8_t* from, int64_t tap_w, int64_t n, Right* out) {
  const Conv& c = task.c;
  static const uint8_t no_pixel[kPanel] = {};
  const int64_t step = c.stride_width * c.channels, groups = task.groups_per_line();
  // Output pixels begin … end − 1 read inside.
  const int64_t begin = tap_w < 0 ? ceil_div(-tap_w, c.stride_width) : 0;
  const int64_t end = from && tap_w < c.width ? ceil_div(c.width - tap_w, c.stride_width) : 0;
  for (int64_t g = 0; g < groups; ++g, out += kPanel * kGroup) {
    const int64_t first = g * kGroup;
    const uint8_t* row[kGroup];
    if (first >= begin && first + kGroup <= end && first + kGroup <= c.out_width) {
      row[0] = from + tap_w * c.channels + first * step;
      for (int64_t j = 1; j < kGroup; ++j) row[j] = row[j - 1] + step;
      interleave_group(row, n, task.read_input, out);
      continue;
    }
    for (int64_t j = 0; j < kGroup; ++j) {
      const bool inside = first + j >= begin && first + j < end;
      row[j] = inside ? from + tap_w * c.channels + (first + j) * step : no_pixel;
    }
    interleave_group(row, n, task.read_input, out);
    for (int64_t j = 0; j < kGroup; ++j) {
      for (int64_t i = 0; first + j >= c.out_width && i < n; ++i) out[i * kGroup + j] = 0;
    }
  }
}

// The input under columns first … first + kPanel − 1 of a run of lines: [group of pixels][kPanel][kGroup]. What is
// beyond a line's end or the last column holds zeros.
void pack_input(const Task& task, int64_t first_line, int64_t lines, int64_t first, Right* out) {
  const Conv& c = task.c;
  const int64_t last = first + kPanel < task.columns() ? first + kPanel : task.columns();
  const int64_t line_size = task.groups_per_line() * kPanel * kGroup;
  for (int64_t column = first; column < last;) {
    const int64_t tap = column / task.inputs(), channel = column % task.inputs();
    const int64_t n = task.inputs() - channel < last - column ? task.inputs() - channel : last - column;
    const int64_t tap_h = tap / c.kernel_width * c.dilation_height - c.padding_height;
    const int64_t tap_w = tap % c.kernel_width * c.dilation_width - c.padding_width;
    const uint8_t* codes = task.input + task.group * task.inputs() + channel;
    Right* to = out + (column - first) * kGroup;
    int64_t sample = first_line / c.out_height, out_h = first_line % c.out_height;
    for (int64_t line = 0; line < lines; ++line, to += line_size) {
      const int64_t h = out_h * c.stride_height + tap_h;
      const bool inside = h >= 0 && h < c.height;
      pack_line(task, inside ? codes + (sample * c.height + h) * c.width * c.channels : nullptr, tap_w, n, to);
      if (++out_h == c.out_height) out_h = 0, ++sample;
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

void sum_rows(const Left* packed, int64_t groups, int64_t width, int64_t outputs, const Plan& plan, int64_t* sums) {
  for (int64_t i = 0; i < outputs; i += W) {
    vi sum{};
    for (int64_t g = 0; g < groups; ++g) sum = add_left(sum, packed + (g * width + i) * kGroup, plan);
    for (int64_t j = 0; j < W && i + j < outputs; ++j) sums[i + j] += sum[j];
  }
}

// The sums of lines first … last − 1 of panels first_panel … first_panel + panels − 1.
void run_part(const Task& task, int64_t first, int64_t last, int64_t first_panel, int64_t panels, Part* part) {
  const Conv& c = task.c;
  const int64_t rows = task.rows(), padded = task.padded(), width = task.left_width();
  const int64_t per_line = task.groups_per_line(), step = task.block_lines(), size = panels * padded * kPanel;
  if (part->total) std::memset(part->total.get(), 0, size * sizeof(int64_t));
  if (first == last || per_line == 0) std::memset(part->sums.get(), 0, size * sizeof(int32_t));
  for (int64_t i = 0; i < rows; ++i) part->left_sums[i] = 0;
  for (int64_t i = 0; i < panels * kPanel; ++i) part->right_sums[i] = 0;
  int64_t terms = 0;  // in sums
  const auto widen = [&] {
    for (int64_t i = 0; terms && i < size; ++i) part->total[i] += part->sums[i];
    terms = 0;
  };
  for (int64_t line = first; line < last; line += step) {
    const int64_t lines = last - line < step ? last - line : step, groups = lines * per_line;
    if (terms + groups * kGroup > kMaxTerms) widen();
    Left* left = part->left.get();
    Right* right = part->right.get();
    pack_grad(task, line, lines, left);
    const int64_t next = line + lines, end = last - next < step ? last : next + step;
    Ahead grad_ahead = task.ahead(task.grad, c.samples * c.out_height * c.out_width * c.out_channels, next, end);
    Ahead input_ahead = task.ahead(task.input, c.samples * c.height * c.width * c.channels, next, end);
    if (task.read_input.shift()) sum_rows(left, groups, width, rows, task.plan, part->left_sums.get());
    const int64_t all = ceil_div(groups * kGroup, kTerms) * kTerms / kGroup;
    std::memset(left + groups * width * kGroup, 0, (all - groups) * width * kGroup * sizeof(Left));
    finish_interleaved(all, width, left);
    for (int64_t p = 0; p < panels; ++p) {
      pack_input(task, line, lines, (first_panel + p) * kPanel, right);
      if (task.read_grad.shift()) sum_columns(right, groups, task.plan, part->right_sums.get() + p * kPanel);
      const int64_t columns = task.columns() - (first_panel + p) * kPanel;
      block_of(LeftInterleaved{left, width * kGroup}, task.plan, rows, columns, 1, groups, right,
               part->sums.get() + p * padded * kPanel, terms != 0, [&](int64_t i, int64_t n) {
                 grad_ahead.fetch(p * rows + i + n, panels * rows);
                 input_ahead.fetch(p * rows + i + n, panels * rows);
               });
    }
    terms += groups * kGroup;
  }
  if (part->total) widen();
}

// The exact sums of one row and panel: of all parts, less what the shifts added.
// Σ ab = Σ (a + s)(b − t) + t·Σ (a + s) − s·Σ (b − t) − pixels·s·t, s and t the shifts, as in matmul.cpp.
void add_up(const Task& task, const Part* parts, int64_t count, int64_t row, int64_t panel, int64_t* sums) {
  const int64_t s = task.read_grad.shift(), t = -task.read_input.shift(), pixels = task.lines() * task.c.out_width;
  int64_t by_row = -pixels * s * t;
  for (int64_t i = 0; i < count; ++i) by_row += t * parts[i].left_sums[row];
  for (int64_t j = 0; j < kPanel; ++j) sums[j] = by_row;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (panel * task.padded() + row) * kPanel;
    if (parts[i].total) {
      const int64_t* total = parts[i].total.get() + at;
      for (int64_t j = 0; j < kPanel; ++j) sums[j] += total[j];
    } else {
      const int32_t* part = parts[i].sums.get() + at;
      for (int64_t j = 0; j < kPanel; ++j) sums[j] += part[j];
    }
    const int64_t* right = parts[i].right_sums.get() + panel * kPanel;
    for (int64_t j = 0; s && j < kPanel; ++j) sums[j] -= s * right[j];
  }
}

}  // namespace

int fqt::conv_grad_weight(const uint8_t* grad, Range grad_range, const uint8_t* input, Range input_range,
                          const Conv* conv, const Planes* planes, const Epilogue* e, int threads) {
  const Conv& c = *conv;
  if (is_depthwise(c) && !planes) {
    return depthwise_grad_weight(grad, grad_range.is_signed(), input, input_range.is_signed(), c, *e, threads);
  }
  if (planes && grad_range.high < planes->high) grad_range.high = planes->high;
  const Plan how = plan(grad_range, input_range);
  if (!how.steps) return kBadIndex;
  const LeftReader read_grad{grad_range.is_signed(), how.left_shift};
  const RightReader read_input{input_range.is_signed(), how.right_shift};
  for (int64_t group = 0; group < c.groups; ++group) {
    const Task task{c, grad, input, read_grad, read_input, how, group, planes};
    const int64_t outputs = task.outputs(), columns = task.columns(), rows = task.rows();
    const int64_t panels = ceil_div(columns, kPanel), lines = task.lines();
    if (outputs == 0 || columns == 0) return kDone;
    const int64_t work = lines * c.out_width * rows * columns / 256;
    int64_t chunk = kChunkBytes / (rows * kPanel * 4);
    chunk = chunk < 1 ? 1 : chunk > panels ? panels : chunk;
    int64_t parts = threads < lines ? threads : lines;
    if (parts > work / kGrain) parts = work / kGrain;
    if (parts < 1) parts = 1;
    std::unique_ptr<Part[]> part(new (std::nothrow) Part[parts]);
    if (!part) return kNoMemory;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t terms = (lines * (i + 1) / parts - lines * i / parts) * task.line_terms();
      if (!part[i].allocate(task, chunk, terms > kMaxTerms)) return kNoMemory;
    }
    for (int64_t first_panel = 0; first_panel < panels; first_panel += chunk) {
      const int64_t now = panels - first_panel < chunk ? panels - first_panel : chunk;
      parallel_for(parts, work, threads, [&](int64_t i) {
        run_part(task, lines * i / parts, lines * (i + 1) / parts, first_panel, now, &part[i]);
      });
      // f(sums, column, n) for the panels of one row.
      const auto each_panel = [&](int64_t row, const auto& f) {
        for (int64_t p = 0; p < now; ++p) {
          const int64_t first = (first_panel + p) * kPanel, n = columns - first < kPanel ? columns - first : kPanel;
          int64_t sums[kPanel];
          add_up(task, part.get(), parts, row, p, sums);
          f(sums, first, n);
        }
      };
      for (int64_t k = 0; k < rows - outputs; ++k) {
        each_panel(outputs + k, [&](const int64_t* sums, int64_t first, int64_t n) {
          std::memcpy(planes->sums + k * columns + first, sums, n * sizeof *sums);
        });
      }
      if (planes) {
        const int64_t last = (first_panel + now) * kPanel;
        planes->ready(planes->state, first_panel * kPanel, last < columns ? last : columns);
      }
      parallel_for(outputs, outputs * now * kPanel, threads, [&](int64_t row) {
        const int64_t to = group * outputs + row;
        each_panel(row, [&](const int64_t* sums, int64_t first, int64_t n) {
          write_row(*e, sums, Place{to, to}, first, n);
        });
      });
    }
  }
  return kDone;
}

// The weight's gradient from codes of grad_output and input: rows are output channels, columns
// (kernel_height, kernel_width, channels ÷ groups); finished by *e with period 1. Missing taps count as code 0.
// Exact: partial sums of at most kMaxTerms products in int32, added up in int64. Contract, checked by the caller: a
// line of the output has at most kMaxTerms pixels; kInt32 only where the exact sum fits.
FQT_API int fqt_conv2d_grad_weight(const uint8_t* grad, Range grad_range, const uint8_t* input, Range input_range,
                                   const Conv* conv, const Epilogue* e, int threads) {
  return conv_grad_weight(grad, grad_range, input, input_range, conv, nullptr, e, threads);
}
