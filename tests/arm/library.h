// A library of kernels, opened as fqt/kernels/cpu/library.py does it, and numbers that are the same on every machine.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "products/products.h"

// The functions of a level: those of one library, but for those that one of products on top of it has.
class Library {
 public:
  Library(const char* path, const char* on_top) : base_(open(path)), top_(on_top ? open(on_top) : nullptr) {}

  // With the type that a header declares: get<decltype(fqt_matmul)>("fqt_matmul").
  template <class Function>
  Function* get(const char* name) const {
    void* found = top_ ? dlsym(top_, name) : nullptr;
    if (!found) found = dlsym(base_, name);
    if (!found) fail(name);
    return reinterpret_cast<Function*>(found);
  }

 private:
  static void* open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) fail(dlerror());
    return library;
  }
  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(1);
  }

  void *base_, *top_;
};

typedef std::vector<uint8_t> Codes;
inline int64_t value(uint8_t code, const fqt::Range& range) {
  return range.is_signed() ? static_cast<int8_t>(code) : code;
}

class Numbers {
 public:
  explicit Numbers(uint64_t seed) : draw_(seed) {}

  // Codes of a range; `extreme`: of its ends alone and mostly of that of the greatest magnitude, whose sums are the largest.
  Codes codes(const fqt::Range& range, int64_t n, bool extreme) {
    Codes found(n);
    const uint64_t count = range.high - range.low + 1;
    const bool low = -range.low > range.high;
    for (uint8_t& code : found) {
      const uint64_t word = draw_() >> 11;
      const int end = (word % 16 != 0) == low ? range.low : range.high;
      code = static_cast<uint8_t>(extreme ? end : range.low + static_cast<int>(word % count));
    }
    return found;
  }

  // Exact multiples of 2⁻¹² in −8 … 8.
  std::vector<float> floats(int64_t n) {
    std::vector<float> found(n);
    for (float& x : found) x = (static_cast<int32_t>(draw_() >> 48) - 32768) * 0x1p-12f;
    return found;
  }

 private:
  std::mt19937_64 draw_;
};
