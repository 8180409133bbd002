// Products of blocks that lie in the caches next to a core, for one generation of processors.
//
// blocks.cpp includes this file once for each of them, in a namespace of its own, with
//   CPU_LEVEL  its name,
//   TARGET  the attribute that lets the compiler use the generation's instructions,
//   LANES   floats in a vector register,
//   ROWS, VECTORS  of a product's tile, and DOT_ROWS, DOT_CELLS of a tile of inner products: as
//                  many sums as there are registers for beside the operands.

#define INLINE TARGET inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int64_t WIDTH = LANES * VECTORS;

INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }

// result[r, :WIDTH] (+)= sum over k of weights[k, r] * rows[k, :WIDTH]
template <int R>
INLINE void tile(float* result, int64_t result_stride, const float* weights, const float* rows,
                 int64_t rows_stride, int64_t count, bool begin) {
  Vec sum[R][VECTORS];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++)
      sum[r][v] = begin ? Vec{} : load(result + r * result_stride + v * LANES);
  for (int64_t k = 0; k < count; k++) {
    Vec row[VECTORS];
    for (int v = 0; v < VECTORS; v++) row[v] = load(rows + v * LANES);
    for (int r = 0; r < R; r++) {
      const float weight = weights[r];
      for (int v = 0; v < VECTORS; v++) sum[r][v] += weight * row[v];
    }
    weights += R;
    rows += rows_stride;
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++)
      *reinterpret_cast<Vec*>(result + r * result_stride + v * LANES) = sum[r][v];
}

// Tiles of num_rows <= R rows.
template <int R>
TARGET void tiles(int64_t num_rows, float* result, int64_t result_stride, const float* weights,
                  const float* rows, int64_t rows_stride, int64_t count, int64_t columns,
                  bool begin) {
  if constexpr (R > 1)
    if (num_rows < R)
      return tiles<R - 1>(num_rows, result, result_stride, weights, rows, rows_stride, count,
                          columns, begin);
  for (int64_t c = 0; c < columns; c += WIDTH)
    tile<R>(result + c, result_stride, weights, rows + c, rows_stride, count, begin);
}

// result (num_rows, columns) (+)= weights (num_rows, count) * rows (count, columns), columns a
// multiple of WIDTH; the weights lie tile by tile, count by rows of the tile.
TARGET void product(float* result, int64_t result_stride, int64_t num_rows, const float* weights,
                    const float* rows, int64_t rows_stride, int64_t count, int64_t columns,
                    bool begin) {
  for_tiles(num_rows, ROWS, [&](int64_t first, int64_t tile_rows) {
    tiles<ROWS>(tile_rows, result + first * result_stride, result_stride, weights + first * count,
                rows, rows_stride, count, columns, begin);
  });
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Adds up the lanes of four vectors.
INLINE Four sums_of(const Vec (&values)[4]) {
  Four sum[4];
  for (int i = 0; i < 4; i++) {
    const Four* parts = reinterpret_cast<const Four*>(&values[i]);
    sum[i] = parts[0];
    for (int part = 1; part < LANES / 4; part++) sum[i] += parts[part];
  }
  const Four low = SHUFFLE(sum[0], sum[1], 0, 1, 4, 5) + SHUFFLE(sum[0], sum[1], 2, 3, 6, 7);
  const Four high = SHUFFLE(sum[2], sum[3], 0, 1, 4, 5) + SHUFFLE(sum[2], sum[3], 2, 3, 6, 7);
  return SHUFFLE(low, high, 0, 2, 4, 6) + SHUFFLE(low, high, 1, 3, 5, 7);
}

// result[i, j] += sum over columns of rows[i, column] * cells[j, column]
template <int I, int J>
INLINE void dot_tile(float* result, int64_t result_stride, const float* rows, int64_t rows_stride,
                     const float* cells, int64_t cells_stride, int64_t columns) {
  Vec sum[I][J];
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) sum[i][j] = Vec{};
  for (int64_t c = 0; c < columns; c += LANES) {
    Vec row[I];
    for (int i = 0; i < I; i++) row[i] = load(rows + i * rows_stride + c);
    for (int j = 0; j < J; j++) {
      const Vec cell = load(cells + j * cells_stride + c);
      for (int i = 0; i < I; i++) sum[i][j] += row[i] * cell;
    }
  }
  for (int i = 0; i < I; i++)
    for (int first = 0; first < J; first += 4) {
      Vec four[4] = {};
      for (int j = first; j < J && j < first + 4; j++) four[j - first] = sum[i][j];
      const Four sums = sums_of(four);
      for (int j = first; j < J && j < first + 4; j++)
        result[i * result_stride + j] += sums[j - first];
    }
}

// Tiles of num_rows <= I rows and num_cells <= J cells.
template <int I, int J>
TARGET void dot_tiles(int64_t num_rows, int64_t num_cells, float* result, int64_t result_stride,
                      const float* rows, int64_t rows_stride, const float* cells,
                      int64_t cells_stride, int64_t columns) {
  if constexpr (I > 1)
    if (num_rows < I)
      return dot_tiles<I - 1, J>(num_rows, num_cells, result, result_stride, rows, rows_stride,
                                 cells, cells_stride, columns);
  if constexpr (J > 1)
    if (num_cells < J)
      return dot_tiles<I, J - 1>(num_rows, num_cells, result, result_stride, rows, rows_stride,
                                 cells, cells_stride, columns);
  dot_tile<I, J>(result, result_stride, rows, rows_stride, cells, cells_stride, columns);
}

// result (num_rows, num_cells) += rows (num_rows, columns) * cells (num_cells, columns) transposed,
// columns a multiple of LANES.
TARGET void dots(float* result, int64_t result_stride, const float* rows, int64_t num_rows,
                 int64_t rows_stride, const float* cells, int64_t num_cells, int64_t cells_stride,
                 int64_t columns) {
  for_tiles(num_cells, DOT_CELLS, [&](int64_t cell, int64_t tile_cells) {
    for_tiles(num_rows, DOT_ROWS, [&](int64_t row, int64_t tile_rows) {
      dot_tiles<DOT_ROWS, DOT_CELLS>(tile_rows, tile_cells, result + row * result_stride + cell,
                                     result_stride, rows + row * rows_stride, rows_stride,
                                     cells + cell * cells_stride, cells_stride, columns);
    });
  });
}

constexpr Blocks blocks{CPU_LEVEL, LANES, ROWS, WIDTH, &product, &dots};

#undef INLINE
#undef CPU_LEVEL
#undef TARGET
#undef LANES
#undef ROWS
#undef VECTORS
#undef DOT_ROWS
#undef DOT_CELLS
