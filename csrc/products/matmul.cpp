// Products of matrices of 8-bit codes, any signs, any layout; exact.
//
// The right operand is packed once into panels of kPanel columns. The left one is read where it lies if it can
// be (unsigned codes, k next to one another, whole groups), else repacked once. Work is then cut into blocks of
// rows × panels; a block runs over slices of k, so that a slice of a panel stays in the first-level cache.
#include <atomic>

#include "common/parallel.h"
#include "common/platform.h"
#include "products/dot.h"
#include "products/epilogue.h"
#include "products/pack.h"

using namespace fqt;

namespace {

#if defined(__AMX_INT8__)
constexpr int64_t kBlockRows = 384;  // tiles outrun the caches: a panel, once fetched, must serve more rows
#else
constexpr int64_t kBlockRows = 96;
#endif
constexpr int64_t kSlice = 512;  // k per slice; kMaxTerms is a multiple
static_assert(kMaxTerms % kSlice == 0, "partial sums are widened between slices");

// Rows that are interleaved together: so few that a slice of them stays in the first-level cache while a panel's tiles
// read it, each some bytes of every line. AMX has tiles of whole lines.
constexpr int64_t kInterleaved = kTileRows > 1 ? int64_t{1} << 62 : 48;
static_assert(kTileRows > 1 || kBlockRows % kInterleaved == 0, "blocks are made of whole runs");

// The left operand: rows where they lie, or interleaved.
struct LeftOperand {
  const Left* first = nullptr;
  int64_t row_stride = 0;      // of rows whose k lie together
  int64_t group_stride = 0;    // of interleaved rows; 0 if they are not
  int64_t run = 0, run_stride = 0;  // rows that are interleaved together
  Buffer<Left> memory;
  Buffer<int32_t> sums;        // Σ_k of every row, if the right operand is shifted; < 2³¹ for k < 2²³

  // Group g of an interleaved row.
  const Left* interleaved(int64_t row, int64_t g) const {
    return first + row / run * run_stride + g * group_stride + row % run * kGroup;
  }
};

bool prepare_left(const Matrix& a, const LeftReader& read, const Plan& plan, int64_t m, int64_t k, int threads,
                  LeftOperand* left) {
  const int64_t groups = ceil_div(k, kTerms) * kTerms / kGroup;
  const bool by_rows = a.column_stride == 1;
  if (by_rows && sizeof(Left) == 1 && read.shift() == 0 && k % kTerms == 0 && m % kTileRows == 0) {
    left->first = reinterpret_cast<const Left*>(a.codes);
    left->row_stride = a.row_stride;
  } else if (by_rows) {
    left->row_stride = groups * kGroup;
    left->memory = make_buffer<Left>(ceil_div(m, kTileRows) * kTileRows * left->row_stride);
    if (!left->memory) return false;
    parallel_for(ceil_div(m, 16), m * k, threads, [&](int64_t i) {
      const int64_t rows = m - 16 * i < 16 ? m - 16 * i : 16;
      copy_rows(a.codes + 16 * i * a.row_stride, a.row_stride, rows, k, left->row_stride, read,
                left->memory.get() + 16 * i * left->row_stride);
    });
    left->first = left->memory.get();
  } else {
    const int64_t run = m < kInterleaved ? m : kInterleaved, runs = ceil_div(m, run);
    const int64_t width = ceil_div(run, 16) * 16 + (kTileRows > 1 ? 16 : 0);  // so that groups do not share cache sets
    left->group_stride = width * kGroup;
    left->run = run, left->run_stride = groups * left->group_stride;
    left->memory = make_buffer<Left>(runs * left->run_stride);
    if (!left->memory) return false;
    left->first = left->memory.get();
    parallel_for(ceil_div(groups, kRun), m * k, threads, [&](int64_t item) {
      const int64_t begin = item * kRun, end = groups < begin + kRun ? groups : begin + kRun;
      for (int64_t i = 0; i < m; i += run) {
        Left* to = left->memory.get() + i / run * left->run_stride;
        for (int64_t g = begin; g < end; ++g) {
          const uint8_t* row[kGroup];
          int64_t n = 0;
          for (; n < kGroup && g * kGroup + n < k; ++n) row[n] = a.codes + (g * kGroup + n) * a.column_stride + i;
          interleave_rows<Left>(row, n, m - i < run ? m - i : run, width, 0, read, to + g * left->group_stride);
        }
        finish_interleaved(end - begin, width, to + begin * left->group_stride);
      }
    });
  }
  if (!plan.right_shift) return true;
  left->sums = make_buffer<int32_t>(m);
  if (!left->sums) return false;
  parallel_for(ceil_div(m, W), m * k, threads, [&](int64_t item) {
    const int64_t begin = W * item, end = m < begin + W ? m : begin + W;
    if (by_rows) {
      for (int64_t i = begin; i < end; ++i) {
        const Left* row = left->first + i * left->row_stride;
        int32_t sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += value_of(row[j], plan.left_signed);
        left->sums[i] = sum;
      }
    } else {
      vi sum{};
      for (int64_t g = 0; g < groups; ++g) {
        sum = add_left(sum, left->interleaved(begin, g), plan);
      }
      store_part(left->sums.get() + begin, sum, end - begin);
    }
  });
  return true;
}

// What a shift of the operands adds to a sum, by row and by column, to be taken off again.
struct Unshift {
  int64_t by_row;              // times Σ_k of the left operand's row
  const int32_t* left_sums;
  const int64_t* by_column;    // (columns of the panel,)
};

template <class Sum>
void finish_rows(const Epilogue& e, Sum* sums, int64_t first_row, int64_t rows, int64_t first_column,
                 int64_t columns, const Unshift& u) {
  for (int64_t i = 0; i < rows && (u.by_row || u.by_column); ++i) {
    Sum* row = sums + i * kPanel;
    const int64_t add = u.by_row ? u.by_row * u.left_sums[first_row + i] : 0;
    for (int64_t j = 0; j < kPanel; ++j) {
      row[j] = static_cast<Sum>(row[j] + add + (u.by_column ? u.by_column[j] : 0));
    }
  }
  write_rows(e, sums, rows, Neighbours{first_row}, first_column, columns);
}

// One panel of a block of rows: all slices of k.
struct Block {
  const LeftOperand& left;
  const Plan& plan;
  const Right* panel;
  int64_t first_row, rows, columns, k;

