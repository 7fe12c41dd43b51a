// Threads: torch's own pool, shared because both libraries resolve the OpenMP runtime that torch has loaded.
#pragma once

#include <cstdint>

namespace fqt {

enum Status : int { kDone = 0, kNoMemory = 1, kBadIndex = 2 };

constexpr int64_t kGrain = 1 << 14;  // entries below which a second thread costs more than it saves

// True in a process forked from one that had loaded this library: the thread pool did not survive the fork, and
// OpenMP would wait for its threads for ever.
bool forked();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i) for i in 0 … n − 1, each once, in no particular order. `work` is the size of the whole in entries.
template <class F>
void parallel_for(int64_t n, int64_t work, int threads, const F& f) {
  if (threads > work / kGrain) threads = static_cast<int>(work / kGrain);
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1 || forked()) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace fqt
