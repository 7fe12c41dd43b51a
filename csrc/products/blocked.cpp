// Products of matrices of signed codes whose steps vary by blocks of k:
//
//   out[m][n] = Σ_kb float(Σ_{k in kb} a[m][k] · b[k][n]) · (a_step[m][kb] · b_step[kb][n]) + bias[n]
//
// A block's sum is exact, in int32; blocks are added in float32, in ascending order and without contraction, so that
// the result equals the reference's bit for bit. A tile's integer sums take up the registers, as many as hide the latency
// of dot; the floats lie in the first-level cache, whose ports have nothing else to do between blocks.
//
// The four-term dot product of x86 takes unsigned left codes: they are lifted by 128, and a block's sums start at
// −128 · Σ_k b, which costs no instruction more than starting at zero. Of 64 k, a row and a vector of columns, in blocks
// of 32, the plain product makes 16 dot products; this one the same and twice a conversion, a product and a sum, with a
// product of the two steps before it where the columns of a vector do not share theirs: 22 or 24.
#include "common/parallel.h"
#include "common/platform.h"
#include "products/epilogue.h"
#include "products/pack.h"

using namespace fqt;

namespace {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kSlice = 512;      // k of a panel that are used from the first-level cache, in whole blocks
constexpr int64_t kMostBlocks = 32;  // in a slice

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kLift = 128;
#else
constexpr int kLift = 0;
#endif
template <int V>
constexpr int kTile = V == 1 ? 8 : 6;  // rows; as in dot.h

// A left code as the dot product takes it, whatever the other products of this level do with signs.
struct Lifted {
  static constexpr bool is_signed = true;
  int shift() const { return kLift; }
  Left operator()(uint8_t code) const { return static_cast<Left>(static_cast<int8_t>(code) + kLift); }
};

// The blocks of k.
struct Blocks {
  int64_t k, size, count;

  Blocks(int64_t k, int64_t size) : k(k), size(size), count(ceil_div(k, size)) {}
  int64_t groups() const { return ceil_div(k, kGroup); }
  int64_t groups_of(int64_t block) const { return ceil_div(block + 1 < count ? size : k - block * size, kGroup); }
  int64_t first_group(int64_t block) const { return block * size / kGroup; }
};

// Left groups: group g of row i at first + i · row_stride + g · group_stride.
struct LeftCodes {
  const Left* first = nullptr;
  int64_t row_stride = 0, group_stride = 0;
  Buffer<Left> memory;
};

bool pack_left(const Matrix& a, int64_t m, int64_t k, int threads, LeftCodes* left) {
  const int64_t groups = ceil_div(k, kGroup);
  const bool by_rows = a.column_stride == 1;
  // Interleaved rows: more than there are, so that groups do not share cache sets.
  const int64_t width = ceil_div(m, 16) * 16 + 16, depth = groups * kGroup;
  left->memory = make_buffer<Left>(by_rows ? m * depth : groups * width * kGroup);
  if (!left->memory) return false;
  Left* out = left->memory.get();
  left->first = out, left->row_stride = by_rows ? depth : kGroup, left->group_stride = by_rows ? kGroup : width * kGroup;
  if (by_rows) {
    parallel_for(ceil_div(m, 16), m * k, threads, [&](int64_t item) {
      const int64_t i = 16 * item, rows = m - i < 16 ? m - i : 16;
      copy_rows(a.codes + i * a.row_stride, a.row_stride, rows, k, depth, Lifted{}, out + i * depth);
    });
  } else {
    parallel_for(groups, m * k, threads, [&](int64_t g) {
      const uint8_t* row[kGroup];
      int64_t n = 0;
      for (; n < kGroup && g * kGroup + n < k; ++n) row[n] = a.codes + (g * kGroup + n) * a.column_stride;
      interleave_rows<Left>(row, n, m, width, 0, Lifted{}, out + g * width * kGroup);
    });
  }
  return true;
}

// What belongs to the right operand's codes: for every panel the number that a block's sums start with and the steps.
struct RightSteps {
  bool shared;             // whether the columns of a vector share a step
  Buffer<int32_t> starts;  // [panel][block][kPanel]
  Buffer<float> steps;     // the same; shared: [panel][vector][block]

