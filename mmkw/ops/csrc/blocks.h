// Products of blocks that lie in the caches next to a core: what all the kernels are made of.

#pragma once

#include <cstdint>

namespace mmkw {

inline int64_t num_parts(int64_t count, int64_t fitting) { return (count + fitting - 1) / fitting; }

// Cuts a count into as few parts of at most `fitting` as there can be, as even as possible.
template <typename Work>
void for_tiles(int64_t count, int64_t fitting, const Work& work) {
  const int64_t parts = num_parts(count, fitting);
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = count * part / parts;
    work(first, count * (part + 1) / parts - first);
  }
}

// What tiles.h offers for a generation of processors.
struct Blocks {
  // As PyTorch names it.
  const char* cpu_level;
  // Of gemm_nt k comes in multiples of this.
  int64_t lanes;
  // Of a tile of gemm: the most rows, and the columns, of which n is a multiple.
  int64_t rows, width;
  // C = beta * C + A * B, beta 0 or 1, A packed tile by tile.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const float* a, const float* b, int64_t ldb,
               float beta, float* c, int64_t ldc);
  // C += A * B^T.
  void (*gemm_nt)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);
};

// The fastest for this processor.
const Blocks& blocks();

}  // namespace mmkw
