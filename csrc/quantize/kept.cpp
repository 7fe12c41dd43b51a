// What is kept of a tensor between a model's products, and the gradients that are made of it: flags as bits, numbers as
// codes in groups of 256 that share a step, with subtractive dither (src/fqt/kernels/kept.py says what each means).
#include <cmath>
#include <memory>

#include "common/memory.h"
#include "common/parallel.h"
#include "common/platform.h"
#include "common/source.h"

using namespace fqt;

namespace {

constexpr int64_t kGroup = 256;
constexpr int64_t kPiece = 1 << 12;  // entries a thread takes at a time, a multiple of the group

// Bit j of the result is lane j of a comparison.
inline uint32_t bits_of(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#elif defined(__aarch64__)
  return vaddvq_u32((uint32x4_t)(mask & vi{1, 2, 4, 8}));
#else
  uint32_t bits = 0;
  for (int j = 0; j < W; ++j) bits |= (mask[j] & 1u) << j;
  return bits;
#endif
}

// The inverse.
inline vi mask_of(uint32_t bits) {
#if defined(__AVX512F__)
  return (vi)_mm512_movm_epi32(static_cast<__mmask16>(bits));
#else
  vi own;
  for (int j = 0; j < W; ++j) own[j] = 1 << j;
  return (splat(static_cast<int32_t>(bits)) & own) == own;
#endif
}

// n floats to results of a source's type, from its flat index on.
inline void put(const float* from, int64_t n, int type, void* out, int64_t start) {
  if (type == kFloat32In) {
    std::memcpy(static_cast<float*>(out) + start, from, n * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + start;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) store_bfloat16(to + j, load<vf>(from + j), load<vf>(from + j + W));
  for (; j < n; j += W) {
    const int64_t left = n - j < W ? n - j : W;
    store_part(to + j, to_bfloat16(load_part<vf>(from + j, left)), left);
  }
}

// Numbers kept as codes.
struct Kept {
  const uint8_t* codes;  // packed, the first number of a byte lowest
  int bits;
  const float *step, *offset;  // of each group; the offset with the group's own dither
  const float* dither;         // (256), the other dither

  // Codes of one group, one in a byte; in `buffer` if they are packed.
  const uint8_t* unpacked(int64_t group, uint8_t* buffer) const {
    if (bits == 8) return codes + group * kGroup;
    if (bits == 4) {
      const uint8_t* from = codes + group * (kGroup / 2);
      for (int j = 0; j < kGroup / 2; ++j) {
        const uint16_t both = static_cast<uint16_t>((from[j] | from[j] << 4) & 0x0f0f);
        std::memcpy(buffer + 2 * j, &both, 2);
      }
    } else {
      const uint8_t* from = codes + group * (kGroup / 4);
      for (int j = 0; j < kGroup / 4; ++j) {
        const uint32_t b = from[j];
        const uint32_t four = (b | b << 6 | b << 12 | b << 18) & 0x03030303u;
        std::memcpy(buffer + 4 * j, &four, 4);
      }
    }
    return buffer;
  }

  // The values of a group.
  void values(int64_t group, float* out) const {
    uint8_t buffer[kGroup];
    const uint8_t* from = unpacked(group, buffer);
    const vf s = splat(step[group]), o = splat(offset[group]);
    for (int64_t j = 0; j < kGroup; j += W) {
      store(out + j, (to_float(from_bytes<false>(load<vb>(from + j))) - load<vf>(dither + j)) * s + o);
    }
  }

  // What the square of a group's entry exceeds its estimand's by.
  float variance(int64_t group) const { return step[group] * step[group] / 12.0f; }

  // n values from the flat index `start` on, and their variances.
  void range(int64_t start, int64_t n, float* out, float* variances) const {
    float group_values[kGroup];
    for (int64_t i = 0; i < n;) {
      const int64_t group = (start + i) / kGroup, at = (start + i) % kGroup;
      const int64_t run = kGroup - at < n - i ? kGroup - at : n - i;
      values(group, group_values);
      std::memcpy(out + i, group_values + at, run * sizeof(float));
      const float v = variance(group);
      for (int64_t j = 0; j < run; ++j) variances[i + j] = v;
      i += run;
    }
  }
};

// Pieces of n entries for threads to take.
template <class F>
void pieces(int64_t n, int threads, const F& f) {
  parallel_for(ceil_div(n, kPiece), n, threads, [&](int64_t p) {
    const int64_t start = p * kPiece;
    f(start, n - start < kPiece ? n - start : kPiece);
  });
}

// The channel of each entry: `inner` neighbours have the same one.
struct Channels {
  int64_t count, inner;

  // Calls f(channel, from, n) for runs of entries start … start + n − 1: of one channel, or of as many as entries.
  template <class F>
  void runs(int64_t start, int64_t n, const F& f) const {
    for (int64_t j = 0; j < n;) {
      const int64_t i = start + j, at = inner == 1 ? i % count : i % inner, end = inner == 1 ? count : inner;
      const int64_t run = end - at < n - j ? end - at : n - j;
      f(inner == 1 ? at : i / inner % count, j, run);
      j += run;
    }
  }
};

struct Sums {
  double plain = 0, weighted = 0;
};

// Σ g and Σ g · (x − mean) over a run of one channel.
inline Sums of_run(const float* g, const float* x, float mean, int64_t n) {
  vf plain = {}, weighted = {};
  const vf m = splat(mean);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const vf a = load<vf>(g + j);
    plain += a, weighted += a * (load<vf>(x + j) - m);
  }
  Sums sums;
  for (int k = 0; k < W; ++k) sums.plain += plain[k], sums.weighted += weighted[k];
  for (; j < n; ++j) sums.plain += g[j], sums.weighted += double(g[j]) * (x[j] - mean);
  return sums;
}

constexpr int64_t kParts = 32;  // sums are made in so many parts, whatever the threads: one result

}  // namespace

