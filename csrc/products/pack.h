// Codes in the layouts that the inner kernel reads (see dot.h).
#pragma once

#include <cstdint>

#include "common/memory.h"
#include "common/parallel.h"
#include "products/dot.h"

namespace fqt {

// How a code becomes an operand: read as signed or not, then shifted so that it fits the operand.
template <class Operand>
struct Reader {
  bool is_signed;
  int by;

  int shift() const { return by; }
  Operand operator()(uint8_t code) const {
    return static_cast<Operand>((is_signed ? static_cast<int8_t>(code) : static_cast<int>(code)) + by);
  }
};
typedef Reader<Left> LeftReader;
typedef Reader<Right> RightReader;

#if defined(__AVX2__)
// Four rows of 16 codes, shifted modulo 256 and interleaved.
inline void interleave_16(const uint8_t* const* row, int64_t i, __m128i shift, void* out) {
  __m128i r[4];
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm_add_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[j] + i)), shift);
  }
  const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpacklo_epi8(r[2], r[3]);
  const __m128i c = _mm_unpackhi_epi8(r[0], r[1]), d = _mm_unpackhi_epi8(r[2], r[3]);
  __m128i* to = static_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_unpacklo_epi16(a, b));
  _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(a, b));
  _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(c, d));
  _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(c, d));
}
#endif

#if defined(__AVX512VNNI__)
// The same of 64 codes.
inline void interleave_64(const uint8_t* const* row, int64_t i, __m512i shift, void* out) {
  __m512i r[4], t[4], u[4];
  for (int j = 0; j < 4; ++j) r[j] = _mm512_add_epi8(_mm512_loadu_si512(row[j] + i), shift);
  t[0] = _mm512_unpacklo_epi8(r[0], r[1]), t[1] = _mm512_unpackhi_epi8(r[0], r[1]);
  t[2] = _mm512_unpacklo_epi8(r[2], r[3]), t[3] = _mm512_unpackhi_epi8(r[2], r[3]);
  u[0] = _mm512_unpacklo_epi16(t[0], t[2]), u[1] = _mm512_unpackhi_epi16(t[0], t[2]);
  u[2] = _mm512_unpacklo_epi16(t[1], t[3]), u[3] = _mm512_unpackhi_epi16(t[1], t[3]);
  // Lane l of u[k] holds columns 16·l + 4·k … + 3: transpose the lanes.
  t[0] = _mm512_shuffle_i32x4(u[0], u[1], 0x44), t[1] = _mm512_shuffle_i32x4(u[0], u[1], 0xee);
  t[2] = _mm512_shuffle_i32x4(u[2], u[3], 0x44), t[3] = _mm512_shuffle_i32x4(u[2], u[3], 0xee);
  __m512i* to = static_cast<__m512i*>(out);
  _mm512_storeu_si512(to, _mm512_shuffle_i32x4(t[0], t[2], 0x88));
  _mm512_storeu_si512(to + 1, _mm512_shuffle_i32x4(t[0], t[2], 0xdd));
  _mm512_storeu_si512(to + 2, _mm512_shuffle_i32x4(t[1], t[3], 0x88));
  _mm512_storeu_si512(to + 3, _mm512_shuffle_i32x4(t[1], t[3], 0xdd));
}
#elif defined(__AVX2__)
constexpr int64_t kAtOnce = 32 / sizeof(Left);  // codes that fill a vector as operands

template <class Read>
inline __m256i load_operands(const uint8_t* from, const Read& read) {
  if constexpr (sizeof(Left) == 1) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_add_epi8(codes, _mm256_set1_epi8(static_cast<char>(read.shift())));
  } else {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return read.is_signed ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes);
  }
}

