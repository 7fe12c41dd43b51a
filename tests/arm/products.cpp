// Products of codes, matrix and convolution, compared with plain loops: every number must be equal.
//
// products LEVELS LIBRARY [PRODUCTS]: LEVELS is what fqt_cpu_levels must say.
#include "library.h"

using fqt::Conv;
using fqt::Epilogue;
using fqt::Range;

namespace {

constexpr Range kUnsigned{0, 255}, kSigned{-128, 127}, kHalf{0, 127}, kNibble{0, 15}, kSmall{-7, 7};
constexpr Range kPairs[][2] = {{kUnsigned, kSigned}, {kSigned, kSigned}, {kUnsigned, kUnsigned}, {kSigned, kUnsigned},
                               {kHalf, kSigned},     {kSigned, kHalf},   {kNibble, kSmall},      {kHalf, kNibble}};
constexpr int kThreads = 2;
int64_t compared = 0;

template <class Got>
void expect_equal(const char* what, const std::vector<Got>& got, const std::vector<Got>& wanted) {
  compared += wanted.size();
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (got[i] == wanted[i]) continue;
    std::printf("%s: entry %zu of %zu is %.9g, not %.9g\n", what, i, wanted.size(), double(got[i]), double(wanted[i]));
    std::exit(1);
  }
}

// A result of integers, as they are.
template <class Sum>
Epilogue exact(std::vector<Sum>* out, int64_t columns, int64_t period) {
  Epilogue e{};
  e.out = out->data(), e.type = sizeof(Sum) == 4 ? fqt::kInt32 : fqt::kInt64, e.columns = columns, e.period = period;
  return e;
}

struct Size {
  int64_t m, n, k;
};

template <class Sum>
void check_matmul(const Library& library, const Size& s, const Range& of_a, const Range& of_b, bool extreme) {
  Numbers numbers(s.m + 1000 * s.n + 1000000 * s.k);
  const Codes a = numbers.codes(of_a, s.m * s.k, extreme), b = numbers.codes(of_b, s.k * s.n, extreme);
  for (int layout = 0; layout < 4; ++layout) {
    const bool by_rows = layout & 1, right_by_rows = layout & 2;  // whether a row's entries lie together
    const int64_t a_row = by_rows ? s.k : 1, a_column = by_rows ? 1 : s.m;
    const int64_t b_row = right_by_rows ? s.n : 1, b_column = right_by_rows ? 1 : s.k;
    std::vector<Sum> got(s.m * s.n), wanted(s.m * s.n);
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j) {
        int64_t sum = 0;
        for (int64_t k = 0; k < s.k; ++k) {
          sum += value(a[i * a_row + k * a_column], of_a) * value(b[k * b_row + j * b_column], of_b);
        }
        wanted[i * s.n + j] = static_cast<Sum>(sum);
      }
    }
    const Epilogue e = exact(&got, s.n, 1);
    const int status = library.get<decltype(fqt_matmul)>("fqt_matmul")(
        a.data(), of_a, a_row, a_column, b.data(), of_b, b_row, b_column, s.m, s.n, s.k, &e, kThreads);
    char what[160];
    std::snprintf(what, sizeof what, "matmul of %lld × %lld × %lld, codes %d … %d and %d … %d, layout %d, status %d",
                  (long long)s.m, (long long)s.n, (long long)s.k, of_a.low, of_a.high, of_b.low, of_b.high, layout, status);
    expect_equal(what, got, wanted);
  }
}

void check_matmuls(const Library& library) {
  for (const Range(&pair)[2] : kPairs) {
    for (const bool extreme : {false, true}) {
      for (int64_t m = 1; m <= 17; ++m) check_matmul<int32_t>(library, {m, 18 - m, 2 * m - 1}, pair[0], pair[1], extreme);
      for (const Size& s : {Size{97, 65, 515}, Size{48, 16, 64}, Size{50, 33, 1030}, Size{7, 70, 0}}) {
        check_matmul<int32_t>(library, s, pair[0], pair[1], extreme);
      }
      check_matmul<int64_t>(library, {7, 5, 70001}, pair[0], pair[1], extreme);  // beyond 32 bits
    }
  }
}

