// Which rows belong together.
#pragma once

#include <cstdint>
#include <vector>

namespace fqt {

// The rows of group g, ascending: rows[start[g]] … rows[start[g + 1] − 1].
struct RowGroups {
  std::vector<int64_t> start, rows;

  // 0 ≤ group[r] < n, for each of n rows. Throws std::bad_alloc.
  RowGroups(const int64_t* group, int64_t n) : start(n + 1), rows(n) {
    for (int64_t r = 0; r < n; ++r) ++start[group[r] + 1];
    for (int64_t g = 0; g < n; ++g) start[g + 1] += start[g];
    std::vector<int64_t> next(start.begin(), start.end());
    for (int64_t r = 0; r < n; ++r) rows[next[group[r]]++] = r;
  }
  const int64_t* of(int64_t g) const { return rows.data() + start[g]; }
  int64_t size(int64_t g) const { return start[g + 1] - start[g]; }
};

}  // namespace fqt
