// Philox4x32-10 (Salmon et al., SC 2011) over vectors of blocks; fqt/kernels/philox.py is its definition.
//
// Each 32-bit word of the state sits in the low half of a 64-bit lane, where the 32 × 32 → 64 multiply reads it;
// the high halves hold leftovers that no multiply sees. A round is then two multiplies, two shifts and two
// three-way xors, with no shuffling between rounds.
#pragma once

#include <cstdint>

#include "common/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fqt {

enum Stream : uint32_t { kRounding = 0, kDitherRow = 1, kDitherColumn = 2, kSign = 3, kRoundingLow = 4 };

constexpr int kBlocks = W / 2;         // blocks per vector
constexpr int kNoiseWords = 4 * kBlocks;  // words per call of Philox::words; a multiple of W

typedef uint64_t vq __attribute__((vector_size(4 * W)));

// Products of the low halves of the lanes.
inline vq multiply_low(vq a, vq b) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline vq xor3(vq a, vq b, vq c) {
#if defined(__AVX512F__)
  return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);  // GCC 12 does not merge them
#else
  return a ^ b ^ c;
#endif
}

// (a0, b0, a1, b1, …): the low or high half of the lanes of a and b, interleaved.
template <bool High>
inline vq interleave(vq a, vq b) {
  vq out;
  for (int i = 0; i < kBlocks; ++i) out[i] = (i & 1 ? b : a)[i / 2 + (High ? kBlocks / 2 : 0)];
  return out;
}

#if defined(__AVX512F__)
template <>
inline vq interleave<false>(vq a, vq b) {
  return (vq)_mm512_permutex2var_epi64((__m512i)a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), (__m512i)b);
}
template <>
inline vq interleave<true>(vq a, vq b) {
  return (vq)_mm512_permutex2var_epi64((__m512i)a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), (__m512i)b);
}
#elif defined(__AVX2__)
template <>
inline vq interleave<false>(vq a, vq b) {
  const __m256i low = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b), high = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  return (vq)_mm256_permute2x128_si256(low, high, 0x20);
}
template <>
inline vq interleave<true>(vq a, vq b) {
  const __m256i low = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b), high = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  return (vq)_mm256_permute2x128_si256(low, high, 0x31);
}
#endif

// One stream of one seed.
class Philox {
 public:
  Philox(uint64_t seed, uint32_t stream) : stream_(stream) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      key_[round][0] = k0;
      key_[round][1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // Words 4·block … 4·block + N·kNoiseWords − 1, shifted right by `shift`: N vectors of blocks side by side, since one
  // round waits for the multiplication of the one before.
  template <int N>
  [[gnu::always_inline]] inline void words(uint64_t block, int shift, uint32_t* out) const {
    vq c0[N], c1[N], c2[N], c3[N];
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < kBlocks; ++i) c0[n][i] = i;
      c0[n] += block + n * kBlocks;
      c1[n] = c0[n] >> 32;
      c2[n] = vq{} + stream_;
      c3[n] = vq{};
    }
    const vq m0 = vq{} + 0xD2511F53u, m1 = vq{} + 0xCD9E8D57u;
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const vq k0 = vq{} + key_[round][0], k1 = vq{} + key_[round][1];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const vq p0 = multiply_low(c0[n], m0), p1 = multiply_low(c2[n], m1);
        c0[n] = xor3(p1 >> 32, c1[n], k0);
        c1[n] = p1;
        c2[n] = xor3(p0 >> 32, c3[n], k1);
        c3[n] = p0;
      }
    }
    for (int n = 0; n < N; ++n) {
      const vq first = (c0[n] & 0xffffffffu) | (c1[n] << 32), second = (c2[n] & 0xffffffffu) | (c3[n] << 32);
      store(out + n * kNoiseWords, (vu)interleave<false>(first, second) >> shift);
      store(out + n * kNoiseWords + W, (vu)interleave<true>(first, second) >> shift);
    }
  }

  // n words from the first of `block` on, shifted right by `shift`; may write up to kNoiseWords − 1 more.
  [[gnu::always_inline]] inline void fill(uint64_t block, int64_t n, int shift, uint32_t* out) const {
    int64_t i = 0;
    for (; i + kTogether * kNoiseWords <= n; i += kTogether * kNoiseWords) words<kTogether>(block + i / 4, shift, out + i);
    for (; i < n; i += kNoiseWords) words<1>(block + i / 4, shift, out + i);
  }

 private:
  static constexpr int kRounds = 10;
#if defined(__AVX512F__)
  static constexpr int kTogether = 4;  // 16 vectors of state: half the registers
#else
  static constexpr int kTogether = 2;
#endif
  uint64_t key_[kRounds][2];
  uint32_t stream_;
};

}  // namespace fqt
