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
#include "products/depthwise.h"
#include "products/dot.h"
#include "products/epilogue.h"
#include "products/pack.h"
#include "products/pixels.h"

using namespace fqt;

namespace {

constexpr int64_t kSlice = 1024;  // terms per pass over a block
constexpr int64_t kLine = 64 / sizeof(Left);  // entries of a cache line

struct Task {
  const Source<Left>& source;
  const Plan& plan;
  const Phase& phase;
  const Right* right;        // [group][panel][tap][depth ÷ kGroup][kPanel][kGroup]
  const int64_t* by_column;  // (groups · panels · kPanel,) to add to the sums, or null
  int64_t right_columns, panels;
  const Epilogue& epilogue;
};

// Sums of one panel's columns over all taps and channels, in passes of at most kSlice terms.
template <class Finish>
void sum_panel(const Task& task, const Left* const* rows, int64_t n, int64_t columns, const Right* right,
               int32_t* sums, int64_t* wide, const Finish& finish) {
  const int64_t depth = task.source.depth, taps = task.phase.taps();
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
  const int64_t first = block * kBlockRows, taps = task.phase.taps(), depth = task.source.depth;
  const int64_t n = task.phase.pixels() - first < kBlockRows ? task.phase.pixels() - first : kBlockRows;
  alignas(64) int32_t sums[kBlockRows * kPanel];
  Place places[kBlockRows];
  Buffer<const Left*> table = make_buffer<const Left*>(taps * kBlockRows);
  Buffer<int64_t> wide;
  if (taps * depth > kMaxTerms) wide = make_buffer<int64_t>(kBlockRows * kPanel);
  if (!table || (taps * depth > kMaxTerms && !wide)) return false;
  for (int64_t group = 0; group < task.source.groups; ++group) {
    locate(task.phase, task.source, group, first, n, places, table.get());
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

int run_phase(const Conv& c, const Source<Left>& source, const Plan& plan, const uint8_t* weight, bool backward,
              const Phase& phase, const Epilogue& e, int threads) {
  const int64_t width = (backward ? c.channels : c.out_channels) / c.groups, panels = ceil_div(width, kPanel);
  const int64_t taps = phase.taps(), panel_size = taps * source.depth * kPanel;
  const int shift = plan.left_shift;
  Buffer<Right> right = make_buffer<Right>(c.groups * panels * panel_size + kTerms * kPanel);
  Buffer<int64_t> by_column = make_buffer<int64_t>(c.groups * panels * kPanel);
  if (!right || !by_column) return kNoMemory;
  parallel_for(c.groups * panels, c.groups * width * taps * source.depth, threads, [&](int64_t i) {
    Right* panel = right.get() + i * panel_size;
    pack_weight(c, weight, phase.rows, phase.columns, backward, source.depth, i / panels, i % panels, panel);
    int64_t* sums = by_column.get() + i * kPanel;
    for (int j = 0; j < kPanel; ++j) sums[j] = 0;
    if (shift) sum_columns(panel, taps * source.depth / kGroup, plan, sums);
    for (int j = 0; j < kPanel; ++j) sums[j] *= -shift;
  });
  const Task task{source, plan, phase, right.get(), shift ? by_column.get() : nullptr, width, panels, e};
  const int64_t blocks = ceil_div(task.phase.pixels(), kBlockRows);
  const int64_t step = blocks < 8 * threads ? 1 : panels, items = ceil_div(panels, step);
  std::atomic<bool> failed{false};
  parallel_for(blocks * items, task.phase.pixels() * width * c.groups * (taps * source.depth + 1) / 256, threads,
               [&](int64_t item) {
                 const int64_t first = item % items * step, last = first + step < panels ? first + step : panels;
                 if (!run_block(task, item / items, first, last)) failed = true;
               });
  return failed.load() ? kNoMemory : kDone;
}

// f(phase) for the phases of the result, until one fails.
template <class F>
int each_phase(const Conv& c, bool backward, const F& f) {
  std::unique_ptr<Axis> rows(new (std::nothrow) Axis), columns(new (std::nothrow) Axis);
  if (!rows || !columns) return kNoMemory;
  if (!backward) {
    output_axis(c.out_height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height, rows.get());
    output_axis(c.out_width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width, columns.get());
    return f(Phase{*rows, *columns, c.samples, c.out_height, c.out_width});
  }
  for (int64_t h = 0; h < c.stride_height && h < c.height; ++h) {
    input_axis(c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height, h, rows.get());
    for (int64_t w = 0; w < c.stride_width && w < c.width; ++w) {
      input_axis(c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width, w, columns.get());
      const int status = f(Phase{*rows, *columns, c.samples, c.height, c.width});
      if (status != kDone) return status;
    }
  }
  return kDone;
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
  if (is_depthwise(c)) {
    Buffer<uint8_t> missing = make_buffer<uint8_t>(c.channels);
    if (!missing) return kNoMemory;
    std::memset(missing.get(), 0, c.channels);
    const int64_t height = backward ? c.out_height : c.height, width = backward ? c.out_width : c.width;
    const Source<uint8_t> source{codes, c.samples, height, width, 1, c.channels, missing.get()};
    return each_phase(c, backward, [&](const Phase& phase) {
      return depthwise_phase(source, range.is_signed(), weight, c.kernel_height * c.kernel_width, c.kernel_width, phase,
                             *e, threads);
    });
  }
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
  const Source<Left> source{left, c.samples, height, width, c.groups, depth, missing.get()};
  return each_phase(c, backward, [&](const Phase& phase) {
    return run_phase(c, source, how, weight, backward, phase, *e, threads);
  });
}