// f(output, weight, input): the indices of the factors of every product of a convolution.
template <class F>
void each_product(const Conv& c, const F& f) {
  const int64_t in = c.channels / c.groups, out = c.out_channels / c.groups;
  for (int64_t pixel = 0; pixel < c.samples * c.out_height * c.out_width; ++pixel) {
    const int64_t sample = pixel / c.out_width / c.out_height, h = pixel / c.out_width % c.out_height, w = pixel % c.out_width;
    for (int64_t tap = 0; tap < c.kernel_height * c.kernel_width; ++tap) {
      const int64_t y = h * c.stride_height + tap / c.kernel_width * c.dilation_height - c.padding_height;
      const int64_t x = w * c.stride_width + tap % c.kernel_width * c.dilation_width - c.padding_width;
      if (y < 0 || y >= c.height || x < 0 || x >= c.width) continue;
      const int64_t from = ((sample * c.height + y) * c.width + x) * c.channels;
      for (int64_t o = 0; o < c.out_channels; ++o) {
        const int64_t weight = (o * c.kernel_height * c.kernel_width + tap) * in;
        for (int64_t i = 0; i < in; ++i) f(pixel * c.out_channels + o, weight + i, from + o / out * in + i);
      }
    }
  }
}

// Stride and dilation of the height; the width's are 1.
Conv make_conv(int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t out_channels, int64_t groups,
               int64_t kernel_height, int64_t kernel_width, int64_t stride, int64_t padding, int64_t dilation) {
  Conv c{};
  c.samples = samples, c.height = height, c.width = width, c.channels = channels, c.out_channels = out_channels;
  c.groups = groups, c.kernel_height = kernel_height, c.kernel_width = kernel_width;
  c.stride_height = stride, c.stride_width = 1, c.padding_height = padding, c.padding_width = padding;
  c.dilation_height = dilation, c.dilation_width = 1;
  c.out_height = (height + 2 * padding - dilation * (kernel_height - 1) - 1) / stride + 1;
  c.out_width = width + 2 * padding - kernel_width + 1;
  return c;
}

void check_conv(const Library& library, const Conv& c, const Range& range, const Range& other, bool extreme) {
  Numbers numbers(c.channels + 1000 * c.out_channels);
  const int64_t taps = c.kernel_height * c.kernel_width;
  const int64_t inputs = c.samples * c.height * c.width * c.channels, weights = c.out_channels * taps * c.channels / c.groups;
  const int64_t outputs = c.samples * c.out_height * c.out_width * c.out_channels;
  const Codes input = numbers.codes(range, inputs, extreme), grad = numbers.codes(other, outputs, extreme);
  const Codes weight = numbers.codes(kSigned, weights, extreme);
  std::vector<int64_t> output(outputs), grad_input(inputs), grad_weight(weights), got(outputs);
  each_product(c, [&](int64_t o, int64_t w, int64_t i) {
    const int64_t x = value(input[i], range), g = value(grad[o], other), by = value(weight[w], kSigned);
    output[o] += x * by, grad_input[i] += g * by, grad_weight[w] += g * x;
  });
  const auto conv2d = library.get<decltype(fqt_conv2d)>("fqt_conv2d");
  char what[160];
  const auto name = [&](const char* product) {
    std::snprintf(what, sizeof what, "%s, %lld to %lld channels in %lld groups, kernel %lld × %lld, codes %d … %d, %d … %d",
                  product, (long long)c.channels, (long long)c.out_channels, (long long)c.groups, (long long)c.kernel_height,
                  (long long)c.kernel_width, range.low, range.high, other.low, other.high);
    return what;
  };
  Epilogue e = exact(&got, c.out_channels, c.out_height * c.out_width);
  conv2d(input.data(), range, weight.data(), kSigned, &c, 0, &e, kThreads);
  expect_equal(name("output"), got, output);
  got.assign(inputs, 0);
  e = exact(&got, c.channels, c.height * c.width);
  conv2d(grad.data(), other, weight.data(), kSigned, &c, 1, &e, kThreads);
  expect_equal(name("grad_input"), got, grad_input);
  got.assign(weights, 0);
  e = exact(&got, weights / c.out_channels, 1);
  library.get<decltype(fqt_conv2d_grad_weight)>("fqt_conv2d_grad_weight")(grad.data(), other, input.data(), range, &c, &e,
                                                                        kThreads);
  expect_equal(name("grad_weight"), got, grad_weight);
}

