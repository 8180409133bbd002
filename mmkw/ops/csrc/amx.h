// Products of matrices in bfloat16 by Intel's matrix instructions, for blocks that lie in the caches.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

namespace mmkw {
namespace amx {

using c10::BFloat16;

// Whether this processor has the instructions, the system lets us use them, and PyTorch computes
// with AVX-512.
bool is_available();

// B has a multiple of this number of columns.
constexpr int64_t COLUMNS = 64;
// The instructions sum up so many terms at a time. Others are zeros.
constexpr int64_t TERMS = 32;

// Values of B with so many terms and columns: the terms are filled up.
inline int64_t values_of(int64_t terms, int64_t columns) {
  return (terms + TERMS - 1) / TERMS * TERMS * columns;
}

// B (terms, columns) as the instructions read it: column by column the values of two terms, then
// the next two terms. It is copied from `count` columns of a matrix whose rows are `stride` apart;
// the other columns, and terms beyond the last one, are zeros. float32 is rounded.
void pair(int64_t terms, int64_t columns, int64_t count, const float* from, int64_t stride,
          BFloat16* to);
void pair(int64_t terms, int64_t columns, int64_t count, const BFloat16* from, int64_t stride,
          BFloat16* to);
void pair(int64_t terms, int64_t columns, int64_t count, const int8_t* from, int64_t stride,
          BFloat16* to);

// A (rows, terms), in the order in which the instructions read it. A value is the sum of two of
// bfloat16, so that it keeps 16 bits.
class Left {
 public:
  Left(const float* a, int64_t rows, int64_t terms);

  // C (rows, columns) = A * B, for B of `pair`.
  void multiply(const BFloat16* b, int64_t columns, float* c, int64_t ldc) const;

 private:
  int64_t rows_, steps_;
  std::vector<BFloat16> packed_;
};

}  // namespace amx
}  // namespace mmkw
