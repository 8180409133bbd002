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
  // Of inner products the columns come in multiples of this.
  int64_t lanes;
  // Of a product's tile: the most rows, and the columns.
  int64_t rows, width;
  void (*product)(float* result, int64_t result_stride, int64_t num_rows, const float* weights,
                  const float* rows, int64_t rows_stride, int64_t count, int64_t columns,
                  bool begin);
  void (*dots)(float* result, int64_t result_stride, const float* rows, int64_t num_rows,
               int64_t rows_stride, const float* cells, int64_t num_cells, int64_t cells_stride,
               int64_t columns);
};

// The fastest for this processor.
const Blocks& blocks();

}  // namespace mmkw
