// bfloat16, the upper half of a float32.
#pragma once

#include "simd.h"

namespace fqt {

typedef uint16_t vh __attribute__((vector_size(2 * W)));

inline vf from_bfloat16(vh v) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
  return (vf)(__builtin_convertvector(v, vu) << 16);
#endif
}

// The nearest bfloat16, ties to even; one NaN for all NaNs, as torch has it.
inline vh to_bfloat16(vf value) {
  const vu bits = (vu)value;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu bits16 = value == value ? rounded : vu{} + 0x7fc0;
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)bits16);  // GCC 12 takes the generic conversion apart lane by lane
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits16, (__m256i)bits16);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(bits16, vh);
#endif
}

}  // namespace fqt
