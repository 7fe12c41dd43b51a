// The geometry of a two-dimensional convolution, as the C interface passes it.
#pragma once

#include <cstdint>

namespace fqt {

// input (samples, height, width, channels), output (samples, out_height, out_width, out_channels), weight
// (out_channels, kernel_height, kernel_width, channels ÷ groups); all channels-last and contiguous.
struct Conv {
  int64_t samples, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  int64_t groups;
};

}  // namespace fqt