  int64_t stride(const Blocks& blocks) const { return blocks.count * (shared ? kVectors : kPanel); }
};

void sum_blocks(const Right* panel, const Blocks& blocks, int32_t* starts) {
  for (int64_t block = 0; block < blocks.count; ++block, starts += kPanel) {
    vi sum[kVectors]{};
    for (int64_t g = blocks.groups_of(block); g > 0; --g, panel += kPanel * kGroup) {
      for (int v = 0; v < kVectors; ++v) sum[v] = dot(sum[v], ones(), load<vi>(panel + v * W * kGroup));
    }
    for (int v = 0; v < kVectors; ++v) store(starts + v * W, sum[v] * -kLift);
  }
}

// step: (blocks, ceil(n ÷ run)), one per `run` columns.
bool prepare_steps(const float* step, int64_t run, int64_t n, const Right* right, const Blocks& blocks, int threads,
                   RightSteps* out) {
  const int64_t panels = ceil_div(n, kPanel), runs = ceil_div(n, run);
  out->shared = run % W == 0 || run >= n;
  out->starts = make_buffer<int32_t>(kLift ? panels * blocks.count * kPanel : 0);
  out->steps = make_buffer<float>(panels * out->stride(blocks) + kMostBlocks);
  if (!out->starts || !out->steps) return false;
  parallel_for(panels, n * blocks.k, threads, [&](int64_t p) {
    if (kLift) {
      sum_blocks(right + p * blocks.groups() * kPanel * kGroup, blocks, out->starts.get() + p * blocks.count * kPanel);
    }
    float* to = out->steps.get() + p * out->stride(blocks);
    int64_t run_of[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) run_of[j] = p * kPanel + j < n ? (p * kPanel + j) / run : -1;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const float* from = step + block * runs;
      for (int64_t j = 0; j < kPanel; j += out->shared ? W : 1) {
        const float value = run_of[j] < 0 ? 0.0f : from[run_of[j]];
        to[out->shared ? j / W * blocks.count + block : block * kPanel + j] = value;
      }
    }
  });
  return true;
}

// In a register: compilers would load a vector anew for each row, and the loads be as many as the dot products.
inline vi held(vi v) {
#if defined(__AVX512VNNI__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// Some blocks of a panel.
struct Panel {
  const Right* codes;
  const int32_t* starts;
  const float* steps;
  int64_t step_stride;  // shared: from vector to vector
  int64_t blocks, groups, last_groups;
};

// sums (R × V · W, row stride kPanel) += the products of a tile of rows with some blocks. row_steps[i]: of row i, one per
// block. Unrolled by name, as in dot.h, and never inlined, so that it has the registers to itself.
template <int R, int V, bool Shared>
__attribute__((noinline)) void tile(const Left* a, int64_t row_stride, int64_t group_stride,
                                    const float* const* row_steps, const Panel& right, float* sums) {
  alignas(64) float products[Shared ? R * V : 1][kMostBlocks];
  if (Shared) {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < V; ++v) {
        const float* steps = right.steps + v * right.step_stride;
        for (int64_t k = 0; k < right.blocks; ++k) products[i * V + v][k] = row_steps[i][k] * steps[k];
      }
    }
  }
  const int64_t blocks = right.blocks, whole = right.groups, last = right.last_groups;
  const int32_t* starts = right.starts;
  const float* steps = right.steps;
  const Right* b = right.codes;
  for (int64_t k = 0; k < blocks; ++k) {
    vi c[R][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const vi start = kLift ? load<vi>(starts + k * kPanel + v * W) : vi{};
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) c[i][v] = start;
    }
    for (int64_t g = k + 1 < blocks ? whole : last; g > 0; --g) {
      vi w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = held(load<vi>(b + v * W * kGroup));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vi l = broadcast(a + i * row_stride);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) c[i][v] = dot(c[i][v], l, w[v]);
      }
      a += group_stride, b += kPanel * kGroup;
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vf scale = Shared ? splat(products[Shared ? i * V + v : 0][k])
                                : splat(row_steps[i][k]) * load<vf>(steps + k * kPanel + v * W);
        float* to = sums + i * kPanel + v * W;
        store(to, load<vf>(to) + to_float(c[i][v]) * scale);
      }
    }
    __asm__ volatile("" ::: "memory");  // or compilers carry the floats from block to block, by spilling other vectors
  }
}

struct Operands {
  const LeftCodes& left;
  const Right* right;
  const RightSteps& steps;
  const Blocks& blocks;
  const float* row_step;  // (ceil(m ÷ row_run), blocks)
  int64_t row_run;

  // Blocks first … first + count − 1 of a panel.
  Panel part(int64_t p, int64_t first, int64_t count) const {
    const int64_t at = first * kPanel;
    return {right + (p * blocks.groups() + blocks.first_group(first)) * kPanel * kGroup,
            kLift ? steps.starts.get() + p * blocks.count * kPanel + at : nullptr,
            steps.steps.get() + p * steps.stride(blocks) + (steps.shared ? first : at),
            blocks.count,
            count,
            blocks.size / kGroup,
            blocks.groups_of(first + count - 1)};
  }

  // Rows `row` … `end` − 1 in tiles of R rows and then of fewer.
  template <int R, int V, bool Shared>
  void rows(int64_t row, int64_t end, int64_t first, const Panel& part, float* sums) const {
    for (; row + R <= end; row += R, sums += R * kPanel) {
      const float* row_steps[R];
      for (int i = 0; i < R; ++i) row_steps[i] = row_step + (row + i) / row_run * blocks.count + first;
      const Left* a = left.first + row * left.row_stride + blocks.first_group(first) * left.group_stride;
      tile<R, V, Shared>(a, left.row_stride, left.group_stride, row_steps, part, sums);
    }
    if constexpr (R > 1) rows<R / 2, V, Shared>(row, end, first, part, sums);
  }

