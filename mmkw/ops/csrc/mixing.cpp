// The float32 CPU kernels behind mmkw/ops/native.py, for few mixtures at a time.
//
// A warehouse (n cells of `size` values each) is far larger than the caches next to a core, and few
// mixtures use every value few times: the machine waits for memory. What counts is that a warehouse
// is read once, in long runs, while its next rows are on their way. Its columns are worked on in
// blocks: the result of a block stays in the innermost caches while the cells stream past,
// LANE_CELLS at a time, and is put in its place in the kernel from there.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include <Python.h>

// One function body, compiled for several generations of x86 and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t LANE_CELLS = 8;
constexpr int64_t COLUMNS = 512;
// A block of this many values stays in the innermost cache.
constexpr int64_t BLOCK_VALUES = 9 << 10;
// Mixtures of all images together; from there on arithmetic counts, which BLAS does best.
constexpr int64_t MAX_ROWS = 36;
// Rows of a block are kept apart by one line more than a power of two, so that they do not all
// fall into one set of the cache.
constexpr int64_t BLOCK_STRIDE = COLUMNS + LANES;

// Sixteen values; GCC and Clang split it where a register holds fewer.
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
INLINE void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

INLINE float sum_of(Vec value) {
  typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
  typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));
  const Half* halves = reinterpret_cast<const Half*>(&value);
  const Half half = halves[0] + halves[1];
  const Quarter* quarters = reinterpret_cast<const Quarter*>(&half);
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// --- result[row, column] (+)= sum over J cells of weights[row, J] * cells[J, column] -----------

template <int J, int ROWS>
INLINE void mix_rows(float* result, const float* weights, const Vec (&cells)[J][2], bool begin) {
  Vec sum[ROWS][2];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < 2; v++)
      sum[r][v] = begin ? Vec{} : load(result + r * BLOCK_STRIDE + v * LANES);
  for (int j = 0; j < J; j++)
    for (int r = 0; r < ROWS; r++) {
      const float weight = weights[r * LANE_CELLS + j];
      for (int v = 0; v < 2; v++) sum[r][v] += weight * cells[j][v];
    }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < 2; v++) store(result + r * BLOCK_STRIDE + v * LANES, sum[r][v]);
}

template <int J>
INLINE void mix_cells_of_lane(float* result, int64_t rows, const float* weights,
                              const float* cells, int64_t size, int64_t columns, bool begin,
                              bool more) {
  int64_t c = 0;
  for (; c + 2 * LANES <= columns; c += 2 * LANES) {
    Vec lane[J][2];
    for (int j = 0; j < J; j++)
      for (int v = 0; v < 2; v++) {
        const float* from = cells + j * size + c + v * LANES;
        lane[j][v] = load(from);
        if (more) __builtin_prefetch(from + J * size, 0, 2);
      }
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2)
      mix_rows<J, 2>(result + row * BLOCK_STRIDE + c, weights + row * LANE_CELLS, lane, begin);
    if (row < rows)
      mix_rows<J, 1>(result + row * BLOCK_STRIDE + c, weights + row * LANE_CELLS, lane, begin);
  }
  for (; c < columns; c++)
    for (int64_t row = 0; row < rows; row++) {
      float sum = begin ? 0.f : result[row * BLOCK_STRIDE + c];
      for (int j = 0; j < J; j++) sum += weights[row * LANE_CELLS + j] * cells[j * size + c];
      result[row * BLOCK_STRIDE + c] = sum;
    }
}

// `weights` as packed by pack_weights.
EVERY_CPU void mix_block(float* result, int64_t rows, const float* weights, const float* cells,
                         int64_t num_cells, int64_t size, int64_t columns) {
  for (int64_t first = 0; first < num_cells; first += LANE_CELLS) {
    const float* from = cells + first * size;
    const float* by = weights + first * rows;
    if (first + LANE_CELLS <= num_cells) {
      const bool more = first + 2 * LANE_CELLS <= num_cells;
      mix_cells_of_lane<LANE_CELLS>(result, rows, by, from, size, columns, first == 0, more);
    } else {
      for (int64_t j = 0; first + j < num_cells; j++)
        mix_cells_of_lane<1>(result, rows, by + j, from + j * size, size, columns,
                             first + j == 0, false);
    }
  }
}

