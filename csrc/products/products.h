// The exported products and sums of codes, for the kernels that are made of them.
#pragma once

#include "common/platform.h"
#include "products/conv.h"
#include "products/epilogue.h"

namespace fqt {

// 24-bit noise is multiplied in planes of so many bits, the highest first; beside narrow codes in narrow ones.
#if defined(FQT_NARROW)
constexpr int kNoiseBits = 4;
#else
constexpr int kNoiseBits = 8;
#endif
constexpr int kNoisePlanes = 24 / kNoiseBits;
constexpr Range kNoiseRange{0, (1 << kNoiseBits) - 1};

// Further output channels of unsigned codes up to `high`, one array of pixels each, whose sums of products with the
// input are wanted before the others are finished: what a correction is made of comes out of the same product.
struct Planes {
  const uint8_t* codes;  // (count, samples · out_height · out_width)
  int64_t count;
  int32_t high;
  int64_t* sums;         // (count, kernel_height · kernel_width · channels ÷ groups), exact; of one group after the other
  void (*ready)(void* state, int64_t first, int64_t last);  // sums of its columns first … last − 1 are there
  void* state;
};

// fqt_conv2d_grad_weight with planes, or null; with planes unsigned codes of grad_output.
int conv_grad_weight(const uint8_t* grad, Range grad_range, const uint8_t* input, Range input_range, const Conv* conv,
                     const Planes* planes, const Epilogue* e, int threads);

}  // namespace fqt

FQT_API int fqt_matmul(const uint8_t* a, fqt::Range a_range, int64_t a_row_stride, int64_t a_column_stride,
                       const uint8_t* b, fqt::Range b_range, int64_t b_row_stride, int64_t b_column_stride, int64_t m,
                       int64_t n, int64_t k, const fqt::Epilogue* e, int threads);
FQT_API int fqt_conv2d(const uint8_t* codes, fqt::Range range, const uint8_t* weight, fqt::Range weight_range,
                       const fqt::Conv* conv, int backward, const fqt::Epilogue* e, int threads);
FQT_API int fqt_conv2d_grad_weight(const uint8_t* grad, fqt::Range grad_range, const uint8_t* input,
                                   fqt::Range input_range, const fqt::Conv* conv, const fqt::Epilogue* e, int threads);
FQT_API int fqt_column_sums(const uint8_t* codes, int is_signed, int64_t rows, int64_t columns,
                            const int32_t* weights, int64_t* plain, int64_t* weighted, int threads);
FQT_API int fqt_row_sums(const uint8_t* codes, int is_signed, int64_t rows, int64_t columns, int64_t* sums,
                         int threads);