void check_convs(const Library& library) {
  const Conv convs[] = {
      make_conv(2, 7, 6, 5, 9, 1, 3, 3, 1, 1, 1),      make_conv(1, 9, 9, 16, 33, 1, 3, 3, 2, 1, 1),
      make_conv(2, 8, 5, 12, 8, 2, 3, 2, 1, 2, 2),     make_conv(3, 5, 5, 64, 20, 1, 1, 1, 1, 0, 1),
      make_conv(2, 6, 6, 21, 21, 21, 3, 3, 1, 1, 1),   make_conv(1, 11, 10, 130, 7, 1, 3, 3, 1, 1, 1),
      make_conv(1, 4, 3, 3, 3, 1, 3, 3, 1, 2, 1),
  };
  for (const Range(&pair)[2] : kPairs) {
    for (const Conv& c : convs) {
      for (const bool extreme : {false, true}) check_conv(library, c, pair[0], pair[1], extreme);
    }
  }
  for (const Conv& c : {make_conv(1, 3, 3, 8500, 2, 1, 3, 3, 1, 0, 1), make_conv(1, 3, 3, 2, 8500, 1, 3, 3, 1, 2, 1),
                        make_conv(1, 270, 260, 2, 3, 1, 1, 1, 1, 0, 1)}) {  // one product of each goes beyond 32 bits
    check_conv(library, c, kUnsigned, kUnsigned, true);
  }
}

typedef int BlockedMatmul(const uint8_t*, int64_t, int64_t, const float*, int64_t, const uint8_t*, int64_t, int64_t,
                          const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, int, void*, int);

// Steps by block and row of a, by block and column of b; a's rows by columns if `across`.
void check_blocked(const Library& library, const Size& s, int64_t block, bool across) {
  Numbers numbers(s.m + s.n + s.k);
  const int64_t blocks = (s.k + block - 1) / block;
  const int64_t a_row = across ? 1 : s.k, a_column = across ? s.m : 1;
  const Codes a = numbers.codes(kSigned, s.m * s.k, false), b = numbers.codes(kSigned, s.k * s.n, false);
  const std::vector<float> a_step = numbers.floats(s.m * blocks), b_step = numbers.floats(blocks * s.n);
  std::vector<float> got(s.m * s.n), wanted(s.m * s.n);
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      for (int64_t kb = 0; kb < blocks; ++kb) {
        int64_t sum = 0;
        for (int64_t k = kb * block; k < s.k && k < (kb + 1) * block; ++k) {
          sum += value(a[i * a_row + k * a_column], kSigned) * value(b[k * s.n + j], kSigned);
        }
        wanted[i * s.n + j] += static_cast<float>(sum) * (a_step[i * blocks + kb] * b_step[kb * s.n + j]);
      }
    }
  }
  library.get<BlockedMatmul>("fqt_blocked_matmul")(a.data(), a_row, a_column, a_step.data(), 1, b.data(), s.n, 1,
                                                   b_step.data(), 1, s.m, s.n, s.k, block, nullptr, fqt::kFloat32,
                                                   got.data(), kThreads);
  expect_equal("blocked matmul", got, wanted);
}

void check_sums(const Library& library, const Range& range, int64_t rows, int64_t columns) {
  Numbers numbers(rows);
  const Codes codes = numbers.codes(range, rows * columns, false);
  std::vector<int64_t> row(rows), column(columns), weighted(columns), got(rows), got_weighted(columns);
  std::vector<int32_t> weight(rows);
  for (int64_t r = 0; r < rows; ++r) weight[r] = static_cast<int32_t>((r * 7919 + 13) % (1 << 24));
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t code = value(codes[i], range);
    row[i / columns] += code, column[i % columns] += code, weighted[i % columns] += weight[i / columns] * code;
  }
  library.get<decltype(fqt_row_sums)>("fqt_row_sums")(codes.data(), range.is_signed(), rows, columns, got.data(), kThreads);
  expect_equal("row sums", got, row);
  got.resize(columns);
  library.get<decltype(fqt_column_sums)>("fqt_column_sums")(codes.data(), range.is_signed(), rows, columns, weight.data(),
                                                            got.data(), got_weighted.data(), kThreads);
  expect_equal("column sums", got, column);
  expect_equal("weighted column sums", got_weighted, weighted);
}

}  // namespace

int main(int, char** arguments) {
  const Library library(arguments[2], arguments[3]);
  const int levels = library.get<int()>("fqt_cpu_levels")();
  if (levels != std::atoi(arguments[1])) {
    std::printf("the levels are %d, not %s\n", levels, arguments[1]);
    return 1;
  }
  check_matmuls(library);
  check_convs(library);
  for (const bool across : {false, true}) {
    check_blocked(library, {13, 37, 130}, 32, across);
    check_blocked(library, {49, 18, 77}, 4, across);
  }
  for (const Range& range : {kUnsigned, kSigned}) {
    check_sums(library, range, 301, 77);
    check_sums(library, range, 3, 1100);
  }
  std::printf("%lld numbers are equal\n", static_cast<long long>(compared));
}