// (rows, n) -> (n / LANE_CELLS, rows, LANE_CELLS), the last part filled up.
std::vector<float> pack_weights(const float* weights, int64_t rows, int64_t num_cells) {
  const int64_t parts = (num_cells + LANE_CELLS - 1) / LANE_CELLS;
  std::vector<float> packed(parts * rows * LANE_CELLS);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t j = 0; j < num_cells; j++)
      packed[(j / LANE_CELLS * rows + row) * LANE_CELLS + j % LANE_CELLS] =
          weights[row * num_cells + j];
  return packed;
}

// --- result[i, j] += sum over columns of rows[i, column] * cells[j, column] --------------------

template <int I, int J>
INLINE void dot_tile(float* result, int64_t num_cells, const float* rows, const float* cells,
                     int64_t size, int64_t columns) {
  Vec sum[I][J];
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) sum[i][j] = Vec{};
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    Vec row[I];
    for (int i = 0; i < I; i++) row[i] = load(rows + i * BLOCK_STRIDE + c);
    for (int j = 0; j < J; j++) {
      const Vec cell = load(cells + j * size + c);
      for (int i = 0; i < I; i++) sum[i][j] += row[i] * cell;
    }
  }
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) {
      float total = sum_of(sum[i][j]);
      for (int64_t rest = c; rest < columns; rest++)
        total += rows[i * BLOCK_STRIDE + rest] * cells[j * size + rest];
      result[i * num_cells + j] += total;
    }
}

template <int J>
INLINE void dot_rows(float* result, int64_t num_cells, const float* rows, int64_t num_rows,
                     const float* cells, int64_t size, int64_t columns) {
  int64_t i = 0;
  for (; i + 4 <= num_rows; i += 4)
    dot_tile<4, J>(result + i * num_cells, num_cells, rows + i * BLOCK_STRIDE, cells, size,
                   columns);
  for (; i < num_rows; i++)
    dot_tile<1, J>(result + i * num_cells, num_cells, rows + i * BLOCK_STRIDE, cells, size,
                   columns);
}

EVERY_CPU void dot_block(float* result, const float* rows, int64_t num_rows, const float* cells,
                         int64_t num_cells, int64_t size, int64_t columns) {
  int64_t j = 0;
  for (; j + 6 <= num_cells; j += 6)
    dot_rows<6>(result + j, num_cells, rows, num_rows, cells + j * size, size, columns);
  for (; j < num_cells; j++)
    dot_rows<1>(result + j, num_cells, rows, num_rows, cells + j * size, size, columns);
}

// --- the place of a cell's values in a kernel --------------------------------------------------

// A kernel is (out_blocks, cell_out, in_blocks, run, taps): cells of one place hold runs of input
// channels, which lie `taps` apart; cells that cover the whole kernel size hold it in the run.
struct Places {
  int64_t taps, out_blocks, in_blocks, cell_out, run;
  int64_t rows() const { return taps * out_blocks * in_blocks; }
  int64_t size() const { return cell_out * run; }
};

Places places(at::IntArrayRef grid, at::IntArrayRef cell_shape) {
  const size_t dims = grid.size() - 2;
  Places p{1, grid[dims], grid[dims + 1], cell_shape[0], cell_shape[1]};
  for (size_t dim = 0; dim < dims; dim++) {
    p.taps *= grid[dim];
    p.run *= cell_shape[2 + dim];
  }
  TORCH_CHECK(p.taps == 1 || p.run == cell_shape[1],
              "cells cover either one place of a kernel or all, got grid ", grid, " and cells ",
              cell_shape);
  return p;
}

template <int TAPS, bool INTO_KERNEL, typename Kernel, typename Rows>
INLINE void move_run(Kernel* kernel, Rows* rows, int64_t tap_stride, int64_t taps, int64_t run) {
  const int64_t step = TAPS ? TAPS : taps;
  for (int64_t r = 0; r < run; r++)
    for (int64_t tap = 0; tap < step; tap++)
      if constexpr (INTO_KERNEL)
        kernel[r * step + tap] = rows[tap * tap_stride + r];
      else
        rows[tap * tap_stride + r] = kernel[r * step + tap];
}

