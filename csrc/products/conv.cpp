// Convolution of 8-bit codes and its gradient for the input, without im2col: the inner kernel follows a pointer
// per output pixel and tap into the codes where they lie.
//
// Both products are sums over taps of a map read at (scale · i + offset): the output reads the input at
// stride · i + tap · dilation − padding; grad_input, cut into one phase per remainder modulo the stride, reads
// grad_output at i + offset. A missing tap reads a pixel of code 0; what it is worth beyond that is the caller's
// correction (the map of weights that do meet the input).
#include <atomic>

#include "common/parallel.h"
#include "common/platform.h"
#include "products/conv.h"
#include "products/dot.h"
#include "products/epilogue.h"
#include "products/pack.h"

using namespace fqt;

namespace {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kSlice = 1024;  // terms per pass over a block
constexpr int64_t kLine = 64 / sizeof(Left);  // entries of a cache line
constexpr int64_t kMaxTaps = 1 << 12;

// One axis of a phase: its pixels first, first + step, …, each reading scale · i + offset[t] at tap index[t].
struct Axis {
  int64_t first, step, count, scale, taps;
  int64_t index[kMaxTaps], offset[kMaxTaps];
};

void output_axis(int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, Axis* axis) {
  axis->first = 0, axis->step = 1, axis->count = out, axis->scale = stride, axis->taps = kernel;
  for (int64_t t = 0; t < kernel; ++t) axis->index[t] = t, axis->offset[t] = t * dilation - padding;
}

// Of grad_input: the pixels h ≡ phase modulo stride; tap t reads grad_output at (h + padding − t · dilation)/stride
// where that is an integer.
void input_axis(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t phase,
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

// The map that is read, as left operands: (pixels, groups, depth), depth a multiple of kGroup.
struct Source {
  const Left* pixels;
  int64_t samples, height, width, groups, depth;
  const Left* missing;  // (depth,) of code 0
};

struct Task {
  const Source& source;
  const Plan& plan;
  const Axis &rows, &columns;
  const Right* right;        // [group][panel][tap][depth ÷ kGroup][kPanel][kGroup]
  const int64_t* by_column;  // (groups · panels · kPanel,) to add to the sums, or null
  int64_t right_columns, panels, out_height, out_width;
  const Epilogue& epilogue;

  int64_t taps() const { return rows.taps * columns.taps; }
  int64_t pixels() const { return source.samples * rows.count * columns.count; }
};

// Where the pixels first … first + n − 1 go, and what they read at every tap of a group. Runs of
// pixels on one line read at equal distances.
void locate(const Task& task, int64_t group, int64_t first, int64_t n, Place* places, const Left** table) {
  const Source& s = task.source;
  const int64_t pixel = s.groups * s.depth, scale = task.columns.scale;
  for (int64_t i = 0; i < n;) {
    const int64_t w = (first + i) % task.columns.count, line = (first + i) / task.columns.count;
    const int64_t h = line % task.rows.count, sample = line / task.rows.count;
    const int64_t run = task.columns.count - w < n - i ? task.columns.count - w : n - i;
    const int64_t out_line = (sample * task.out_height + task.rows.first + h * task.rows.step) * task.out_width;
    for (int64_t r = 0; r < run; ++r) {
      places[i + r] = {out_line + task.columns.first + (w + r) * task.columns.step, sample};
    }
    const Left** to = table + i;
    for (int64_t p = 0; p < task.rows.taps; ++p) {
      const int64_t y = h * task.rows.scale + task.rows.offset[p];
      const bool inside = y >= 0 && y < s.height;
      const Left* row = s.pixels + (sample * s.height + y) * s.width * pixel + group * s.depth;
      for (int64_t q = 0; q < task.columns.taps; ++q, to += kBlockRows) {
        const int64_t x = w * scale + task.columns.offset[q];
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

// Sums of one panel's columns over all taps and channels, in passes of at most kSlice terms.
template <class Finish>
void sum_panel(const Task& task, const Left* const* rows, int64_t n, int64_t columns, const Right* right,
               int32_t* sums, int64_t* wide, const Finish& finish) {
  const int64_t depth = task.source.depth, taps = task.taps();
  const int64_t tap_step = depth < kSlice ? kSlice / depth : 1, depth_step = depth < kSlice ? depth : kSlice;
  if (wide) std::memset(wide, 0, n * kPanel * sizeof *wide);
  if (taps == 0) std::memset(sums, 0, n * kPanel * sizeof *sums);
  int64_t terms = 0;  // in sums
  const auto nothing = [](int64_t, int64_t) {};
  for (int64_t tap = 0; tap < taps; tap += tap_step) {
    for (int64_t d = 0; d < depth; d += depth_step) {
      const int64_t now = taps - tap < tap_step ? taps - tap : tap_step;
      const int64_t deep = depth - d < depth_step ? depth - d : depth_step;
      const LeftRows left{rows + tap * kBlockRows, kBlockRows, d};
      const Right* from = right + (tap * depth + d) * kPanel;
      const bool last = tap + now == taps && d + deep == depth;
      if (wide && terms + now * deep > kMaxTerms) {
        for (int64_t i = 0; i < n * kPanel; ++i) wide[i] += sums[i];
        terms = 0;
      }
      if (last && !wide) {
        block_of(left, task.plan, n, columns, now, deep / kGroup, from, sums, terms != 0,
                 [&](int64_t i, int64_t count) { finish(sums + i * kPanel, i, count); });
        return;
      }
      block_of(left, task.plan, n, columns, now, deep / kGroup, from, sums, terms != 0, nothing);
      terms += now * deep;
    }
  }
  if (!wide) return finish(sums, 0, n);
  for (int64_t i = 0; taps && i < n * kPanel; ++i) wide[i] += sums[i];
  finish(wide, 0, n);
}

// One block of pixels, panels first_panel … last_panel − 1 of all groups.
bool run_block(const Task& task, int64_t block, int64_t first_panel, int64_t last_panel) {
  const int64_t first = block * kBlockRows, taps = task.taps(), depth = task.source.depth;
  const int64_t n = task.pixels() - first < kBlockRows ? task.pixels() - first : kBlockRows;
  alignas(64) int32_t sums[kBlockRows * kPanel];
  Place places[kBlockRows];
  Buffer<const Left*> table = make_buffer<const Left*>(taps * kBlockRows);
  Buffer<int64_t> wide;
  if (taps * depth > kMaxTerms) wide = make_buffer<int64_t>(kBlockRows * kPanel);
  if (!table || (taps * depth > kMaxTerms && !wide)) return false;
  for (int64_t group = 0; group < task.source.groups; ++group) {
    locate(task, group, first, n, places, table.get());
    for (int64_t p = first_panel; p < last_panel; ++p) {
      const int64_t index = group * task.panels + p, column = p * kPanel;
      const int64_t columns = task.right_columns - column < kPanel ? task.right_columns - column : kPanel;
      const int64_t* add = task.by_column ? task.by_column + index * kPanel : nullptr;
      const auto finish = [&](auto* done, int64_t i, int64_t count) {
        for (int64_t r = 0; add && r < count; ++r) {
          for (int64_t j = 0; j < kPanel; ++j) done[r * kPanel + j] += add[j];
        }
        // Ask for this panel's share of the pixels a block ahead: loads of the tiles themselves come late. Whether
        // there are such pixels does not matter.
        const Left* const* tap = table.get() + (taps - 1) * kBlockRows + i;
        for (int64_t r = 0; taps && r < count; ++r) {
          for (int64_t d = (p - first_panel) * kLine; d < depth; d += (last_panel - first_panel) * kLine) {
            __builtin_prefetch(tap[r] + kBlockRows * task.source.groups * depth + d);
          }
        }
        write_rows(task.epilogue, done, count, Listed{places + i}, group * task.right_columns + column, columns);
      };
      sum_panel(task, table.get(), n, columns, task.right + index * taps * depth * kPanel, sums, wide.get(), finish);
    }
  }
  return true;
}

// A phase's weights. Forward: the columns of a panel are output channels, k runs over input channels; backward
// the other way round.
void pack_weight(const Conv& c, const uint8_t* weight, const Axis& rows, const Axis& columns, bool backward,
                 int64_t depth, int64_t group, int64_t panel, Right* out) {
  const RightReader read{true, 0};
  const int64_t in = c.channels / c.groups, outputs = c.out_channels / c.groups;
  const int64_t taps = c.kernel_height * c.kernel_width, width = backward ? in : outputs;
  const int64_t first = panel * kPanel, n = width - first < kPanel ? width - first : kPanel;
  for (int64_t p = 0; p < rows.taps; ++p) {
    for (int64_t q = 0; q < columns.taps; ++q, out += depth * kPanel) {
      const uint8_t* tap = weight + (group * outputs * taps + rows.index[p] * c.kernel_width + columns.index[q]) * in;
      if (!backward) {
        pack_columns(tap + first * taps * in, taps * in, n, in, read, out);
        continue;
      }
      for (int64_t g = 0; g < depth / kGroup; ++g) {
        const uint8_t* row[kGroup];
        const int64_t left = outputs - g * kGroup;
        for (int64_t j = 0; j < kGroup && j < left; ++j) row[j] = tap + (g * kGroup + j) * taps * in + first;
        interleave_rows<Right>(row, left < kGroup ? left : kGroup, n, kPanel, 0, read, out + g * kPanel * kGroup);
      }
    }
  }
}

int run_phase(const Conv& c, const Source& source, const Plan& plan, const uint8_t* weight, bool backward,
              const Axis& rows, const Axis& columns, const Epilogue& e, int threads) {
  const int64_t width = (backward ? c.channels : c.out_channels) / c.groups, panels = ceil_div(width, kPanel);
  const int64_t taps = rows.taps * columns.taps, panel_size = taps * source.depth * kPanel;
  const int shift = plan.left_shift;
  Buffer<Right> right = make_buffer<Right>(c.groups * panels * panel_size + kTerms * kPanel);
  Buffer<int64_t> by_column = make_buffer<int64_t>(c.groups * panels * kPanel);
  if (!right || !by_column) return kNoMemory;
  parallel_for(c.groups * panels, c.groups * width * taps * source.depth, threads, [&](int64_t i) {
    Right* panel = right.get() + i * panel_size;
    pack_weight(c, weight, rows, columns, backward, source.depth, i / panels, i % panels, panel);
    int64_t* sums = by_column.get() + i * kPanel;
    for (int j = 0; j < kPanel; ++j) sums[j] = 0;
    if (shift) sum_columns(panel, taps * source.depth / kGroup, plan, sums);
    for (int j = 0; j < kPanel; ++j) sums[j] *= -shift;
  });
  const Task task{source, plan, rows, columns, right.get(), shift ? by_column.get() : nullptr,
                  width, panels, backward ? c.height : c.out_height, backward ? c.width : c.out_width, e};
  const int64_t blocks = ceil_div(task.pixels(), kBlockRows);
  const int64_t step = blocks < 8 * threads ? 1 : panels, items = ceil_div(panels, step);
  std::atomic<bool> failed{false};
  parallel_for(blocks * items, task.pixels() * width * c.groups * (taps * source.depth + 1) / 256, threads,
               [&](int64_t item) {
                 const int64_t first = item % items * step, last = first + step < panels ? first + step : panels;
                 if (!run_block(task, item / items, first, last)) failed = true;
               });
  return failed.load() ? kNoMemory : kDone;
}

}  // namespace

// The output of a convolution of codes, or with `backward` its gradient for the input; finished by *e, whose rows
// are output pixels (samples · height · width) and whose period is height · width. weight: signed codes,
// (out_channels, kernel_height, kernel_width, channels ÷ groups). codes: input, or grad_output. Exact; sums of
// more than kMaxTerms products are added up in int64. kBadIndex for a kernel of more than 4096 taps per axis, and for
// codes that this library does not take.
FQT_API int fqt_conv2d(const uint8_t* codes, Range range, const uint8_t* weight, Range weight_range, const Conv* conv,
                       int backward, const Epilogue* e, int threads) {
  const Conv& c = *conv;
  if (c.kernel_height > kMaxTaps || c.kernel_width > kMaxTaps) return kBadIndex;
  const Plan how = plan(range, weight_range);
  if (!how.steps || how.right_shift) return kBadIndex;
  const LeftReader read{range.is_signed(), how.left_shift};
  const int64_t height = backward ? c.out_height : c.height, width = backward ? c.out_width : c.width;
  const int64_t terms = (backward ? c.out_channels : c.channels) / c.groups;
  const int64_t depth = ceil_div(terms, kGroup) * kGroup, pixels = c.samples * height * width * c.groups;
  Buffer<Left> missing = make_buffer<Left>(depth), copy;
  if (!missing) return kNoMemory;
  for (int64_t i = 0; i < depth; ++i) missing[i] = read(0);
  const Left* left = reinterpret_cast<const Left*>(codes);
  if (sizeof(Left) != 1 || read.shift() || depth != terms) {
    copy = make_buffer<Left>(pixels * depth);
    if (!copy) return kNoMemory;
    constexpr int64_t kRun = 64;
    parallel_for(ceil_div(pixels, kRun), pixels * terms, threads, [&](int64_t i) {
      const int64_t n = pixels - i * kRun < kRun ? pixels - i * kRun : kRun;
      copy_rows(codes + i * kRun * terms, terms, n, terms, depth, read, copy.get() + i * kRun * depth);
    });
    left = copy.get();
  }
  const Source source{left, c.samples, height, width, c.groups, depth, missing.get()};
  std::unique_ptr<Axis> rows(new (std::nothrow) Axis), columns(new (std::nothrow) Axis);
  if (!rows || !columns) return kNoMemory;
  if (!backward) {
    output_axis(c.out_height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height, rows.get());
    output_axis(c.out_width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width, columns.get());
    return run_phase(c, source, how, weight, false, *rows, *columns, *e, threads);
  }
  for (int64_t h = 0; h < c.stride_height && h < c.height; ++h) {
    input_axis(c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height, h, rows.get());
    for (int64_t w = 0; w < c.stride_width && w < c.width; ++w) {
      input_axis(c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width, w, columns.get());
      const int status = run_phase(c, source, how, weight, true, *rows, *columns, *e, threads);
      if (status != kDone) return status;
    }
  }
  return kDone;
}
