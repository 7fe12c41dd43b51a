// Roots as fqt/kernels/roots.py has them, operation by operation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fqt {

inline double square_root(double x) { return x * (1.0 / std::sqrt(x)); }

// x^(−1/3) for x > 0: a first guess by dividing the exponent by −3, off by 3.4 % at most, and four Newton steps.
inline double inverse_cube_root(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = 0x553ef0f600000000 - bits / 3;
  double y;
  std::memcpy(&y, &bits, sizeof y);
  for (int step = 0; step < 4; ++step) y = y + y * ((1 - x * y * y * y) * (1.0 / 3.0));
  return y;
}

}  // namespace fqt
