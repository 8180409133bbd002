// Products and transposed copies of matrices that lie in the caches of a core. All kernels consist of these.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

// As many times as any loop of a tile runs.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

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

// Rows that are so many values apart come from memory.
constexpr int64_t FAR_APART = 4096;
// How far ahead they are asked for.
constexpr int64_t AHEAD_BYTES = 2048;

// From value `at` of a run of `run` values to the one that is asked for: the processor follows so many
// runs at a time too late. At the end of a run that lies in the same run `rows` rows further down.
template <typename Value>
inline int64_t ahead_of(int64_t at, int64_t run, int64_t rows, int64_t stride) {
  if (stride <= FAR_APART) return 0;
  const int64_t far = std::min<int64_t>(AHEAD_BYTES / sizeof(Value), run);
  return at + far < run ? far : far + rows * stride - run;
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

// y = x for n numbers.
template <typename Value>
using Widen = void (*)(int64_t n, const Value* x, float* y);

// B (n, m) = A (m, n) transposed.
template <typename Value>
using Transpose = void (*)(int64_t m, int64_t n, const Value* a, int64_t lda, Value* b, int64_t ldb);

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
  std::tuple<Widen<BFloat16>, Widen<int8_t>> widen;
  // y = scale * x, rounded to the nearest. y may begin where x does.
  void (*narrow)(int64_t n, float scale, const float* x, BFloat16* y);
  std::tuple<Transpose<float>, Transpose<BFloat16>> omatcopy;
  // C += A * B^T.
  void (*gemm_nt)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);
};

// The fastest products for this processor.
const Blocks& blocks();

}  // namespace mmkw
