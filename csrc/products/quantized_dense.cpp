// A Linear's three products of quantized matrices: sums of codes, the corrections made of them, and the product.
#include "common/parallel.h"
#include "common/platform.h"
#include "products/products.h"
#include "products/quantized.h"

using namespace fqt;

// (tokens, outputs) floats of `type`: x · wᵀ + bias. x (tokens, inputs): with `many`, one step per `run` tokens; w
// (outputs, inputs), symmetric. At least one entry each.
FQT_API int fqt_dense_output(const Quantized* x, const Quantized* w, const float* bias, int64_t tokens, int64_t inputs,
                             int64_t outputs, int64_t run, int type, void* out, int threads) {
  Epilogue e{out, type, 0, outputs, 1};
  e.row_scale = x->step, e.column_scale = w->step, e.column_scale_step = w->many ? 1 : 0, e.bias = bias;
  Buffer<float> left = make_buffer<float>(2 * tokens), right = make_buffer<float>(outputs);
  Buffer<int64_t> sums = make_buffer<int64_t>(outputs);
  if (!left || !right || !sums) return kNoMemory;
  if (x->many) {
    float* step = left.get() + tokens;
    for (int64_t t = 0; t < tokens; ++t) step[t] = x->step[t / run];
    e.row_scale = step, e.row_scale_step = 1;
  }
  if (x->many || x->offset[0] != 0) {
    const int status = fqt_row_sums(w->codes, 1, outputs, inputs, sums.get(), threads);
    if (status != kDone) return status;
    for (int64_t t = 0; t < tokens; ++t) left[t] = x->offset[x->many ? t / run : 0];
    for (int64_t o = 0; o < outputs; ++o) right[o] = static_cast<float>(sums[o]) * w->step[w->many ? o : 0];
    e.rank = 1, e.left = left.get(), e.right = right.get();
  }
  return fqt_matmul(x->codes, x->range(), inputs, 1, w->codes, w->range(), 1, inputs, tokens, outputs, inputs, &e,
                    threads);
}

// (tokens, inputs) floats of `type`: g · w. g (tokens, outputs): one step or one per token; w (outputs, inputs),
// symmetric, its steps in g already if `folded`, else one. ones (inputs,), unless it is null, receives 1 · w.
FQT_API int fqt_dense_grad_input(const Quantized* g, const Quantized* w, int64_t tokens, int64_t inputs,
                                 int64_t outputs, int folded, float* ones, int type, void* out, int threads) {
  const int rank = g->row_noise ? 2 : 1;
  Buffer<float> left = make_buffer<float>(rank * tokens), right = make_buffer<float>(rank * inputs);
  Buffer<int64_t> sums = make_buffer<int64_t>(2 * inputs);
  Buffer<int32_t> noise = make_buffer<int32_t>(outputs);
  if (!left || !right || !sums || !noise) return kNoMemory;
  for (int64_t o = 0; g->column_noise && o < outputs; ++o) noise[o] = noise_integer(g->column_noise[o]);
  const int status = fqt_column_sums(w->codes, 1, outputs, inputs, g->column_noise ? noise.get() : nullptr,
                                     sums.get(), g->column_noise ? sums.get() + inputs : nullptr, threads);
  if (status != kDone) return status;
  for (int64_t i = 0; i < inputs; ++i) {
    right[i] = static_cast<float>(sums[i]);
    if (rank == 2) right[inputs + i] = static_cast<float>(static_cast<double>(sums[inputs + i]) * 0x1p-24);
  }
  for (int64_t i = 0; !folded && i < rank * inputs; ++i) right[i] *= w->step[0];
  for (int64_t t = 0; t < tokens; ++t) {
    const float step = g->step[g->many ? t : 0], offset = g->offset[g->many ? t : 0];
    left[rank * t] = g->row_noise ? with_noise(offset, step, g->row_noise[t]) : offset;
    if (rank == 2) left[rank * t + 1] = -step;
  }
  if (ones) std::memcpy(ones, right.get(), inputs * sizeof(float));
  Epilogue e{out, type, rank, inputs, 1};
  e.row_scale = g->step, e.row_scale_step = g->many ? 1 : 0, e.column_scale = folded ? nullptr : w->step;
  e.left = left.get(), e.right = right.get();
  return fqt_matmul(g->codes, g->range(), outputs, 1, w->codes, w->range(), inputs, 1, tokens, inputs, outputs, &e,
                    threads);
}

