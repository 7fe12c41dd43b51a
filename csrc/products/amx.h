// block_of on tiles of AMX: 16 rows × 64 k times 64 k × 16 columns, any signs. Included by dot.h.
//
// A right panel's groups are the rows of a tile as they are. A left tile is 16 rows of 64 bytes at equal distances;
// where they are not (the taps of a convolution at an edge), they are gathered. Sums start from left operands that
// are padded with zeros, so what the right tile holds beyond the last group does not matter, as long as it can be read.
#pragma once

#include <immintrin.h>

#include "products/dot.h"

namespace fqt {

// Tiles 0 … 3 hold sums, 4 a left tile, 5 and 6 right ones.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int i = 0; i < 8; ++i) bytes_per_row[i] = 64, rows[i] = 16;
  }
};

// The tiles of this thread while it lives: other libraries configure them too, and idle ones cost nothing.
class Tiles {
 public:
  Tiles() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Compilers do not know that tile instructions read and write memory.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

constexpr int kSumStride = kPanel * sizeof(int32_t), kRightStride = kPanel * kGroup;

inline void begin_tile(const int32_t* sums, bool add) {
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  memory_barrier();
  _tile_loadd(0, sums, kSumStride);
  _tile_loadd(1, sums + 16, kSumStride);
  _tile_loadd(2, sums + 32, kSumStride);
  _tile_loadd(3, sums + 48, kSumStride);
}

inline void end_tile(int32_t* sums) {
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + 16, kSumStride);
  _tile_stored(2, sums + 32, kSumStride);
  _tile_stored(3, sums + 48, kSumStride);
  memory_barrier();
}

#define FQT_MULTIPLY(dot)                      \
  _tile_loadd(4, left, left_stride);           \
  _tile_loadd(5, right, kRightStride);         \
  _tile_loadd(6, right + 64, kRightStride);    \
  dot(0, 4, 5);                                \
  dot(1, 4, 6);                                \
  _tile_loadd(5, right + 128, kRightStride);   \
  _tile_loadd(6, right + 192, kRightStride);   \
  dot(2, 4, 5);                                \
  dot(3, 4, 6)

// Adds 16 rows × 64 k, `left_stride` bytes from row to row, times 64 k of a panel.
template <bool LeftSigned, bool RightSigned>
inline void multiply(const Left* left, int64_t left_stride, const Right* right) {
  if constexpr (LeftSigned && RightSigned) {
    FQT_MULTIPLY(_tile_dpbssd);
  } else if constexpr (LeftSigned) {
    FQT_MULTIPLY(_tile_dpbsud);
  } else if constexpr (RightSigned) {
    FQT_MULTIPLY(_tile_dpbusd);
  } else {
    FQT_MULTIPLY(_tile_dpbuud);
  }
}
#undef FQT_MULTIPLY

constexpr int64_t ceil_tiles(int64_t groups) { return (groups * kGroup + kTerms - 1) / kTerms; }

// The left tile of rows i … i + 15 and k 64·t …
inline const Left* tile(const LeftStrided& left, int64_t i, int64_t t) { return left.row(0, i) + t * kTerms; }
inline const Left* tile(const LeftInterleaved& left, int64_t i, int64_t t) {
  return left.first + t * 16 * left.stride + i * kGroup;
}

template <bool LeftSigned, bool RightSigned, class Source, class Done>
void tiles_of(const Source& left, int64_t rows, int64_t, int64_t groups, const Right* right, int32_t* sums, bool add,
              const Done& done) {
  for (int64_t i = 0; i < rows; i += 16) {
    begin_tile(sums + i * kPanel, add);
    for (int64_t t = 0; t < ceil_tiles(groups); ++t) {
      multiply<LeftSigned, RightSigned>(tile(left, i, t), left.stride, right + t * kTerms * kPanel);
    }
    end_tile(sums + i * kPanel);
    done(i, rows - i < 16 ? rows - i : 16);
  }
}

