// Hashes of what the kernels compute from given numbers, a line each: on every machine and level they must be equal.
//
// digests LIBRARY [PRODUCTS]
#include <cstring>
#include <string>

#include "common/source.h"
#include "library.h"
#include "products/quantized.h"
#include "transform/mixed.h"

using fqt::Source;

namespace {

typedef std::vector<float> Floats;
typedef int Random(const int64_t*, uint32_t, int, int64_t, uint32_t*, int);
typedef int Quantize(const Source*, int64_t, int64_t, int, int, int, int, int, int, const int64_t*, int, float*, float*,
                     uint8_t*, float*, float*, int32_t*, void*, int);
typedef int Decode(const uint8_t*, int, int64_t, int64_t, const float*, const float*, int, int, const float*, int, int,
                   float*, int);
typedef int VarianceSums(const Source*, int64_t, int64_t, const float*, const float*, int, int, int, int, int64_t*, int);
typedef int HadamardCodes(const Source*, int64_t, int64_t, const int64_t*, const int64_t*, int64_t, fqt::Mixed*, int64_t*,
                          int);
typedef int Hadamard(const Source*, int64_t, int64_t, const int64_t*, const int64_t*, int64_t, const float*, const float*,
                     const float*, const bool*, const float*, const float*, const float*, int, void*, int);
typedef int HouseholderCodes(const Source*, int64_t, int64_t, int, fqt::Mixed*, int64_t*, float*, float*, int);
typedef int Positive(const Source*, int64_t, uint8_t*, int);
typedef int Gate(const Source*, int64_t, const uint8_t*, void*, int);
typedef int Pack(const uint8_t*, int64_t, int, uint8_t*, int);
typedef int KeptTimes(const Source*, int64_t, const uint8_t*, int, const float*, const float*, const float*, void*, int);
typedef int DenseOutput(const fqt::Quantized*, const fqt::Quantized*, const float*, int64_t, int64_t, int64_t, int64_t, int,
                        void*, int);
typedef int DenseGradInput(const fqt::Quantized*, const fqt::Quantized*, int64_t, int64_t, int64_t, int, float*, int, void*,
                           int);
typedef int DenseGradWeight(const fqt::Quantized*, const fqt::Quantized*, int64_t, int64_t, int64_t, const fqt::Fold*,
                            float*, int);

constexpr int kThreads = 2;
constexpr int64_t kRows = 37, kColumns = 203, kSize = kRows * kColumns, kSeed = 20261127;

// FNV-1a, of 64 bits.
class Digest {
 public:
  template <class T>
  Digest& add(const std::vector<T>& numbers) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(numbers.data());
    for (size_t i = 0; i < numbers.size() * sizeof(T); ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3;
    return *this;
  }
  void print(const std::string& of) const { std::printf("%016llx %s\n", (unsigned long long)hash_, of.c_str()); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325;
};

// A matrix in float32 and in bfloat16, with a row of one number and one of zeros.
struct Matrix {
  Floats x = Numbers(1).floats(kSize);
  std::vector<uint16_t> upper = std::vector<uint16_t>(kSize);