// Moves columns [begin, end) of one image's rows, in a block that begins there, into its kernel or,
// the other way, out of it.
template <bool INTO_KERNEL, typename Kernel, typename Rows>
INLINE void move_columns(Kernel* kernel, Rows* rows, const Places& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end;) {
    const int64_t out = c / p.run, in = c % p.run;
    const int64_t run = std::min(p.run - in, end - c);
    for (int64_t ob = 0; ob < p.out_blocks; ob++)
      for (int64_t ib = 0; ib < p.in_blocks; ib++) {
        Kernel* at = kernel + (((ob * p.cell_out + out) * p.in_blocks + ib) * p.run + in) * p.taps;
        Rows* first = rows + (ob * p.in_blocks + ib) * BLOCK_STRIDE + (c - begin);
        const int64_t tap_stride = p.out_blocks * p.in_blocks * BLOCK_STRIDE;
        if (p.taps == 1) {
          if constexpr (INTO_KERNEL)
            std::memcpy(at, first, run * sizeof(float));
          else
            std::memcpy(first, at, run * sizeof(float));
        } else if (p.taps == 9) {
          move_run<9, INTO_KERNEL>(at, first, tap_stride, 9, run);
        } else {
          move_run<0, INTO_KERNEL>(at, first, tap_stride, p.taps, run);
        }
      }
    c += run;
  }
}

EVERY_CPU void rows_to_kernel(float* kernel, const float* rows, const Places& p, int64_t begin,
                              int64_t end) {
  move_columns<true>(kernel, rows, p, begin, end);
}

EVERY_CPU void kernel_to_rows(float* rows, const float* kernel, const Places& p, int64_t begin,
                              int64_t end) {
  move_columns<false>(kernel, rows, p, begin, end);
}

// Runs work(begin, end) over the columns of a cell, a block of so many rows at a time, on all
// threads.
template <typename Work>
void for_blocks(int64_t size, int64_t rows, const Work& work) {
  const int64_t fitting = BLOCK_VALUES / rows / (4 * LANES) * (4 * LANES);
  const int64_t columns = std::clamp<int64_t>(fitting, COLUMNS / 4, COLUMNS);
  at::parallel_for(0, (size + columns - 1) / columns, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) work(b * columns, std::min((b + 1) * columns, size));
  });
}

// --- the operators -----------------------------------------------------------------------------

// What all of them are given: the warehouse, and every mixture's weights on its cells.
struct Mixing {
  Places p;
  int64_t batch, rows, num_cells, size, kernel_size;
  at::Tensor cells;
  std::vector<float> packed;

  Mixing(const at::Tensor& attention, const at::Tensor& warehouse, at::IntArrayRef grid)
      : p(places(grid, warehouse.sizes().slice(1))),
        batch(attention.size(0)),
        rows(batch * p.rows()),
        num_cells(warehouse.size(0)),
        size(p.size()),
        kernel_size(p.rows() * size),
        cells(warehouse.contiguous()) {
    TORCH_CHECK(attention.size(1) == p.rows() && attention.size(2) == num_cells, "attention of ",
                attention.sizes(), " does not fit grid ", grid, " and cells of ",
                warehouse.sizes());
    TORCH_CHECK(rows <= MAX_ROWS, rows, " mixtures, of at most ", MAX_ROWS);
    const at::Tensor weights = attention.reshape({rows, num_cells}).contiguous();
    packed = pack_weights(weights.const_data_ptr<float>(), rows, num_cells);
  }

  void check_kernels(const at::Tensor& kernels) const {
    TORCH_CHECK(kernels.is_contiguous() && kernels.numel() == batch * kernel_size, "kernels of ",
                kernels.sizes(), " for ", batch, " images and ", p.rows(), " cells of ",
                cells.sizes());
  }

  // Columns [begin, end) of all kernels, by way of a block.
  void mix(float* kernels, float* block, int64_t begin, int64_t end) const {
    const float* from = cells.const_data_ptr<float>() + begin;
    mix_block(block, rows, packed.data(), from, num_cells, size, end - begin);
    for (int64_t image = 0; image < batch; image++)
      rows_to_kernel(kernels + image * kernel_size, block + image * p.rows() * BLOCK_STRIDE, p,
                     begin, end);
  }
};

