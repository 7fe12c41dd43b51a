// Vectors of the width of this build's instruction set.
//
// The same sources are built once per instruction set (see setup.py), each build into a library of its own, so
// that no inline function compiled for a newer set can end up in an older path. The loops are written with the
// vector extensions of GCC and Clang: they mean the same IEEE operations at every width.
#pragma once

#include <cstdint>
#include <cstring>

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

inline vf splat(float a) { return vf{} + a; }
inline vi splat(int32_t a) { return vi{} + a; }
inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }
inline vi to_int(vf v) { return __builtin_convertvector(v, vi); }  // truncates
inline vf largest(vf a, vf b) { return a > b ? a : b; }   // b if either is NaN
inline vf least(vf a, vf b) { return a < b ? a : b; }     // b if either is NaN

}  // namespace fqt
