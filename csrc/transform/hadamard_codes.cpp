// Codes of rows scaled by λ^(−1/2), with random signs, and mixed by Hadamard blocks; fqt/quant/transform.py is its
// definition, operation by operation.
#include <cmath>
#include <new>

#include "common/platform.h"
#include "transform/mixed.h"

using namespace fqt;

namespace {

struct HadamardBlocks {
  SourceRows rows;
  const int64_t* start;  // of a block's rows in rows.order

  int64_t size(int64_t b) const { return start[b + 1] - start[b]; }
  const int64_t* members(int64_t b) const { return rows.order + start[b]; }
  int64_t strip(int64_t b) const { return strip_columns(size(b), rows.columns); }
  bool whole(int64_t b) const { return strip(b) == rows.columns; }
  int64_t scratch_floats(int64_t b, int64_t width) const { return size(b) * scratch_stride(width); }

  void prepare(int64_t b, int64_t first, int64_t width, float* scratch) const {
    SourceRows block = rows;
    block.order = members(b);
    const int64_t stride = scratch_stride(width);
    mix_strip<true>(block, size(b), first, width, scratch,
                    [=](int64_t i, int64_t j, vf v) { store(scratch + i * stride + j, v); });
  }
  const float* piece(int64_t, int64_t i, int64_t, int64_t j, int64_t, int64_t width, const float* scratch,
                     float*) const {
    return scratch + i * scratch_stride(width) + j;
  }
};

// ±1 by the first bit of a word per row.
std::vector<double> random_signs(uint64_t seed, int64_t rows) {
  std::vector<uint32_t> words(rows + kNoiseWords);
  const Philox philox(seed, kSign);
  for (int64_t i = 0; i < rows; i += kNoiseWords) philox.words<1>(i / 4, 31, words.data() + i);
  std::vector<double> signs(rows);
  for (int64_t r = 0; r < rows; ++r) signs[r] = words[r] ? -1.0 : 1.0;
  return signs;
}

}  // namespace

// Blocks of the given sizes, powers of two that sum to rows; position i takes the row of rank deal[i] by size, 0 the
// largest. order: result, the rows block by block. At least one entry. kBadIndex unless the sizes are such.
FQT_API int fqt_hadamard_codes(const Source* source, int64_t rows, int64_t columns, const int64_t* deal,
                               const int64_t* sizes, int64_t blocks, Mixed* how, int64_t* order, int threads) try {
  std::vector<int64_t> start(blocks + 1), group(rows);
  for (int64_t b = 0; b < blocks; ++b) {
    if (sizes[b] < 1 || (sizes[b] & (sizes[b] - 1))) return kBadIndex;
    start[b + 1] = start[b] + sizes[b];
  }
  if (start[blocks] != rows) return kBadIndex;
  const PlainRows plain(*source, rows, columns, threads);
  how->finite = plain.finite;
  if (!plain.finite) return kDone;
  const std::vector<int64_t> by_size = plain.by_size();
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = start[b]; i < start[b + 1]; ++i) {
      if (deal[i] < 0 || deal[i] >= rows) return kBadIndex;
      order[i] = by_size[deal[i]];
      group[order[i]] = b;
    }
  }
  const std::vector<double> sign = random_signs(static_cast<uint64_t>(*how->seed), rows);
  std::vector<RowScaling> scaling(rows);
  std::vector<double> inverse(rows), cost(rows), total(blocks);
  for (int64_t r = 0; r < rows; ++r) {
    const double root = 1.0 / std::sqrt(static_cast<double>(sizes[group[r]]));
    const double scale = plain.constant(r) ? 0.0 : sign[r] * (1.0 / std::sqrt(static_cast<double>(plain.size[r])));
    inverse[r] = scale == 0 ? 0.0 : 1 / scale;
    scaling[r] = plain.scaling(r, scale * root);
    total[group[r]] += inverse[r] * inverse[r];
    inverse[r] *= root;
  }
  for (int64_t r = 0; r < rows; ++r) cost[r] = total[group[r]] / static_cast<double>(sizes[group[r]]);
  const HadamardBlocks mixer{{source, columns, order, scaling.data()}, start.data()};
  return mixed_codes(mixer, RowGroups(group.data(), rows), blocks, plain, inverse, cost, *source, columns, *how, threads);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}