// Bit i: whether entry i lets a ReLU's gradient through, which a NaN does.
FQT_API int fqt_positive(const Source* x, int64_t n, uint8_t* flags, int threads) {
  pieces(n, threads, [&](int64_t start, int64_t count) {
    float buffer[kPiece + W];
    const float* from = values(*x, start, count, buffer);
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
      uint32_t bits = 0;
      for (int k = 0; k < 16; k += W) bits |= bits_of(~(load<vf>(from + j + k) <= 0.0f)) << k;
      const uint16_t both = static_cast<uint16_t>(bits);
      std::memcpy(flags + (start + j) / 8, &both, 2);
    }
    for (; j < count; j += 8) {
      uint32_t bits = 0;
      for (int k = 0; k < 8 && j + k < count; ++k) bits |= static_cast<uint32_t>(!(from[j + k] <= 0.0f)) << k;
      flags[(start + j) / 8] = static_cast<uint8_t>(bits);
    }
  });
  return kDone;
}

// Entries whose bit is set, zeros in place of the others.
FQT_API int fqt_gate(const Source* grad, int64_t n, const uint8_t* flags, void* out, int threads) {
  pieces(n, threads, [&](int64_t start, int64_t count) {
    float buffer[kPiece + W], result[kPiece + 16];
    const float* from = values(*grad, start, count, buffer);
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
      uint16_t both;
      std::memcpy(&both, flags + (start + j) / 8, 2);
      for (int k = 0; k < 16; k += W) {
        store(result + j + k, (vf)((vi)load<vf>(from + j + k) & mask_of(both >> k & ((1u << W) - 1))));
      }
    }
    for (; j < count; ++j) result[j] = flags[(start + j) / 8] >> (j % 8) & 1 ? from[j] : 0.0f;
    put(result, count, grad->type, out, start);
  });
  return kDone;
}

