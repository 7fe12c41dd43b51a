// Threads: torch's own pool, shared because both libraries resolve the OpenMP runtime that torch has loaded.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fqt {

enum Status : int { kDone = 0, kNoMemory = 1, kBadIndex = 2 };

constexpr int64_t kGrain = 1 << 14;  // entries below which a second thread costs more than it saves

// True in a process forked from one that had loaded this library: the thread pool did not survive the fork, and
// OpenMP would wait for its threads for ever.
bool forked();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A run of items that threads take from the front.
struct alignas(64) Queue {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls f(i) for i in 0 … n − 1, each once, in no particular order. `work` is the size of the whole in entries.
//
// Every thread begins with a run of its own, the same one as in torch's loops, since cores may have no cache in common
// with what they worked on before in it; who has finished helps the others.
template <class F>
void parallel_for(int64_t n, int64_t work, int threads, const F& f) {
  if (threads > work / kGrain) threads = static_cast<int>(work / kGrain);
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1 || forked()) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#ifdef _OPENMP
  constexpr int kQueues = 64;
  const int queues = threads < kQueues ? threads : kQueues;
  Queue queue[kQueues];
  for (int q = 0; q < queues; ++q) queue[q].next = n * q / queues, queue[q].end = n * (q + 1) / queues;
#pragma omp parallel num_threads(threads)
  for (int k = 0, first = omp_get_thread_num(); k < queues; ++k) {
    Queue& mine = queue[(first + k) % queues];
    for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.end;) f(i);
  }
#else
  for (int64_t i = 0; i < n; ++i) f(i);
#endif
}

}  // namespace fqt