// attention (batch, mixtures, n), cells (n, cell_out, cell_in, ...); fills kernels
// (batch, out, in, ...).
void mix_cells_into(const at::Tensor& attention, const at::Tensor& cells, at::IntArrayRef grid,
                    at::Tensor kernels) {
  const Mixing m(attention, cells, grid);
  m.check_kernels(kernels);
  float* to = kernels.mutable_data_ptr<float>();
  for_blocks(m.size, m.rows, [&](int64_t begin, int64_t end) {
    float block[MAX_ROWS * BLOCK_STRIDE];
    m.mix(to, block, begin, end);
  });
}

// The same into new memory.
at::Tensor mix_cells(const at::Tensor& attention, const at::Tensor& cells, at::IntArrayRef grid) {
  const size_t dims = grid.size() - 2;
  std::vector<int64_t> shape{attention.size(0), grid[dims] * cells.size(1),
                             grid[dims + 1] * cells.size(2)};
  for (size_t dim = 0; dim < dims; dim++) shape.push_back(grid[dim] * cells.size(3 + dim));
  const at::Tensor kernels = at::empty(shape, cells.options());
  mix_cells_into(attention, cells, grid, kernels);
  return kernels;
}

// The backward pass in one pass over the warehouse. From the gradients of the kernels, a list of
// (out, in, ...): fills rows (batch, mixtures, cell_out, cell_in, ...) with them, cut into cells, and
// kernels (batch, out, in, ...) with the mixtures; returns the gradient of the attention.
at::Tensor mix_backward(at::TensorList grad_kernels, const at::Tensor& attention,
                        const at::Tensor& cells, at::IntArrayRef grid, at::Tensor rows,
                        at::Tensor kernels) {
  const Mixing m(attention, cells, grid);
  m.check_kernels(kernels);
  TORCH_CHECK(rows.is_contiguous() && rows.numel() == m.rows * m.size, "rows of ", rows.sizes(),
              " for attention of ", attention.sizes());
  TORCH_CHECK(static_cast<int64_t>(grad_kernels.size()) == m.batch, grad_kernels.size(),
              " gradients for ", m.batch, " images");
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& gradient : grad_kernels) {
    TORCH_CHECK(gradient.numel() == m.kernel_size, "a gradient of ", gradient.sizes(),
                " does not fit grid ", grid, " and cells of ", cells.sizes());
    gradients.push_back(gradient.contiguous());
  }
  // A sum for every thread: their blocks are not disjoint in the attention.
  const at::Tensor parts =
      at::zeros({at::get_num_threads(), m.rows, m.num_cells}, cells.options());
  float* to = kernels.mutable_data_ptr<float>();
  float* part = parts.mutable_data_ptr<float>();
  float* row = rows.mutable_data_ptr<float>();
  const float* from = m.cells.const_data_ptr<float>();
  for_blocks(m.size, m.rows, [&](int64_t begin, int64_t end) {
    float block[MAX_ROWS * BLOCK_STRIDE];
    m.mix(to, block, begin, end);
    for (int64_t image = 0; image < m.batch; image++)
      kernel_to_rows(block + image * m.p.rows() * BLOCK_STRIDE,
                     gradients[image].const_data_ptr<float>(), m.p, begin, end);
    for (int64_t r = 0; r < m.rows; r++)
      std::memcpy(row + r * m.size + begin, block + r * BLOCK_STRIDE,
                  (end - begin) * sizeof(float));
    dot_block(part + at::get_thread_num() * m.rows * m.num_cells, block, m.rows, from + begin,
              m.num_cells, m.size, end - begin);
  });
  return parts.sum(0).view(attention.sizes());
}

}  // namespace

TORCH_LIBRARY(mmkw, library) {
  library.def("mix_cells(Tensor attention, Tensor cells, int[] grid) -> Tensor");
  library.def(
      "mix_backward(Tensor[] grad_kernels, Tensor attention, Tensor cells, int[] grid, "
      "Tensor(a!) rows, Tensor(b!) kernels) -> Tensor");
  library.def(
      "mix_cells_into(Tensor attention, Tensor cells, int[] grid, Tensor(a!) kernels) -> ()");
}

TORCH_LIBRARY_IMPL(mmkw, CPU, library) {
  library.impl("mix_cells", &mix_cells);
  library.impl("mix_cells_into", &mix_cells_into);
  library.impl("mix_backward", &mix_backward);
}

// Importing the module is what loads the library.
PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