// Numbers of 2 or 4 bits, one in a byte, to bytes full of them; n is a multiple of the group.
FQT_API int fqt_pack(const uint8_t* numbers, int64_t n, int bits, uint8_t* packed, int threads) {
  parallel_for(n / kGroup, n, threads, [&](int64_t group) {
    const uint8_t* from = numbers + group * kGroup;
    uint8_t* to = packed + group * (kGroup * bits / 8);
    if (bits == 4) {
      for (int j = 0; j < kGroup / 2; ++j) to[j] = static_cast<uint8_t>(from[2 * j] | from[2 * j + 1] << 4);
    } else {
      for (int j = 0; j < kGroup / 4; ++j) {
        uint32_t four;
        std::memcpy(&four, from + 4 * j, 4);
        to[j] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
      }
    }
  });
  return kDone;
}

// grad · kept.
FQT_API int fqt_kept_times(const Source* grad, int64_t n, const uint8_t* codes, int bits, const float* step,
                           const float* offset, const float* dither, void* out, int threads) {
  const Kept kept{codes, bits, step, offset, dither};
  pieces(n, threads, [&](int64_t start, int64_t count) {
    float buffer[kPiece + W], x[kPiece];
    const float* g = values(*grad, start, count, buffer);
    for (int64_t j = 0; j < count; j += kGroup) kept.values((start + j) / kGroup, x + j);
    for (int64_t j = 0; j < count; ++j) x[j] *= g[j];
    put(x, count, grad->type, out, start);
  });
  return kDone;
}

// Batch normalization's gradients; `weight` may be null.
FQT_API int fqt_kept_batch_norm(const Source* grad, int64_t n, const uint8_t* codes, int bits, const float* step,
                                const float* offset, const float* dither, int64_t channels, int64_t inner,
                                const float* mean, const float* rstd, const float* weight, void* d_x, float* d_weight,
                                float* d_bias, int threads) {
  const Kept kept{codes, bits, step, offset, dither};
  const Channels channel{channels, inner};
  const int64_t groups = ceil_div(n, kGroup), parts = groups < kParts ? groups : kParts;
  std::unique_ptr<double[]> sums(new (std::nothrow) double[2 * channels * parts]());
  std::unique_ptr<float[]> factors(new (std::nothrow) float[4 * channels]);
  if (!sums || !factors) return kNoMemory;
  parallel_for(parts, n, threads, [&](int64_t part) {
    double *plain = sums.get() + 2 * channels * part, *weighted = plain + channels;
    float buffer[kGroup + W], x[kGroup];
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      const int64_t start = group * kGroup, count = n - start < kGroup ? n - start : kGroup;
      const float* g = values(*grad, start, count, buffer);
      kept.values(group, x);
      channel.runs(start, count, [&](int64_t c, int64_t from, int64_t run) {
        if (inner == 1) {
          for (int64_t j = 0; j < run; ++j) {
            plain[c + j] += g[from + j];
            weighted[c + j] += g[from + j] * (x[from + j] - mean[c + j]);
          }
        } else {
          const Sums found = of_run(g + from, x + from, mean[c], run);
          plain[c] += found.plain, weighted[c] += found.weighted;
        }
      });
    }
  });
  // d_x = g · (a + e · variance) − (x − mean) · d − b.
  float *a = factors.get(), *b = a + channels, *d = b + channels, *e = d + channels;
  const double count = static_cast<double>(n) / channels;
  for (int64_t c = 0; c < channels; ++c) {
    double plain = 0, weighted = 0;
    for (int64_t part = 0; part < parts; ++part) {
      plain += sums[2 * channels * part + c], weighted += sums[2 * channels * part + channels + c];
    }
    const double r = rstd[c], scale = weight ? weight[c] * r : r;
    d_weight[c] = static_cast<float>(weighted * r), d_bias[c] = static_cast<float>(plain);
    a[c] = static_cast<float>(scale), b[c] = static_cast<float>(scale * plain / count);
    d[c] = static_cast<float>(scale * r * r * weighted / count), e[c] = static_cast<float>(scale * r * r / count);
  }
  pieces(n, threads, [&](int64_t start, int64_t total) {
    float buffer[kGroup + W], x[kGroup], result[kPiece];
    for (int64_t at = 0; at < total; at += kGroup) {
      const int64_t run_start = start + at, size = total - at < kGroup ? total - at : kGroup;
      const float* g = values(*grad, run_start, size, buffer);
      kept.values(run_start / kGroup, x);
      const float v = kept.variance(run_start / kGroup);
      float* out = result + at;
      channel.runs(run_start, size, [&](int64_t c, int64_t from, int64_t run) {
        if (inner == 1) {
          for (int64_t j = 0; j < run; ++j) {
            const int64_t k = c + j, i = from + j;
            out[i] = g[i] * (a[k] + e[k] * v) - (x[i] - mean[k]) * d[k] - b[k];
          }
        } else {
          const float scale = a[c] + e[c] * v, m = mean[c], slope = d[c], shift = b[c];
          for (int64_t i = from; i < from + run; ++i) out[i] = g[i] * scale - (x[i] - m) * slope - shift;
        }
      });
    }
    put(result, total, grad->type, d_x, start);
  });
  return kDone;
}

