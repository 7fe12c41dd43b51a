// The C interface: pointers and sizes only, no torch headers, so that one build serves every torch version.
#pragma once

#define FQT_ABI 17  // raised with every change of an exported signature or its meaning; kernels/cpu/library.py holds the same
#define FQT_API extern "C" __attribute__((visibility("default")))

namespace fqt {

enum Level : int { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAmx = 4, kNeon = 5, kI8mm = 6 };
enum OutType : int { kInt32 = 0, kInt64 = 1, kFloat32 = 2, kBfloat16 = 3 };  // of results

}  // namespace fqt