// kGroup rows of kAtOnce codes, interleaved.
template <class Read>
inline void interleave_some(const uint8_t* const* row, int64_t i, const Read& read, void* out) {
  __m256i r[kGroup], t[4], u[4];
  for (int j = 0; j < kGroup; ++j) r[j] = load_operands(row[j] + i, read);
  __m256i* to = static_cast<__m256i*>(out);
  if constexpr (kGroup == 2) {
    u[0] = _mm256_unpacklo_epi16(r[0], r[1]), u[1] = _mm256_unpackhi_epi16(r[0], r[1]);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(u[0], u[1], 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(u[0], u[1], 0x31));
  } else {
    t[0] = _mm256_unpacklo_epi8(r[0], r[1]), t[1] = _mm256_unpackhi_epi8(r[0], r[1]);
    t[2] = _mm256_unpacklo_epi8(r[2], r[3]), t[3] = _mm256_unpackhi_epi8(r[2], r[3]);
    u[0] = _mm256_unpacklo_epi16(t[0], t[2]), u[1] = _mm256_unpackhi_epi16(t[0], t[2]);
    u[2] = _mm256_unpacklo_epi16(t[1], t[3]), u[3] = _mm256_unpackhi_epi16(t[1], t[3]);
    // Lane l of u[k] holds columns 16·l + 4·k … + 3.
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(u[0], u[1], 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(u[2], u[3], 0x20));
    _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(u[0], u[1], 0x31));
    _mm256_storeu_si256(to + 3, _mm256_permute2x128_si256(u[2], u[3], 0x31));
  }
}
#endif

#if defined(__ARM_FEATURE_DOTPROD)
// kGroup rows of 16 codes, shifted modulo 256 and interleaved.
inline void interleave_16(const uint8_t* const* row, int64_t i, uint8x16_t shift, uint8_t* out) {
  uint8x16_t r[kGroup];
  for (int j = 0; j < kGroup; ++j) r[j] = vaddq_u8(vld1q_u8(row[j] + i), shift);
  if constexpr (kGroup == 4) {
    vst4q_u8(out, {{r[0], r[1], r[2], r[3]}});
  } else {
    uint16x8x4_t low, high;  // columns 0 … 7 and 8 … 15 of two rows each
    for (int j = 0; j < 4; ++j) {
      low.val[j] = (uint16x8_t)vzip1q_u8(r[2 * j], r[2 * j + 1]);
      high.val[j] = (uint16x8_t)vzip2q_u8(r[2 * j], r[2 * j + 1]);
    }
    vst4q_u16(reinterpret_cast<uint16_t*>(out), low);
    vst4q_u16(reinterpret_cast<uint16_t*>(out) + 32, high);
  }
}
#endif

// out[i][kGroup] for i < width: kGroup rows, interleaved. A reader of its own, which no byte stored can alias.
template <class Operand, class Read>
inline void interleave_group(const uint8_t* const* row, int64_t width, const Read read, Operand* out) {
  int64_t i = 0;
#if defined(__AVX512VNNI__)
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(read.shift()));
  for (; i + 64 <= width; i += 64) interleave_64(row, i, shift, out + i * 4);
  for (; i + 16 <= width; i += 16) interleave_16(row, i, _mm512_castsi512_si128(shift), out + i * 4);
#elif defined(__AVX2__)
  for (; i + kAtOnce <= width; i += kAtOnce) interleave_some(row, i, read, out + i * kGroup);
  if constexpr (kGroup == 4) {
    const __m128i shift = _mm_set1_epi8(static_cast<char>(read.shift()));
    for (; i + 16 <= width; i += 16) interleave_16(row, i, shift, out + i * 4);
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  const uint8x16_t shift = vdupq_n_u8(static_cast<uint8_t>(read.shift()));
  for (; i + 16 <= width; i += 16) interleave_16(row, i, shift, out + i * kGroup);
#endif
  for (; i < width; ++i) {
    for (int j = 0; j < kGroup; ++j) out[i * kGroup + j] = read(row[j][i]);
  }
}

// The same for i < padded_width and `rows` ≤ kGroup rows, a null pointer being a row of `missing`; what is beyond
// `rows` or `width` holds `missing` too.
template <class Operand, class Read>
void interleave_rows(const uint8_t* const* row, int64_t rows, int64_t width, int64_t padded_width, Operand missing,
                     const Read read, Operand* out) {
  bool whole = rows == kGroup;
  for (int64_t j = 0; j < rows; ++j) whole = whole && row[j];
  int64_t i = 0;
  if (whole) {
    interleave_group(row, width, read, out);
    i = width;
  }
  for (; i < padded_width; ++i) {
    for (int j = 0; j < kGroup; ++j) {
      out[i * kGroup + j] = j < rows && row[j] && i < width ? read(row[j][i]) : missing;
    }
  }
}

