// Convolutions of codes with a filter for every channel, whose lanes are channels: there is no sum over channels that
// a tile of the other products could take, and padding a group to a panel would cost sixty-four times the work.
#pragma once

#include "products/conv.h"
#include "products/epilogue.h"
#include "products/pixels.h"

namespace fqt {

// Whether a convolution is one, with sums that fit 32 bits.
inline bool is_depthwise(const Conv& c) {
  const bool alone = c.groups > 1 && c.groups == c.channels && c.groups == c.out_channels;
  return alone && c.kernel_height * c.kernel_width <= kMaxTerms;
}

// A phase of fqt_conv2d: the map of codes read is (pixels, 1, channels), weight (channels, taps) signed, `across` its
// kernel's width.
int depthwise_phase(const Source<uint8_t>& source, bool is_signed, const uint8_t* weight, int64_t weight_taps,
                    int64_t across, const Phase& phase, const Epilogue& e, int threads);

// fqt_conv2d_grad_weight of one; its columns are taps.
int depthwise_grad_weight(const uint8_t* grad, bool grad_signed, const uint8_t* input, bool input_signed, const Conv& c,
                          const Epilogue& e, int threads);

}  // namespace fqt