// Gradients of a normalization of each row (rows, features); without `mean` by the root mean square. `weight` may be
// null; d_weight and d_bias are (features).
FQT_API int fqt_kept_row_norm(const Source* grad, int64_t rows, int64_t features, const uint8_t* codes, int bits,
                              const float* step, const float* offset, const float* dither, const float* mean,
                              const float* rstd, const float* weight, void* d_x, float* d_weight, float* d_bias,
                              int threads) {
  const Kept kept{codes, bits, step, offset, dither};
  const int64_t parts = rows < kParts ? rows : kParts;
  std::unique_ptr<double[]> sums(new (std::nothrow) double[2 * features * parts]());
  std::unique_ptr<float[]> space(new (std::nothrow) float[parts * 4 * (features + W)]);
  if (!sums || !space) return kNoMemory;
  parallel_for(parts, rows * features, threads, [&](int64_t part) {
    double *to_weight = sums.get() + 2 * features * part, *to_bias = to_weight + features;
    float *buffer = space.get() + part * 4 * (features + W), *x = buffer + features + W;
    float *variances = x + features + W, *scaled = variances + features + W;
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      const int64_t start = row * features;
      const float* g = values(*grad, start, features, buffer);
      kept.range(start, features, x, variances);
      const float m = mean ? mean[row] : 0.0f, r = rstd[row];
      for (int64_t j = 0; j < features; ++j) {
        x[j] = (x[j] - m) * r;
        to_weight[j] += g[j] * x[j];
        to_bias[j] += g[j];
      }
      for (int64_t j = 0; j < features; ++j) scaled[j] = weight ? g[j] * weight[j] : g[j];
      const Sums found = of_run(scaled, x, 0.0f, features);
      const float shift = mean ? static_cast<float>(found.plain / features) : 0.0f;
      const float slope = static_cast<float>(found.weighted / features), self = r * r / features;
      for (int64_t j = 0; j < features; ++j) {
        scaled[j] = r * (scaled[j] * (1.0f + self * variances[j]) - shift - x[j] * slope);
      }
      put(scaled, features, grad->type, d_x, start);
    }
  });
  for (int64_t j = 0; j < features; ++j) {
    double weighted = 0, plain = 0;
    for (int64_t part = 0; part < parts; ++part) {
      weighted += sums[2 * features * part + j], plain += sums[2 * features * part + features + j];
    }
    d_weight[j] = static_cast<float>(weighted), d_bias[j] = static_cast<float>(plain);
  }
  return kDone;
}
