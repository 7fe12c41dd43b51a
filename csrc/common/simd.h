// Vectors of the width of this build's instruction set.
//
// The same sources are built once per instruction set (see setup.py), each build into a library of its own, so
// that no inline function compiled for a newer set can end up in an older path. The loops are written with the
// vector extensions of GCC and Clang: they mean the same IEEE operations at every width.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fqt {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef int8_t vs __attribute__((vector_size(W)));

// Loads and stores at any alignment.
template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n < W lanes, zeros in the others.
template <class V>
inline V load_part(const void* p, int64_t n) {
  V v = {};
  std::memcpy(&v, p, n * (sizeof v / W));
  return v;
}

template <class V>
inline void store_part(void* p, V v, int64_t n) {
  std::memcpy(p, &v, n * (sizeof v / W));
}

inline vf splat(float a) { return a - vf{}; }  // not a + 0, which is no copy for a = −0
inline vi splat(int32_t a) { return vi{} + a; }
inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }
inline vi to_int(vf v) { return __builtin_convertvector(v, vi); }  // truncates

// The low byte of every lane, and back. GCC 12 takes the generic conversion apart lane by lane.
inline vb to_bytes(vi v) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8(
      (__m256i)v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                   0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  vb bytes;
  std::memcpy(&bytes, &both, sizeof bytes);
  return bytes;
#elif defined(__SSE2__)
  const __m128i low = _mm_and_si128((__m128i)v, _mm_set1_epi32(0xff));
  const __m128i words = _mm_packs_epi32(low, low);
  const int32_t bits = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  vb bytes;
  std::memcpy(&bytes, &bits, sizeof bytes);
  return bytes;
#elif defined(__aarch64__)
  const uint8x8_t low = vmovn_u16(vcombine_u16(vmovn_u32((uint32x4_t)v), vdup_n_u16(0)));
  vb bytes;
  std::memcpy(&bytes, &low, sizeof bytes);
  return bytes;
#else
  return __builtin_convertvector((vu)v, vb);
#endif
}

template <bool Signed>
inline vi from_bytes(vb v) {
#if defined(__AVX512F__)
  return (vi)(Signed ? _mm512_cvtepi8_epi32((__m128i)v) : _mm512_cvtepu8_epi32((__m128i)v));
#elif defined(__AVX2__)
  __m128i bytes = _mm_setzero_si128();
  std::memcpy(&bytes, &v, sizeof v);
  return (vi)(Signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE2__)
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const __m128i bytes = _mm_cvtsi32_si128(bits), doubled = _mm_unpacklo_epi8(bytes, bytes);
  const __m128i top = _mm_unpacklo_epi16(doubled, doubled);  // each byte four times
  return (vi)(Signed ? _mm_srai_epi32(top, 24) : _mm_srli_epi32(top, 24));
#elif defined(__aarch64__)
  uint8x8_t bytes = vdup_n_u8(0);
  std::memcpy(&bytes, &v, sizeof v);
  if (Signed) return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes))));
  return (vi)vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
#else
  return Signed ? __builtin_convertvector((vs)v, vi) : __builtin_convertvector(v, vi);
#endif
}

inline vi from_halves(vh v) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(__aarch64__)
  return (vi)vmovl_u16((uint16x4_t)v);
#else
  return (vi)__builtin_convertvector(v, vu);
#endif
}

// Whether a lane is not zero.
inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  int32_t set = 0;
  for (int j = 0; j < W; ++j) set |= mask[j];
  return set != 0;
#endif
}

inline vf largest(vf a, vf b) { return a > b ? a : b; }   // b if either is NaN
inline vf least(vf a, vf b) { return a < b ? a : b; }     // b if either is NaN

}  // namespace fqt
