// Streams of random integers.
#include "common/parallel.h"
#include "common/platform.h"
#include "quantize/philox.h"

using namespace fqt;

// out: (n,) the first n words of a stream of *seed, shifted right by `shift` (8 leaves 24-bit integers).
FQT_API int fqt_random(const int64_t* seed, uint32_t stream, int shift, int64_t n, uint32_t* out, int threads) {
  constexpr int64_t kChunk = 1 << 12;
  const Philox philox(static_cast<uint64_t>(*seed), stream);
  parallel_for(ceil_div(n, kChunk), n, threads, [&](int64_t chunk) {
    const int64_t end = n < (chunk + 1) * kChunk ? n : (chunk + 1) * kChunk;
    int64_t i = chunk * kChunk;
    for (; i + kNoiseWords <= end; i += kNoiseWords) philox.words<1>(i / 4, shift, out + i);
    if (i < end) {
      uint32_t last[kNoiseWords];
      philox.words<1>(i / 4, shift, last);
      std::memcpy(out + i, last, 4 * (end - i));
    }
  });
  return kDone;
}
