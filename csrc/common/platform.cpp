// What this machine can run, and what this build is.
#include "common/platform.h"

#include <pthread.h>

#include "common/parallel.h"
#include "common/simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fqt {

static bool is_forked = false;

static void mark_forked() { is_forked = true; }

__attribute__((constructor)) static void watch_forks() { pthread_atfork(nullptr, nullptr, mark_forked); }

bool forked() { return is_forked; }

#if defined(__x86_64__)
// Register state that the operating system saves on a context switch. Asking the processor alone is not enough.
static uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Whether this process may use the tiles of AMX: Linux keeps them off until a process asks.
static bool may_use_tiles(uint64_t state) {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  constexpr uint64_t kTileState = 3 << 17;
  return (state & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The set of levels, bit by bit.
static int x86_levels() {
  uint32_t a, b, c, d;
  int found = 1 << kPortable;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
  const uint64_t state = saved_state();
  if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return found;
  found |= 1 << kAvx2;
  uint32_t more = 0, none;
  constexpr uint32_t kAvxVnniUnit = 1 << 4;
  if (a >= 1 && __get_cpuid_count(7, 1, &more, &none, &none, &none) && (more & kAvxVnniUnit)) found |= 1 << kAvxVnni;
  const uint32_t needs_b = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  const bool wide = (state & 0xe6) == 0xe6 && (b & needs_b) == needs_b && (c & bit_AVX512VNNI);
  if (!wide) return found;
  found |= 1 << kAvx512;
  constexpr uint32_t kTileUnit = 1 << 24, kTileBytes = 1 << 25;
  return (d & kTileUnit) && (d & kTileBytes) && may_use_tiles(state) ? found | 1 << kAmx : found;
}
#elif defined(__aarch64__) && defined(__linux__)
// The same. Compilers use the atomic instructions of Armv8.1 where they may use the dot product.
static int arm_levels() {
  constexpr uint64_t kAtomics = 1 << 8, kDotProduct = 1 << 20, kMatrixProduct = 1 << 13;  // of HWCAP and HWCAP2
  int found = 1 << kPortable;
  if (~getauxval(AT_HWCAP) & (kAtomics | kDotProduct)) return found;
  found |= 1 << kNeon;
  return getauxval(AT_HWCAP2) & kMatrixProduct ? found | 1 << kI8mm : found;
}
#endif

}  // namespace fqt

// The levels that this machine runs, a bit each: 0 portable, 1 AVX2, 2 AVX-VNNI, 3 AVX-512 with VNNI, 4 that and AMX, 5 NEON
// with the dot product, 6 that and i8mm. A machine with AVX-512 need not have AVX-VNNI. Of Arm's levels Linux alone tells.
FQT_API int fqt_cpu_levels() {
#if defined(__x86_64__)
  return fqt::x86_levels();
#elif defined(__aarch64__) && defined(__linux__)
  return fqt::arm_levels();
#else
  return 1 << fqt::kPortable;
#endif
}

// Python refuses a library built from other sources than its own.
FQT_API int fqt_abi() { return FQT_ABI; }