#if defined(__AVX512VNNI__)
// A 16 × 16 transposition of groups: 64 bytes of each of 16 columns become 16 groups of 16 columns; also in place.
inline void transpose_groups(const uint8_t* first, int64_t column_stride, __m512i shift, void* to, int64_t step) {
  uint8_t* out = static_cast<uint8_t*>(to);
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_add_epi8(_mm512_loadu_si512(first + i * column_stride), shift);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: group j of each 16-byte lane, columns i … i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // a 4 × 4 transposition of lanes
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x44), b = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xee);
    _mm512_storeu_si512(out + j * step, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(out + (4 + j) * step, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(out + (8 + j) * step, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(out + (12 + j) * step, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}
#elif defined(__AVX2__)
// An 8 × 8 transposition of groups: kAtOnce codes of each of 8 columns become 8 groups of 8 columns.
template <class Read>
inline void transpose_groups(const uint8_t* first, int64_t column_stride, const Read& read, Right* out, int64_t step) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load_operands(first + i * column_stride, read);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // r[i + j]: group j of each 16-byte lane, columns i … i + 3
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    store(out + j * step, _mm256_permute2x128_si256(r[j], r[4 + j], 0x20));
    store(out + (4 + j) * step, _mm256_permute2x128_si256(r[j], r[4 + j], 0x31));
  }
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kAcross = 16 / kGroup;  // columns

// 16 codes of each of kAcross columns become as many groups of kAcross columns.
inline void transpose_groups(const uint8_t* first, int64_t column_stride, uint8x16_t shift, uint8_t* out, int64_t step) {
  uint8x16_t r[kAcross];
  for (int i = 0; i < kAcross; ++i) r[i] = vaddq_u8(vld1q_u8(first + i * column_stride), shift);
  if constexpr (kGroup == 4) {
    const uint32x4x2_t a = vzipq_u32((uint32x4_t)r[0], (uint32x4_t)r[2]);
    const uint32x4x2_t b = vzipq_u32((uint32x4_t)r[1], (uint32x4_t)r[3]);
    for (int j = 0; j < 2; ++j) {
      const uint32x4x2_t groups = vzipq_u32(a.val[j], b.val[j]);
      vst1q_u8(out + 2 * j * step, (uint8x16_t)groups.val[0]);
      vst1q_u8(out + (2 * j + 1) * step, (uint8x16_t)groups.val[1]);
    }
  } else {
    vst1q_u8(out, (uint8x16_t)vzip1q_u64((uint64x2_t)r[0], (uint64x2_t)r[1]));
    vst1q_u8(out + step, (uint8x16_t)vzip2q_u64((uint64x2_t)r[0], (uint64x2_t)r[1]));
  }
}
#endif

// Interleaved left groups as block_of wants them: (groups, padded_rows, kGroup), both multiples of 16, in place.
inline void finish_interleaved(int64_t groups, int64_t padded_rows, Left* packed) {
#if defined(__AMX_INT8__)
  const int64_t stride = padded_rows * kGroup;
  for (int64_t g = 0; g < groups; g += 16) {
    for (int64_t i = 0; i < stride; i += 64) {
      Left* corner = packed + g * stride + i;
      transpose_groups(corner, stride, _mm512_setzero_si512(), corner, stride);
    }
  }
#else
  (void)groups, (void)padded_rows, (void)packed;
#endif
}

// out[g][kPanel][kGroup]: `columns` ≤ kPanel columns whose k lie next to one another, k < terms; zeros beyond.
inline void pack_columns(const uint8_t* first, int64_t column_stride, int64_t columns, int64_t terms,
                         const RightReader& read, Right* out) {
  const int64_t groups = ceil_div(terms, kGroup);
  int64_t whole_columns = 0, whole_terms = 0;  // packed by vectors
#if defined(__AVX512VNNI__)
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(read.shift()));
  whole_columns = columns / 16 * 16;
  whole_terms = terms / 64 * 64;
  for (int64_t n = 0; n < whole_columns; n += 16) {
    for (int64_t k = 0; k < whole_terms; k += 64) {
      transpose_groups(first + n * column_stride + k, column_stride, shift, out + (k / kGroup * kPanel + n) * kGroup,
                       kPanel * kGroup);
    }
  }
#elif defined(__AVX2__)
  whole_columns = columns / 8 * 8;
  whole_terms = terms / kAtOnce * kAtOnce;
  for (int64_t n = 0; n < whole_columns; n += 8) {
    for (int64_t k = 0; k < whole_terms; k += kAtOnce) {
      transpose_groups(first + n * column_stride + k, column_stride, read, out + (k / kGroup * kPanel + n) * kGroup,
                       kPanel * kGroup);
    }
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  const uint8x16_t shift = vdupq_n_u8(static_cast<uint8_t>(read.shift()));
  whole_columns = columns / kAcross * kAcross;
  whole_terms = terms / 16 * 16;
  for (int64_t n = 0; n < whole_columns; n += kAcross) {
    for (int64_t k = 0; k < whole_terms; k += 16) {
      transpose_groups(first + n * column_stride + k, column_stride, shift, out + (k / kGroup * kPanel + n) * kGroup,
                       kPanel * kGroup);
    }
  }
#endif
  for (int64_t n = 0; n < kPanel; ++n) {
    Right* to = out + n * kGroup;
    if (n >= columns) {
      for (int64_t g = 0; g < groups; ++g, to += kPanel * kGroup) std::memset(to, 0, kGroup * sizeof(Right));
      continue;
    }
    const uint8_t* from = first + n * column_stride;
    int64_t k = n < whole_columns ? whole_terms : 0;
    to += k * kPanel;
    for (; k + kGroup <= terms; k += kGroup, to += kPanel * kGroup) {
      Right group[kGroup];
      for (int j = 0; j < kGroup; ++j) group[j] = read(from[k + j]);
      std::memcpy(to, group, sizeof group);
    }
    if (k < terms) {
      for (int j = 0; j < kGroup; ++j) to[j] = k + j < terms ? read(from[k + j]) : Right{0};
    }
  }
}

// (rows × padded_terms) from rows whose k lie next to one another; zeros beyond `terms`.
template <class Read>
inline void copy_rows(const uint8_t* first, int64_t row_stride, int64_t rows, int64_t terms, int64_t padded_terms,
                      const Read read, Left* out) {
  for (int64_t i = 0; i < rows; ++i, out += padded_terms) {
    const uint8_t* from = first + i * row_stride;
    for (int64_t k = 0; k < terms; ++k) out[k] = read(from[k]);
    for (int64_t k = terms; k < padded_terms; ++k) out[k] = 0;
  }
}

// sums (kPanel,) += Σ over the groups of a panel. Σ |Right| ≤ 2⁸·k stays in int32 for k < 2²³.
inline void sum_columns(const Right* panel, int64_t groups, const Plan& p, int64_t* sums) {
  vi sum[kVectors]{};
  for (int64_t g = 0; g < groups; ++g) {
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = add_right(sum[v], panel + (g * kPanel + v * W) * kGroup, p);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int j = 0; j < W; ++j) sums[v * W + j] += sum[v][j];
  }
}

// A matrix of codes.
struct Matrix {
  const uint8_t* codes;
  int64_t row_stride, column_stride;  // one of them is 1
};

constexpr int64_t kRun = 16;  // groups packed at a time

// The right operand: panels of all k, [panel][group][kPanel][kGroup].
inline void pack_right(const Matrix& b, const RightReader& read, int64_t n, int64_t k, int threads, Right* out) {
  const int64_t groups = ceil_div(k, kGroup), panels = ceil_div(n, kPanel);
  if (b.row_stride == 1) {
    parallel_for(panels, n * k, threads, [&](int64_t p) {
      const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
      pack_columns(b.codes + p * kPanel * b.column_stride, b.column_stride, columns, k, read,
                   out + p * groups * kPanel * kGroup);
    });
    return;
  }
  // By runs of rows across all panels: a run stays in the cache, a panel of a long column would not.
  parallel_for(ceil_div(groups, kRun), n * k, threads, [&](int64_t item) {
    const int64_t begin = item * kRun, end = groups < begin + kRun ? groups : begin + kRun;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
      for (int64_t g = begin; g < end; ++g) {
        const uint8_t* row[kGroup];
        int64_t rows = 0;
        for (; rows < kGroup && g * kGroup + rows < k; ++rows) {
          row[rows] = b.codes + (g * kGroup + rows) * b.row_stride + p * kPanel;
        }
        interleave_rows<Right>(row, rows, columns, kPanel, 0, read, out + (p * groups + g) * kPanel * kGroup);
      }
    }
  });
}

}  // namespace fqt