  template <class Done>
  void slice(int64_t at, int32_t* sums, bool add, const Done& done) const {
    const int64_t g = at / kGroup, groups = ceil_div(k - at < kSlice ? k - at : kSlice, kGroup);
    const Right* right = panel + g * kPanel * kGroup;
    if (left.group_stride) {
      for (int64_t i = 0; i < rows; i += left.run) {
        const LeftInterleaved source{left.interleaved(first_row + i, g), left.group_stride};
        block_of(source, plan, rows - i < left.run ? rows - i : left.run, columns, 1, groups, right, sums + i * kPanel, add,
                 [&](int64_t j, int64_t n) { done(i + j, n); });
      }
    } else {
      const LeftStrided source{left.first + first_row * left.row_stride + at, left.row_stride};
      block_of(source, plan, rows, columns, 1, groups, right, sums, add, done);
    }
  }

  // done(sums, i, n): the sums of rows i … i + n − 1 of the block are there.
  template <class Done>
  void narrow(int32_t* sums, const Done& done) const {
    if (k == 0) {
      std::memset(sums, 0, rows * kPanel * sizeof *sums);
      return done(sums, 0, rows);
    }
    int64_t at = 0;
    for (; at + kSlice < k; at += kSlice) slice(at, sums, at != 0, [](int64_t, int64_t) {});
    slice(at, sums, at != 0, [&](int64_t i, int64_t n) { done(sums + i * kPanel, i, n); });
  }

  // The same for k > kMaxTerms.
  template <class Done>
  void wide(int32_t* sums, int64_t* total, const Done& done) const {
    std::memset(total, 0, rows * kPanel * sizeof *total);
    for (int64_t at = 0; at < k; at += kSlice) {
      slice(at, sums, at % kMaxTerms != 0, [](int64_t, int64_t) {});
      if ((at + kSlice) % kMaxTerms == 0 || at + kSlice >= k) {
        for (int64_t i = 0; i < rows * kPanel; ++i) total[i] += sums[i];
      }
    }
    done(total, 0, rows);
  }
};

}  // namespace

