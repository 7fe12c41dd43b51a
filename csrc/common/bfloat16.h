// bfloat16, the upper half of a float32.
#pragma once

#include "common/simd.h"

namespace fqt {

inline vf from_bfloat16(vh v) { return (vf)(from_halves(v) << 16); }

// The nearest bfloat16, ties to even, in the upper half; not for NaNs.
inline vu round_upper(vf value) {
  const vu bits = (vu)value;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// The nearest bfloat16, ties to even; one NaN for all NaNs, as torch has it.
inline vh to_bfloat16(vf value) {
  const vu bits16 = value == value ? round_upper(value) >> 16 : vu{} + 0x7fc0;
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)bits16);  // GCC 12 takes the generic conversion apart lane by lane
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits16, (__m256i)bits16);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#elif defined(__aarch64__)
  return (vh)vmovn_u32((uint32x4_t)bits16);
#else
  return __builtin_convertvector(bits16, vh);
#endif
}

// Two vectors of them, next to one another.
inline void store_bfloat16(uint16_t* out, vf first, vf second) {
#if defined(__AVX512BW__)
  if (__builtin_expect(!_mm512_cmp_ps_mask((__m512)first, (__m512)second, _CMP_UNORD_Q), 1)) {  // no NaN
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i upper = _mm512_load_si512(kUpper);
    const __m512i a = (__m512i)round_upper(first), b = (__m512i)round_upper(second);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, upper, b));
    return;
  }
#endif
  store(out, to_bfloat16(first));
  store(out + W, to_bfloat16(second));
}

}  // namespace fqt
