// Products of matrices that lie in the caches of a core. All kernels consist of these products.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <tuple>

namespace mmkw {

using c10::BFloat16;

inline int64_t num_parts(int64_t count, int64_t fitting) { return (count + fitting - 1) / fitting; }

// Cuts a count into the smallest number of parts of at most `fitting`, as even as possible.
template <typename Work>
void for_tiles(int64_t count, int64_t fitting, const Work& work) {
  const int64_t parts = num_parts(count, fitting);
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = count * part / parts;
    work(first, count * (part + 1) / parts - first);
  }
}

// What is asked for ahead of a product that will read it: k rows, so many bytes apart.
struct Next {
  const char* rows = nullptr;
  int64_t stride = 0;
};

// C = beta * C + A * B, beta 0 or 1, A packed tile by tile. Sums are of float32. If there
// is a next, n must be the width of a tile, B of float32, and as much of every next row is asked for.
template <typename Value>
using Gemm = void (*)(int64_t m, int64_t n, int64_t k, const float* a, const Value* b, int64_t ldb,
                      float beta, float* c, int64_t ldc, Next next);

// y = x for n numbers. y may begin where x does, if its numbers are no longer.
template <typename From, typename To>
using Copy = void (*)(int64_t n, const From* x, To* y);

// The products of tiles.h for one generation of processors.
struct Blocks {
  // PyTorch's name for the generation.
  const char* cpu_level;
  // In gemm_nt, k must be a multiple of this number.
  int64_t lanes;
  // A tile of gemm has at most `rows` rows and exactly `width` columns. In gemm, n must be a
  // multiple of `width`.
  int64_t rows, width;
  // For every precision in which cells are stored.
  std::tuple<Gemm<float>, Gemm<BFloat16>, Gemm<int8_t>> gemm;
  std::tuple<Copy<BFloat16, float>, Copy<int8_t, float>> widen;
  // Rounds to the nearest.
  Copy<float, BFloat16> narrow;
  // C += A * B^T.
  void (*gemm_nt)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);
};

// The fastest products for this processor.
const Blocks& blocks();

}  // namespace mmkw
