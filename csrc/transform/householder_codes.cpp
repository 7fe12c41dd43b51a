// Codes of rows mixed by block Householder reflections; fqt/quant/transform.py is the definition of the grouping and
// of the scales, operation by operation.
#include <algorithm>
#include <cmath>
#include <new>

#include "common/platform.h"
#include "transform/mixed.h"
#include "transform/reflection.h"
#include "transform/roots.h"

using namespace fqt;

namespace {

static_assert(kReflected >= kPieceColumns, "a piece is reflected at once");

struct ReflectedGroups {
  SourceRows rows;
  const RowGroups* groups;
  const float *normal, *factor;

  const int64_t* members(int64_t g) const { return groups->of(g); }
  int64_t strip(int64_t g) const { return strip_columns(groups->size(g), rows.columns); }
  bool whole(int64_t g) const { return strip(g) == rows.columns; }
  int64_t scratch_floats(int64_t, int64_t width) const { return width + W; }

  // The scratch takes the sums; rows are read again for their pieces, from the cache.
  void prepare(int64_t g, int64_t first, int64_t width, float* scratch) const {
    for (int64_t j = 0; j < width; j += kReflected) {
      const int64_t n = width - j < kReflected ? width - j : kReflected;
      reflection_sum<true>(rows, members(g), groups->size(g), normal, factor[g], first + j, n, scratch + j);
    }
  }
  const float* piece(int64_t g, int64_t i, int64_t first, int64_t j, int64_t n, int64_t, const float* scratch,
                     float* buffer) const {
    const int64_t r = members(g)[i];
    reflect_row<true>(rows, r, normal[r], scratch + j, first + j, n, [=](int64_t k, vf v) { store(buffer + k, v); });
    return buffer;
  }
};

// Each row's group, whether it is its group's large row; of each group that has rows: how many, the large row's size and
// the largest small one's.
struct Grouping {
  std::vector<int64_t> group;
  std::vector<bool> large;
  std::vector<double> rows, big, small;

  explicit Grouping(const PlainRows& plain);
};

Grouping::Grouping(const PlainRows& plain)
    : group(plain.size.size()), large(group.size()), rows(group.size()), big(group.size()), small(group.size()) {
  const int64_t n = group.size();
  const std::vector<int64_t> order = plain.by_size();
  std::vector<double> total(n);
  int64_t count = 0;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    big[i] = plain.size[order[i]];
    sum += big[i];
    total[i] = sum;
    if (static_cast<double>(n - 1 - i) * big[i] > sum) count = i + 1;
  }
  // Where the small rows of large row j end, counted among the small ones.
  std::vector<int64_t> boundary(n, n + 1);
  for (int64_t j = 0; j < count; ++j) {
    boundary[j] = static_cast<int64_t>(std::floor(static_cast<double>(n - count) * total[j] / total[count - 1] + 0.5));
  }
  int64_t owner = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t g = i;
    if (i >= count && count > 0) {
      while (owner < n && boundary[owner] <= i - count) ++owner;
      g = owner;
    }
    group[order[i]] = g;
    large[order[i]] = i < count;
    rows[g] += 1;
  }
  for (int64_t g = 0; g < n; ++g) {
    const int64_t first = count + (g ? boundary[g - 1] : 0);
    small[g] = big[std::min(first, n - 1)];
  }
}

// s1 of a group's large row and s2 of its small ones.
void scales(double k, double big, double small, bool rigorous, double* large_scale, double* small_scale) {
  const double root = square_root(std::max(k, 2.0));
  double w2;
  if (rigorous) {
    w2 = small * (k - 1) / root;
  } else {
    const double three = std::max(k, 3.0);
    const double off_diagonal = k > 2 ? 1 / (three - square_root(three)) : 0.0;
    const double diagonal = std::fabs(1 - 1 / (std::max(k, 2.0) - root));
    w2 = small * std::max(std::max(off_diagonal, diagonal), 1 / root);
  }
  *large_scale = inverse_cube_root(big / root);
  *small_scale = w2 > 0 ? inverse_cube_root(w2 / std::max(k - 1, 1.0)) : 1.0;
}

}  // namespace

// rigorous: the model of the small rows' range. group, normal, factor: results, one per row; the normal is 0 where rows
// stay plain. At least one entry.
FQT_API int fqt_householder_codes(const Source* source, int64_t rows, int64_t columns, int rigorous, Mixed* how,
                                  int64_t* group, float* normal, float* factor, int threads) try {
  const PlainRows plain(*source, rows, columns, threads);
  how->finite = plain.finite;
  if (!plain.finite) return kDone;
  const Grouping grouping(plain);
  std::copy(grouping.group.begin(), grouping.group.end(), group);

  std::vector<double> f(rows), large(rows), small(rows), spread(rows);
  for (int64_t g = 0; g < rows; ++g) {
    f[g] = 1 / (1 - 1 / square_root(std::max(grouping.rows[g], 2.0)));
    factor[g] = static_cast<float>(f[g]);
    if (grouping.rows[g] <= 1) continue;
    scales(grouping.rows[g], grouping.big[g], grouping.small[g], rigorous != 0, &large[g], &small[g]);
  }
  std::vector<RowScaling> scaling(rows);
  std::vector<double> inverse(rows), weight(rows), cost(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t g = group[r];
    const bool in_block = grouping.rows[g] > 1;
    const double root = square_root(std::max(grouping.rows[g], 2.0));
    const double entry = in_block ? (grouping.large[r] ? 1 / root - 1 : 1 / root) : 0.0;
    double scale = !in_block ? 1.0 : grouping.large[r] ? large[g] : small[g];
    if (plain.constant(r)) scale = 0.0;
    inverse[r] = scale == 0 ? 0.0 : 1 / scale;
    scaling[r] = plain.scaling(r, scale);
    normal[r] = static_cast<float>(entry);
    weight[r] = entry * entry;
    spread[g] += weight[r] * (inverse[r] * inverse[r]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t g = group[r];
    cost[r] = inverse[r] * inverse[r] * (1 - 2 * f[g] * weight[r]) + f[g] * f[g] * weight[r] * spread[g];
  }
  const RowGroups groups(group, rows);
  const ReflectedGroups mixer{{source, columns, nullptr, scaling.data()}, &groups, normal, factor};
  const int status = mixed_codes(mixer, groups, rows, plain, inverse, cost, *source, columns, *how, threads);
  for (int64_t r = 0; r < rows; ++r) normal[r] = how->keep[r] ? normal[r] : 0.0f;
  return status;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}