  template <bool Shared>
  void rows(int64_t row, int64_t end, int64_t columns, int64_t first, const Panel& part, float* sums) const {
    if (columns <= W) return rows<kTile<1>, 1, Shared>(row, end, first, part, sums);
    if (columns <= 2 * W) return rows<kTile<2>, 2, Shared>(row, end, first, part, sums);
    rows<kTile<kVectors>, kVectors, Shared>(row, end, first, part, sums);
  }

  // sums (end − row, kPanel) of one panel, at least the first `columns`, by slices of blocks.
  void panel(int64_t p, int64_t row, int64_t end, int64_t columns, float* sums) const {
    std::memset(sums, 0, (end - row) * kPanel * sizeof *sums);
    int64_t slice = kSlice / blocks.size;
    slice = slice < 1 ? 1 : slice > kMostBlocks ? kMostBlocks : slice;
    for (int64_t first = 0; first < blocks.count; first += slice) {
      const Panel some = part(p, first, blocks.count - first < slice ? blocks.count - first : slice);
      if (steps.shared) {
        rows<true>(row, end, columns, first, some, sums);
      } else {
        rows<false>(row, end, columns, first, some, sums);
      }
    }
  }
};

template <class Out>
void write_row(const float* sums, const float* bias, int64_t n, Out* out) {
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const vf value = load<vf>(sums + j);
    store(out + j, as_stored(bias ? value + load<vf>(bias + j) : value, out));
  }
  if (j == n) return;
  const vf value = load<vf>(sums + j);
  store_part(out + j, as_stored(bias ? value + load_part<vf>(bias + j, n - j) : value, out), n - j);
}

}  // namespace

// out (m, n) of type kFloat32 or kBfloat16, contiguous, as above. a (m, k), b (k, n): signed codes, one stride of each is
// 1. a_step (ceil(m ÷ a_run), blocks): a row's steps are those of its run; b_step (blocks, ceil(n ÷ b_run)). bias (n,)
// or null. Blocks of `block` k, of which the last may be shorter: a multiple of 4, at most 2¹⁶, so that a sum fits int32.
FQT_API int fqt_blocked_matmul(const uint8_t* a, int64_t a_row_stride, int64_t a_column_stride, const float* a_step,
                               int64_t a_run, const uint8_t* b, int64_t b_row_stride, int64_t b_column_stride,
                               const float* b_step, int64_t b_run, int64_t m, int64_t n, int64_t k, int64_t block,
                               const float* bias, int type, void* out, int threads) {
  if (block < 4 || block % 4 || block > 1 << 16 || a_run < 1 || b_run < 1) return kBadIndex;
  if (m == 0 || n == 0) return kDone;
  const Blocks blocks(k, block);
  const int64_t panels = ceil_div(n, kPanel);
  LeftCodes left;
  RightSteps steps;
  Buffer<Right> right = make_buffer<Right>(panels * blocks.groups() * kGroup * kPanel);
  if (!right || !pack_left({a, a_row_stride, a_column_stride}, m, k, threads, &left)) return kNoMemory;
  pack_right({b, b_row_stride, b_column_stride}, RightReader{true, 0}, n, k, threads, right.get());
  if (!prepare_steps(b_step, b_run, n, right.get(), blocks, threads, &steps)) return kNoMemory;
  const Operands operands{left, right.get(), steps, blocks, a_step, a_run};

  const int64_t row_blocks = ceil_div(m, kBlockRows);
  int64_t panels_per_item = 4;
  while (panels_per_item > 1 && row_blocks * ceil_div(panels, panels_per_item) < 8 * threads) panels_per_item /= 2;
  const int64_t column_items = ceil_div(panels, panels_per_item);
  parallel_for(row_blocks * column_items, m * n * k / 256, threads, [&](int64_t item) {
    const int64_t first_row = item / column_items * kBlockRows;
    const int64_t rows = m - first_row < kBlockRows ? m - first_row : kBlockRows;
    const int64_t first_panel = item % column_items * panels_per_item;
    alignas(64) float sums[kBlockRows * kPanel];
    for (int64_t p = first_panel; p < panels && p < first_panel + panels_per_item; ++p) {
      const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
      operands.panel(p, first_row, first_row + rows, columns, sums);
      const float* bias_part = bias ? bias + p * kPanel : nullptr;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (first_row + i) * n + p * kPanel;
        if (type == kFloat32) {
          write_row(sums + i * kPanel, bias_part, columns, static_cast<float*>(out) + at);
        } else {
          write_row(sums + i * kPanel, bias_part, columns, static_cast<uint16_t*>(out) + at);
        }
      }
    }
  });
  return kDone;
}