// The product of a (m, k) and b (k, n), finished by *e (a struct Epilogue with columns = n, period = 1).
// Sums of more than kMaxTerms products are added up in int64. Contract, checked by the caller: one stride of each
// operand is 1; k < 2²³; kInt32 only where the exact sum fits (65,793 terms u8 × s8, 131,071 s8 × s8, 33,025 u8 × u8).
// kBadIndex for codes that this library does not take.
FQT_API int fqt_matmul(const uint8_t* a, Range a_range, int64_t a_row_stride, int64_t a_column_stride, const uint8_t* b,
                       Range b_range, int64_t b_row_stride, int64_t b_column_stride, int64_t m, int64_t n, int64_t k,
                       const Epilogue* e, int threads) {
  if (m == 0 || n == 0) return kDone;
  const Plan how = plan(a_range, b_range);
  if (!how.steps) return kBadIndex;
  const LeftReader read_left{a_range.is_signed(), how.left_shift};
  const RightReader read_right{b_range.is_signed(), how.right_shift};
  // Σ ab = Σ (a + s)(b − t) + t·Σ (a + s) − s·Σ (b − t) − k·s·t, s and t the shifts.
  const int64_t s = how.left_shift, t = -how.right_shift;
  const int64_t groups = ceil_div(k, kGroup), panels = ceil_div(n, kPanel);

  LeftOperand left;
  Buffer<Right> right = make_buffer<Right>((panels * groups * kGroup + kTerms) * kPanel);
  Buffer<int64_t> by_column = make_buffer<int64_t>(panels * kPanel);
  const Matrix left_codes{a, a_row_stride, a_column_stride};
  if (!right || !by_column || !prepare_left(left_codes, read_left, how, m, k, threads, &left)) return kNoMemory;
  pack_right({b, b_row_stride, b_column_stride}, read_right, n, k, threads, right.get());
  if (s) {
    parallel_for(panels, n * k, threads, [&](int64_t p) {
      int64_t* sums = by_column.get() + p * kPanel;
      for (int j = 0; j < kPanel; ++j) sums[j] = 0;
      sum_columns(right.get() + p * groups * kPanel * kGroup, groups, how, sums);
      for (int j = 0; j < kPanel; ++j) sums[j] = -s * sums[j] - k * s * t;
    });
  }

  const int64_t row_blocks = ceil_div(m, kBlockRows);
  int64_t panels_per_item = 4;
  while (panels_per_item > 1 && row_blocks * ceil_div(panels, panels_per_item) < 8 * threads) panels_per_item /= 2;
  const int64_t column_items = ceil_div(panels, panels_per_item);
  std::atomic<bool> failed{false};
  parallel_for(row_blocks * column_items, m * n * k / 256, threads, [&](int64_t item) {
    const int64_t first_row = item / column_items * kBlockRows;
    const int64_t rows = m - first_row < kBlockRows ? m - first_row : kBlockRows;
    const int64_t first_panel = item % column_items * panels_per_item;
    alignas(64) int32_t sums[kBlockRows * kPanel];
    Buffer<int64_t> wide;
    if (k > kMaxTerms && !(wide = make_buffer<int64_t>(kBlockRows * kPanel))) {
      failed = true;
      return;
    }
    for (int64_t p = first_panel; p < panels && p < first_panel + panels_per_item; ++p) {
      const Unshift unshift{t, left.sums.get(), s ? by_column.get() + p * kPanel : nullptr};
      const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
      const Block block{left, how, right.get() + p * groups * kPanel * kGroup, first_row, rows,
                        columns, k};
      const auto done = [&](auto* done_sums, int64_t i, int64_t count) {
        finish_rows(*e, done_sums, first_row + i, count, p * kPanel, columns, unshift);
      };
      if (wide) {
        block.wide(sums, wide.get(), done);
      } else {
        block.narrow(sums, done);
      }
    }
  });
  return failed.load() ? kNoMemory : kDone;
}

// How many groups of such codes are multiplied and added up in 16 bits: 1 where sums are of 32 bits from the first, 0 if
// this library does not take them.
FQT_API int64_t fqt_steps(Range left, Range right) { return plan(left, right).steps; }