// Terms that gathered rows of a tile can have, and what is added so that rows do not share cache sets.
constexpr int64_t kMostGathered = 1024, kGatheredStride = kMostGathered + 64;

// Short copies: a call, or the string instruction that compilers put here, costs more than they do.
inline void copy_bytes(Left* to, const Left* from, int64_t n) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  const __mmask64 rest = (uint64_t{1} << (n - i)) - 1;
  if (rest) _mm512_mask_storeu_epi8(to + i, rest, _mm512_maskz_loadu_epi8(rest, from + i));
}

// The distance of `rows` ≤ 16 pointers from one to the next, if it is one and all 16 rows may be read; else 0.
inline int64_t distance(const Left* const* row, int64_t rows) {
  if (rows < 16) return 0;
  const __m512i low = _mm512_loadu_si512(row), high = _mm512_loadu_si512(row + 8);
  const int64_t step = row[1] - row[0];
  const __m512i steps = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(step));
  const __m512i wanted = _mm512_add_epi64(_mm512_set1_epi64(reinterpret_cast<int64_t>(row[0])), steps);
  const __m512i wanted_high = _mm512_add_epi64(wanted, _mm512_set1_epi64(8 * step));
  return _mm512_cmpneq_epi64_mask(low, wanted) | _mm512_cmpneq_epi64_mask(high, wanted_high) ? 0 : step;
}

template <bool LeftSigned, bool RightSigned, class Done>
void tiles_of(const LeftRows& left, int64_t rows, int64_t taps, int64_t groups, const Right* right, int32_t* sums,
              bool add, const Done& done) {
  alignas(64) Left gathered[16 * kGatheredStride];
  const int64_t depth = groups * kGroup, terms = taps * depth;
  for (int64_t i = 0; i < rows; i += 16) {
    const int64_t n = rows - i < 16 ? rows - i : 16;
    begin_tile(sums + i * kPanel, add);
    if (depth % kTerms == 0) {
      const Right* from = right;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Left* first = left.row(tap, i);
        int64_t stride = distance(left.rows + tap * left.stride + i, n);
        if (stride == 0) {
          for (int64_t r = 0; r < n; ++r) copy_bytes(gathered + r * kGatheredStride, left.row(tap, i + r), depth);
          memory_barrier();
          first = gathered, stride = kGatheredStride;
        }
        for (int64_t d = 0; d < depth; d += kTerms, from += kTerms * kPanel) {
          multiply<LeftSigned, RightSigned>(first + d, stride, from);
        }
      }
    } else {
      for (int64_t r = 0; r < n; ++r) {
        Left* to = gathered + r * kGatheredStride;
        for (int64_t tap = 0; tap < taps; ++tap) copy_bytes(to + tap * depth, left.row(tap, i + r), depth);
        std::memset(to + terms, 0, (kTerms - terms % kTerms) % kTerms);
      }
      memory_barrier();
      for (int64_t t = 0; t < terms; t += kTerms) {
        multiply<LeftSigned, RightSigned>(gathered + t, kGatheredStride, right + t * kPanel);
      }
    }
    end_tile(sums + i * kPanel);
    done(i, n);
  }
}

// As in dot.h, all columns of the panel. LeftRows of at most kMostGathered terms; sums has room for whole tiles of rows.
template <class Source, class Done>
inline void block_of(const Source& left, const Plan& p, int64_t rows, int64_t, int64_t taps, int64_t groups,
                     const Right* right, int32_t* sums, bool add, const Done& done) {
  const Tiles tiles;
  memory_barrier();
  if (p.left_signed) {
    if (p.right_signed) return tiles_of<true, true>(left, rows, taps, groups, right, sums, add, done);
    return tiles_of<true, false>(left, rows, taps, groups, right, sums, add, done);
  }
  if (p.right_signed) return tiles_of<false, true>(left, rows, taps, groups, right, sums, add, done);
  tiles_of<false, false>(left, rows, taps, groups, right, sums, add, done);
}

}  // namespace fqt