  Matrix() {
    for (int64_t j = 0; j < kColumns; ++j) x[2 * kColumns + j] = 1.25f, x[5 * kColumns + j] = 0;
    for (int64_t i = 0; i < kSize; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x[i], sizeof bits);
      upper[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  Source source(bool bfloat16) const {
    return {bfloat16 ? static_cast<const void*>(upper.data()) : x.data(), nullptr, 0, bfloat16};
  }
};

struct Quantized {
  Floats step = Floats(kColumns), offset = Floats(kColumns), row_noise = Floats(kRows), column_noise = Floats(kColumns);
  Codes codes = Codes(kSize);
  int32_t dithered = 0;
};

// group: of the tensor, rows or columns; mode and rounding: as in csrc/quantize.
Quantized quantize(const Library& library, const Source& source, int group, int mode, int rounding) {
  Quantized q;
  const int high = mode == 1 ? 127 : rounding == 2 ? 254 : 255, low = mode == 1 ? -127 : 0;
  library.get<Quantize>("fqt_quantize")(&source, kRows, kColumns, group, mode, high, low, high, rounding, &kSeed, 0,
                                        q.step.data(), q.offset.data(), q.codes.data(), q.row_noise.data(),
                                        q.column_noise.data(), &q.dithered, nullptr, kThreads);
  return q;
}

void digest_quantizers(const Library& library, const Matrix& matrix) {
  for (int variant = 0; variant < 2 * 3 * 3 * 4; ++variant) {
    const bool bfloat16 = variant % 2;
    const int group = variant / 2 % 3, mode = variant / 6 % 3, rounding = variant / 18;
    if (mode == 1 && rounding >= 2) continue;  // symmetric grids are not dithered
    const Source source = matrix.source(bfloat16);
    const Quantized q = quantize(library, source, group, mode, rounding);
    std::vector<int64_t> sums(kColumns);
    Floats decoded(kSize);
    const int low = mode == 1 ? -127 : 0, high = mode == 1 ? 127 : 255;
    library.get<VarianceSums>("fqt_variance_sums")(&source, kRows, kColumns, q.step.data(), q.offset.data(), group == 1,
                                                   group == 2, low, high, sums.data(), kThreads);
    library.get<Decode>("fqt_decode")(q.codes.data(), mode == 1, kRows, kColumns, q.step.data(), q.offset.data(), group == 1,
                                      group == 2, nullptr, 0, 0, decoded.data(), kThreads);
    Digest digest;
    digest.add(q.codes).add(q.step).add(q.offset).add(q.row_noise).add(q.column_noise).add(sums).add(decoded);
    digest.print("quantize " + std::string(bfloat16 ? "bfloat16" : "float32") + ", group " + std::to_string(group) +
                 ", mode " + std::to_string(mode) + ", rounding " + std::to_string(rounding));
  }
}

// Results of transforms that are quantized.
struct Mixing {
  Floats inverse = Floats(kRows), middle = Floats(kRows), step = Floats(kRows), offset = Floats(kRows);
  Floats row_dither = Floats(kRows), column_dither = Floats(kColumns), normal = Floats(kRows), factor = Floats(kRows);
  std::vector<double> cost = std::vector<double>(kRows);
  std::vector<int64_t> order = std::vector<int64_t>(kRows);
  Codes codes = Codes(kSize), keep = Codes(kRows);
  fqt::Mixed how{&kSeed,      1, 255, 254, 2, inverse.data(), middle.data(), cost.data(), step.data(), offset.data(),
                 row_dither.data(), column_dither.data(), reinterpret_cast<bool*>(keep.data()), codes.data(), 0, 0, 0};

  Digest digest() const {
    return Digest().add(codes).add(step).add(offset).add(inverse).add(middle).add(cost).add(order).add(keep);
  }
};

void digest_transforms(const Library& library, const Matrix& matrix) {
  const Source source = matrix.source(false);
  const int64_t sizes[] = {32, 4, 1};
  std::vector<int64_t> deal(kRows);
  for (int64_t i = 0; i < kRows; ++i) deal[i] = i * 5 % kRows;
  Mixing hadamard, householder;
  library.get<HadamardCodes>("fqt_hadamard_codes")(&source, kRows, kColumns, deal.data(), sizes, 3, &hadamard.how,
                                                   hadamard.order.data(), kThreads);
  hadamard.digest().print("hadamard codes");
  library.get<HouseholderCodes>("fqt_householder_codes")(&source, kRows, kColumns, 1, &householder.how,
                                                         householder.order.data(), householder.normal.data(),
                                                         householder.factor.data(), kThreads);
  householder.digest().add(householder.normal).add(householder.factor).print("householder codes");
  Floats out(kSize);
  library.get<Hadamard>("fqt_hadamard")(&source, kRows, kColumns, deal.data(), sizes, 3, nullptr, nullptr, nullptr, nullptr,
                                        nullptr, nullptr, nullptr, fqt::kFloat32, out.data(), kThreads);
  Digest().add(out).print("hadamard");
}

void digest_kept(const Library& library, const Matrix& matrix) {
  const Source source = matrix.source(false);
  const int64_t n = kSize / 256 * 256;
  Codes flags(kSize / 8 + 1), packed(n / 2), numbers = Numbers(2).codes({0, 15}, n, false);
  Floats gated(kSize), product(n);
  const Floats step = Numbers(3).floats(n / 256), offset = Numbers(4).floats(n / 256), dither = Numbers(5).floats(256);
  library.get<Positive>("fqt_positive")(&source, kSize, flags.data(), kThreads);
  library.get<Gate>("fqt_gate")(&source, kSize, flags.data(), gated.data(), kThreads);
  library.get<Pack>("fqt_pack")(numbers.data(), n, 4, packed.data(), kThreads);
  library.get<KeptTimes>("fqt_kept_times")(&source, n, packed.data(), 4, step.data(), offset.data(), dither.data(),
                                           product.data(), kThreads);
  Digest().add(flags).add(gated).add(packed).add(product).print("kept");
}

void digest_dense(const Library& library, const Matrix& matrix) {
  const int64_t tokens = kRows, inputs = kColumns, outputs = 19;
  const Source source = matrix.source(false);
  const Quantized x = quantize(library, source, 0, 0, 0), rows = quantize(library, source, 1, 0, 2);
  const fqt::Quantized input{x.codes.data(), x.step.data(), x.offset.data(), nullptr, nullptr, 0, 255, 0};
  const fqt::Quantized grad{rows.codes.data(), rows.step.data(), rows.offset.data(), rows.row_noise.data(),
                            rows.column_noise.data(), 0, 254, 1};
  const Codes codes = Numbers(6).codes({-127, 127}, kColumns * kRows, false);
  const Floats step = Numbers(7).floats(kColumns), zero(kColumns);
  const fqt::Quantized weight{codes.data(), step.data(), zero.data(), nullptr, nullptr, -127, 127, 1};
  const fqt::Quantized one_step{codes.data(), step.data(), zero.data(), nullptr, nullptr, -127, 127, 0};
  for (const int type : {fqt::kFloat32, fqt::kBfloat16}) {
    std::vector<uint32_t> output(tokens * outputs), grad_input(kRows * outputs);
    Floats ones(outputs);
    library.get<DenseOutput>("fqt_dense_output")(&input, &weight, step.data(), tokens, inputs, outputs, 1, type,
                                                 output.data(), kThreads);
    library.get<DenseGradInput>("fqt_dense_grad_input")(&grad, &one_step, kRows, outputs, kColumns, 0, ones.data(), type,
                                                        grad_input.data(), kThreads);
    Digest().add(output).add(grad_input).add(ones).print("dense output and grad_input, type " + std::to_string(type));
  }
  const fqt::Fold fold{};
  Floats grad_weight(kColumns * kColumns);
  fqt::Quantized by_column = grad;
  by_column.many = 0;
  library.get<DenseGradWeight>("fqt_dense_grad_weight")(&by_column, &input, tokens, kColumns, kColumns, &fold,
                                                        grad_weight.data(), kThreads);
  Digest().add(grad_weight).print("dense grad_weight");
}

}  // namespace

int main(int, char** arguments) {
  const Library library(arguments[1], arguments[2]);
  const Matrix matrix;
  std::vector<uint32_t> words(1003);
  library.get<Random>("fqt_random")(&kSeed, 1, 8, words.size(), words.data(), kThreads);
  Digest().add(words).print("random");
  digest_quantizers(library, matrix);
  digest_transforms(library, matrix);
  digest_kept(library, matrix);
  digest_dense(library, matrix);
}