// (outputs, inputs) float32: gᵀ · x. g (tokens, outputs): one step or one per column; x (tokens, inputs): one step, or
// folded ones, with a centre per token. Fewer than 2²³ tokens.
FQT_API int fqt_dense_grad_weight(const Quantized* g, const Quantized* x, int64_t tokens, int64_t inputs,
                                  int64_t outputs, const Fold* fold, float* out, int threads) {
  const float x_step = fold->step(*x), x_offset = fold->offset(*x);
  const double step = x_step, offset = x_offset;
  const bool dithered = g->row_noise, shifted = x_offset != 0, apart = shifted || fold->share;
  const int rank = 1 + dithered + apart;
  Buffer<float> left = make_buffer<float>((rank + 1) * outputs), right = make_buffer<float>(rank * inputs);
  Buffer<int64_t> sums = make_buffer<int64_t>(2 * inputs), sums_of_g = make_buffer<int64_t>(2 * outputs);
  Buffer<int32_t> noise = make_buffer<int32_t>(tokens), zero = make_buffer<int32_t>(outputs);
  if (!left || !right || !sums || !sums_of_g || !noise || !zero) return kNoMemory;
  int64_t met = 0, total = 0;  // sums over the tokens of their weights, plain and times noise
  for (int64_t t = 0; t < tokens; ++t) {
    noise[t] = dithered ? noise_integer(g->row_noise[t]) : 0;
    met += fold->weight(t), total += fold->weight(t) * noise[t];
  }
  int status = fqt_column_sums(x->codes, x->is_signed(), tokens, inputs, dithered ? noise.get() : nullptr, sums.get(),
                               dithered ? sums.get() + inputs : nullptr, threads);
  const int64_t* met_by_g = sums_of_g.get() + (fold->centre ? outputs : 0);
  if (status == kDone && shifted) {
    status = fqt_column_sums(g->codes, g->is_signed(), tokens, outputs, fold->centre, sums_of_g.get(),
                             fold->centre ? sums_of_g.get() + outputs : nullptr, threads);
  }
  if (status != kDone) return status;
  for (int64_t i = 0; i < inputs; ++i) {
    float* to = right.get() + i;
    *to = static_cast<float>(step * static_cast<double>(sums[i]) + offset * static_cast<double>(met));
    if (dithered) {
      const double weighted = step * static_cast<double>(sums[inputs + i]) + offset * static_cast<double>(total);
      *(to += inputs) = static_cast<float>(weighted * 0x1p-24);
    }
    if (apart) to[inputs] = 1.0f;
  }
  float* scale = left.get() + rank * outputs;
  for (int64_t o = 0; o < outputs; ++o) {
    const Channel channel = Channel::of(*g, o);
    scale[o] = channel.step, zero[o] = channel.zero;
    float* to = left.get() + rank * o;
    *to = channel.rest;
    if (dithered) *++to = -channel.step;
    if (shifted) to[1] = static_cast<float>(met_by_g[o] - channel.zero * met) * (channel.step * x_offset);
    if (fold->share) to[1] = shifted ? to[1] + fold->share[o] : fold->share[o];
  }
  Epilogue e{out, kFloat32, rank, inputs, 1};
  e.row_scale = scale, e.row_scale_step = 1, e.column_scale = &x_step;
  e.left = left.get(), e.right = right.get(), e.zero = zero.get(), e.zero_step = 1, e.ones = sums.get();
  return fqt_matmul(g->codes, g->range(), 1, outputs, x->codes, x->range(), inputs, 1, outputs, inputs, tokens, &e,
                    threads);
}
