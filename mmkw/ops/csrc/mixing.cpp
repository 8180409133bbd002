// Mixing and its backward pass on the CPU, behind mmkw/ops/compiled.py. Arithmetic is in float32.
// Cells and kernels may also be stored in bfloat16: half as much to read and to write. Cells may be
// integers of eight bits: their scales are in the attention. Kernels in bfloat16 with many mixtures,
// and those of cells in fewer bits, are mixed by matrix instructions, where there are any. Cells and
// kernels in bfloat16 are mixed, also back, by instructions for its vectors, where there are any.
//
// A warehouse is a matrix with n cells as rows of `size` values. It is far larger than the caches
// of a core. Its rows often lie a power of two apart, so that one column of all rows falls into few
// sets of a cache. Therefore the operators work on blocks of columns.
//
// With few mixtures every value is used few times, and the time goes to reading memory. Then a few
// cells at a time are read in long runs, directly from the warehouse ("streamed"). With many
// mixtures the time goes to arithmetic. Then a block of the warehouse is copied, stays in the
// caches, and is used for all mixtures. tiles.h has the arithmetic.

#include "amx.h"
#include "blocks.h"
#include "operators.h"
#include "sbgemm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace mmkw {
namespace {

// --- weights of a product ------------------------------------------------------------------------

// Weights (rows, terms) in the order in which `gemm` reads them. They are cut into parts of at most
// `part_terms` terms. Within a part they lie tile by tile. For values of bfloat16 they may be paired:
// divided by the scale of their row, if there are scales, rounded, and in the order of `sbgemm`.
class Weights {
 public:
  Weights(const float* weights, int64_t rows, int64_t row_stride, int64_t terms,
          int64_t term_stride, int64_t part_terms, bool paired, const float* scales = nullptr)
      : rows_(rows), terms_(terms), part_terms_(part_terms) {
    const auto pack = [&](auto& packed, int64_t step, int64_t tile, const auto& value) {
      packed.resize(rows * num_parts(terms, step) * step);
      auto* to = packed.data();
      for_parts([&](int64_t first, int64_t count) {
        for_tiles(rows, tile, [&](int64_t row, int64_t tile_rows) {
          for (int64_t term = first; term < first + count; term += step)
            for (int64_t r = row; r < row + tile_rows; r++)
              for (int64_t t = term; t < term + step; t++) *to++ = value(r, t);
        });
      });
    };
    const auto given = [&](int64_t row, int64_t term) {
      return weights[row * row_stride + term * term_stride];
    };
    if (paired)
      pack(pairs_, 2, sbgemm::ROWS, [&](int64_t row, int64_t term) {
        return term < terms ? given(row, term) / (scales ? scales[row] : 1) : 0;
      });
    else
      pack(packed_, 1, blocks().rows, given);
  }

  // Calls work(first term, terms) for every part. The first is even.
  template <typename Work>
  void for_parts(const Work& work) const {
    for_tiles(num_parts(terms_, 2), part_terms_ / 2, [&](int64_t first, int64_t count) {
      work(2 * first, std::min(2 * count, terms_ - 2 * first));
    });
  }

  // result (rows, columns) (+)= weights of a part * values (terms of the part, columns). columns
  // must be a multiple of the width of a tile.
  template <typename Value>
  void multiply(int64_t first, int64_t terms, float* result, int64_t result_stride,
                const Value* values, int64_t stride, int64_t columns, bool begin,
                Next next = {}) const {
    const float beta = begin ? 0 : 1;
    if constexpr (std::is_same_v<Value, BFloat16>)
      if (!pairs_.empty())
        return sbgemm::gemm(rows_, columns, terms, pairs_.data() + first * rows_, values, stride,
                            beta, result, result_stride, next);
    const Gemm<Value> gemm = std::get<Gemm<Value>>(blocks().gemm);
    gemm(rows_, columns, terms, packed_.data() + first * rows_, values, stride, beta, result,
         result_stride, next);
  }

 private:
  int64_t rows_, terms_, part_terms_;
  std::vector<float> packed_;
  std::vector<BFloat16> pairs_;
};

// --- the place of a cell's values in a kernel --------------------------------------------------

// A kernel lies in memory as (out_blocks, cell_out, in_blocks, run, taps). If a cell covers one
// place of the kernel, its run is its input channels, which lie `taps` apart in the kernel. If a
// cell covers all places, its run is the input channels with all places, and taps is 1.
struct Places {
  int64_t taps, out_blocks, in_blocks, cell_out, run;
  int64_t rows() const { return taps * out_blocks * in_blocks; }
  int64_t size() const { return cell_out * run; }
};

Places places(at::IntArrayRef grid, at::IntArrayRef warehouse) {
  const bool fits = warehouse.size() > 3 && grid.size() + 1 == warehouse.size();
  TORCH_CHECK(fits && std::all_of(grid.begin(), grid.end(), [](int64_t side) { return side > 0; }) &&
                  std::all_of(warehouse.begin(), warehouse.end(), [](int64_t s) { return s > 0; }),
              "grid ", grid, " does not fit cells of ", warehouse);
  const at::IntArrayRef cell_shape = warehouse.slice(1);
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

template <typename From, typename To>
inline void copy_run(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, count * sizeof(To));
  else if constexpr (std::is_same_v<To, float>)
    std::get<Widen<From>>(blocks().widen)(count, from, to);
  else
    blocks().narrow(count, 1, from, to);
}

template <typename Value>
void omatcopy(int64_t m, int64_t n, const Value* a, int64_t lda, Value* b, int64_t ldb) {
  std::get<Transpose<Value>>(blocks().omatcopy)(m, n, a, lda, b, ldb);
}

// Moves a kernel's values (run, taps) to rows (taps, run), `tap_stride` apart.
template <typename Value, typename Given>
void out_of_kernel(const Given* kernel, Value* rows, int64_t tap_stride, int64_t taps, int64_t run) {
  const Value* values;
  if constexpr (std::is_same_v<Value, Given>) {
    values = kernel;
  } else {
    // Kept from call to call, as the memory of the blocks is.
    thread_local std::vector<Value> converted;
    converted.resize(std::max<size_t>(converted.size(), run * taps));
    copy_run(kernel, run * taps, converted.data());
    values = converted.data();
  }
  omatcopy(run, taps, values, taps, rows, tap_stride);
}

// Moves columns [begin, end) of one image's rows into its kernel, or out of the kernel. `rows` is a
// block that starts at column `begin`.
template <bool INTO_KERNEL, typename Kernel, typename Rows>
void move_columns(Kernel* kernel, Rows* rows, int64_t stride, const Places& p, int64_t begin,
                  int64_t end) {
  for (int64_t c = begin; c < end;) {
    const int64_t out = c / p.run, in = c % p.run;
    const int64_t run = std::min(p.run - in, end - c);
    for (int64_t ob = 0; ob < p.out_blocks; ob++)
      for (int64_t ib = 0; ib < p.in_blocks; ib++) {
        Kernel* at = kernel + (((ob * p.cell_out + out) * p.in_blocks + ib) * p.run + in) * p.taps;
        Rows* first = rows + (ob * p.in_blocks + ib) * stride + (c - begin);
        const int64_t tap_stride = p.out_blocks * p.in_blocks * stride;
        if constexpr (INTO_KERNEL) {
          if (p.taps == 1)
            copy_run(first, run, at);
          else
            omatcopy<Kernel>(p.taps, run, first, tap_stride, at, p.taps);
        } else {
          if (p.taps == 1)
            copy_run(at, run, first);
          else
            out_of_kernel(at, first, tap_stride, p.taps, run);
        }
      }
    c += run;
  }
}

// --- blocks of columns -------------------------------------------------------------------------

// The columns of a block are a multiple of this number. It is itself a multiple of every `width`.
constexpr int64_t COLUMNS_STEP = 64;
// The most columns of a block. Long runs help if rows are read directly, but not for copies.
constexpr int64_t STREAMED_COLUMNS = 4096;
constexpr int64_t COPIED_COLUMNS = 256;
// Terms that a product sums up at a time, for rows that are read directly in pairs or from panels, and
// for copied rows. A tile's columns of COPIED_TERMS rows fit into the innermost cache.
constexpr int64_t PAIRED_TERMS = 16, PANEL_TERMS = 128;
constexpr int64_t COPIED_TERMS = 192;
// The same where matrix instructions mix, and the mixtures from which on they do: with fewer the
// time goes to reading memory, which long runs do faster.
constexpr int64_t AMX_COLUMNS = 512;
constexpr int64_t AMX_ROWS = 32, AMX_ROWS_OF_SHORT = 12;
// From this number of mixtures on, arithmetic takes longer than reading memory.
constexpr int64_t MANY_ROWS = 40;
// Values in the blocks of one thread. They should stay in the private cache of a core.
constexpr int64_t BLOCK_VALUES = 96 << 10;
// Bytes of a cache line, and of the widest vector.
constexpr int64_t LINE = 64;

// Memory for some columns of a matrix.
template <typename Value>
struct Block {
  Value* values;
  int64_t stride;

  Block(float* memory, int64_t columns)
      : values(reinterpret_cast<Value*>(memory)), stride(stride_of(columns)) {}

  // Between the rows lies a cache line, so that they are not a power of two apart.
  static int64_t stride_of(int64_t columns) { return columns + LINE / sizeof(Value); }

  // The block from a column on.
  Block from(int64_t column) const {
    Block rest = *this;
    rest.values += column;
    return rest;
  }

  // The size of its memory, in numbers of float32.
  static int64_t floats(int64_t rows, int64_t columns) {
    return rows * stride_of(columns) * sizeof(Value) / sizeof(float);
  }
};

// Columns [begin, begin + count) of a matrix, and whether the same thread works on the next ones then.
struct Span {
  int64_t begin, count;
  bool has_next = false;
};

// The threads that share the work: one if the caller is one of several itself.
int64_t num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Terms that a product sums up at a time, for rows that are read directly, not in pairs. The more there
// are, the less often sums are read and written. But rows a power of two apart fall into one set of the
// second cache, which must have as many ways. Intel's have 16, and are faster with 8 all the same.
int64_t streamed_terms() {
#if defined(__x86_64__) && defined(_SC_LEVEL2_CACHE_ASSOC)
  static const bool has_many_ways = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && sysconf(_SC_LEVEL2_CACHE_ASSOC) >= 16;
  }();
  if (has_many_ways) return 16;
#endif
  return 8;
}

// The number of columns after the last tile is filled up.
int64_t padded(int64_t count) { return num_parts(count, blocks().width) * blocks().width; }

// The number of columns of blocks with so many rows of float32 together.
int64_t block_columns(int64_t size, int64_t rows, int64_t most) {
  const int64_t shared = size / (4 * num_threads());
  return std::max<int64_t>(std::min({most, BLOCK_VALUES / (rows + 1), shared}) / COLUMNS_STEP, 1) *
         COLUMNS_STEP;
}

// Blocks are grouped into shares. A free thread takes the next share, because cores are not equally
// fast. This is the number of shares per thread.
constexpr int64_t SHARES = 8;

// The most values that the sums of all shares have together. For larger sums there is one share per
// thread.
constexpr int64_t SUM_VALUES = 8 << 20;

// The number of shares for these columns, if every share sums up so many values.
int64_t num_shares(int64_t size, int64_t columns, int64_t sum_values) {
  const int64_t threads = num_threads();
  const int64_t fitting = std::max(SUM_VALUES / std::max<int64_t>(sum_values, 1), threads);
  return std::min({num_parts(size, columns), SHARES * threads, fitting});
}

// Runs work(span, memory, share) for blocks of all `size` columns, on all threads. `values` is the
// number of values of memory for a call, which begins with a cache line. The blocks of a share run
// one after the other on one thread. So the sum of a share does not depend on the thread.
template <typename Work>
void for_blocks(int64_t size, int64_t columns, int64_t values, const Work& work,
                int64_t sum_values = 0) {
  const int64_t count = num_parts(size, columns), shares = num_shares(size, columns, sum_values);
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(num_threads(), shares);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // Kept from call to call, because fresh memory would take longer than the work itself.
    thread_local std::vector<float> memory;
    const size_t needed = values + LINE / sizeof(float);
    if (memory.size() < needed) memory.resize(needed);
    const uintptr_t begin = num_parts(reinterpret_cast<uintptr_t>(memory.data()), LINE) * LINE;
    for (int64_t share = next++; share < shares; share = next++)
      for (int64_t b = count * share / shares, end = count * (share + 1) / shares; b < end; b++)
        work(Span{b * columns, std::min(columns, size - b * columns), b + 1 < end},
             reinterpret_cast<float*>(begin), share);
  });
}

// Cells in bfloat16 that all layers of a pass read: panels of some columns, one after the other. In
// a panel lie all cells, so it is read like one row, and its parts stay in the caches for all that is
// computed of them. Its rows are no power of two apart.
struct Panels {
  int64_t stride, columns, num_cells;
  BFloat16* values;

  // From Tensor (panels, n, columns and a cache line), of cells (n, cell_out, cell_in, ...).
  Panels(const at::Tensor& panels, const at::Tensor& cells) : num_cells(cells.size(0)) {
    const int64_t size = cells.numel() / num_cells;
    TORCH_CHECK(sbgemm::is_available(), "this processor does not multiply panels of bfloat16");
    TORCH_CHECK(panels.dim() == 3 && panels.is_contiguous() && cells.scalar_type() == at::kFloat &&
                    size % sbgemm::COLUMNS == 0,
                "panels of ", panels.sizes(), ", which must be dense, do not fit cells of ",
                cells.sizes(), " in ", cells.scalar_type(), ": it must be float32, a multiple of ",
                sbgemm::COLUMNS, " numbers a cell");
    stride = panels.size(2);
    columns = stride - LINE / sizeof(BFloat16);
    TORCH_CHECK(columns > 0 && columns % COLUMNS_STEP == 0 &&
                    panels.size(0) == num_parts(size, columns) && panels.size(1) == num_cells,
                "panels of ", panels.sizes(), " do not fit cells of ", cells.sizes());
    values = panels.mutable_data_ptr<BFloat16>();
  }

  // A cell in the panel that begins with a column.
  BFloat16* at(int64_t column, int64_t cell = 0) const {
    return values + (column / columns * num_cells + cell) * stride;
  }
};

// Writes zeros after the last column, up to the end of the last tile.
template <typename Value>
void clear_rest(const Block<Value>& block, int64_t rows, int64_t count) {
  if (count < padded(count))
    for (int64_t row = 0; row < rows; row++)
      std::memset(block.values + row * block.stride + count, 0,
                  (padded(count) - count) * sizeof(Value));
}

// Copies some columns of a matrix (rows, size).
template <typename To, typename Value>
void copy_columns(const Block<To>& block, const Value* matrix, int64_t rows, int64_t size,
                  Span span) {
  constexpr int64_t AHEAD = 3, STEP = LINE / sizeof(Value);
  for (int64_t row = 0; row < rows; row++) {
    const Value* from = matrix + row * size + span.begin;
    if (row + AHEAD < rows)
      for (int64_t c = 0; c < span.count; c += STEP)
        __builtin_prefetch(from + AHEAD * size + c, 0, 2);
    copy_run(from, span.count, block.values + row * block.stride);
  }
  clear_rest(block, rows, span.count);
}

// --- common parts of the operators ---------------------------------------------------------------

// Whether a tensor is contiguous, of this shape and precision.
bool is_dense(const at::Tensor& tensor, at::IntArrayRef shape,
              at::ScalarType precision = at::kFloat) {
  return tensor.sizes() == shape && tensor.is_contiguous() && tensor.scalar_type() == precision;
}

// Whether instructions for bfloat16 multiply these rows of `size` values.
bool is_paired(const at::Tensor& rows, int64_t size) {
  return rows.scalar_type() == at::kBFloat16 && size % sbgemm::COLUMNS == 0 &&
         sbgemm::is_available();
}

// As with_values, for cells, which may be integers, too.
template <typename Work>
void with_cells(const at::Tensor& cells, const Work& work) {
  if (cells.scalar_type() == at::kChar)
    work(cells.const_data_ptr<int8_t>());
  else
    with_values(cells, work);
}

// The largest weight of every row, or 1 if there are zeros alone.
std::vector<float> largest(const float* weights, int64_t rows, int64_t terms) {
  std::vector<float> found(rows);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t term = 0; term < terms; term++)
      found[row] = std::max(found[row], std::abs(weights[row * terms + term]));
    if (found[row] == 0) found[row] = 1;
  }
  return found;
}

// The inputs of mixing: the warehouse, and the weights of its cells in every mixture.
struct Mixing {
  Places p;
  int64_t batch, rows, num_cells, size, kernel_size;
  // Whether products can read the warehouse directly: blocks of its columns fill whole tiles.
  bool aligned;
  // Whether matrix instructions mix: they round cells to bfloat16, which holds shorter ones exactly.
  // They have their own weights, of which nothing is divided.
  bool by_amx;
  // Whether instructions for vectors of bfloat16 multiply, as cells and kernels are of it.
  bool paired;
  // Whether the values of all cells at one column lie together. Then copies are transposed.
  bool transposed;
  // Whether products do read the cells directly to mix: they are aligned, and paired or the mixtures few.
  bool streamed;
  at::Tensor cells, attention;
  // If paired, the largest weight of every mixture: its weights are divided by that, and the mixture is
  // multiplied by it. So a mixture of hardly more than one cell has that cell's weight in float32.
  std::vector<float> scales;
  Weights weights;

  Mixing(const at::Tensor& attention_of_images, const at::Tensor& warehouse, at::IntArrayRef grid,
         bool rounds, bool in_panels = false)
      : p(places(grid, warehouse.sizes())),
        batch(attention_of_images.dim() ? attention_of_images.size(0) : 0),
        rows(batch * p.rows()),
        num_cells(warehouse.size(0)),
        size(p.size()),
        kernel_size(p.rows() * size),
        aligned(size % blocks().width == 0),
        by_amx(!in_panels && uses_amx(warehouse.scalar_type() != at::kFloat, rounds)),
        paired(in_panels || (rounds && !by_amx && is_paired(warehouse, size))),
        transposed(!in_panels && !by_amx && !paired && warehouse.scalar_type() == at::kFloat &&
                   !warehouse.is_contiguous() && warehouse.movedim(0, -1).is_contiguous()),
        streamed(paired || (aligned && rows < MANY_ROWS && !transposed)),
        // What lies in panels is not read.
        cells(in_panels || transposed ? warehouse : warehouse.contiguous()),
        attention(dense(checked(attention_of_images, grid))),
        scales(paired ? largest(attention.const_data_ptr<float>(), rows, num_cells)
                      : std::vector<float>()),
        weights(attention.const_data_ptr<float>(), rows, attention.stride(1), num_cells,
                attention.stride(2),
                in_panels  ? PANEL_TERMS
                : paired   ? PAIRED_TERMS
                : streamed ? streamed_terms()
                           : COPIED_TERMS,
                paired, scales.data()) {}

  const at::Tensor& checked(const at::Tensor& given, at::IntArrayRef grid) const {
    TORCH_CHECK(given.dim() == 3 && given.size(1) == p.rows() && given.size(2) == num_cells &&
                    given.scalar_type() == at::kFloat &&
                    (is_stored(cells) || cells.scalar_type() == at::kChar),
                "attention of ", given.sizes(), " does not fit grid ", grid, " and cells of ", cells.sizes());
    return given;
  }

  // Of one image attentions are read as they lie, unless they are rounded.
  at::Tensor dense(const at::Tensor& given) const {
    return batch > 1 || by_amx || paired ? given.contiguous() : given;
  }

  void check_kernels(const at::Tensor& kernels, at::IntArrayRef grid) const {
    TORCH_CHECK(kernels.sizes() == kernel_shape(batch, cells, grid) && kernels.is_contiguous() &&
                    is_stored(kernels),
                "kernels of ", kernels.sizes(), " for ", batch, " images, grid ", grid,
                " and cells of ", cells.sizes());
    TORCH_CHECK(!paired || kernels.scalar_type() == at::kBFloat16,
                "kernels from panels must be of bfloat16, not ", kernels.scalar_type());
  }

  bool uses_amx(bool is_short, bool rounds) const {
    return rows >= (is_short ? AMX_ROWS_OF_SHORT : AMX_ROWS) && (is_short || rounds) &&
           amx::is_available();
  }

  // mixed (+)= the contribution of a part of the cells, which are read directly.
  void mix_part(const Block<float>& mixed, Span span, int64_t first, int64_t count) const {
    with_cells(cells, [&](const auto* warehouse) {
      weights.multiply(first, count, mixed.values, mixed.stride,
                       warehouse + first * size + span.begin, size, span.count, first == 0);
    });
  }

  // The same of rows of a panel. What lies behind them is asked for if it is `next`.
  void mix_part(const Block<float>& mixed, Span span, int64_t first, int64_t count,
                const BFloat16* rows, int64_t stride, bool next) const {
    const BFloat16* const behind = next ? rows + count * stride : nullptr;
    weights.multiply(first, count, mixed.values, mixed.stride, rows, stride, span.count,
                     first == 0, {reinterpret_cast<const char*>(behind)});
  }

  void copy_cells(const Block<float>& block, Span span) const {
    if (transposed) {
      const float* const from = cells.const_data_ptr<float>() + span.begin * num_cells;
      omatcopy(span.count, num_cells, from, num_cells, block.values, block.stride);
      return clear_rest(block, num_cells, span.count);
    }
    with_cells(cells, [&](const auto* warehouse) {
      copy_columns(block, warehouse, num_cells, size, span);
    });
  }

  // mixed = columns of the mixtures, from a copy of the span's columns of the cells. Meanwhile the next
  // ones are asked for, if this thread copies them.
  void mix_copied(const Block<float>& mixed, const Block<float>& copy, Span span) const {
    const int64_t width = blocks().width;
    const int64_t bytes = cells.element_size(), stride = size * bytes;
    const char* const warehouse = static_cast<const char*>(cells.const_data_ptr());
    weights.for_parts([&](int64_t first, int64_t terms) {
      // A tile's columns of the part stay in the innermost cache for all mixtures.
      for (int64_t c = 0; c < span.count; c += width) {
        Next next;
        if (const int64_t column = span.begin + span.count + c;
            span.has_next && column < size && !transposed)
          next = {warehouse + first * stride + column * bytes, stride};
        weights.multiply(first, terms, mixed.values + c, mixed.stride,
                         copy.values + first * copy.stride + c, copy.stride, width, first == 0, next);
      }
    });
  }

  // Overwrites the block.
  void into_kernels(const at::Tensor& kernels, const Block<float>& mixed, Span span) const {
    if (kernels.scalar_type() == at::kFloat)
      return move_rows(kernels.mutable_data_ptr<float>(), mixed.values, mixed.stride, span);
    // Rounded row by row, in place: kernels then take single numbers out of the rows.
    for (int64_t row = 0; row < rows; row++) {
      float* const values = mixed.values + row * mixed.stride;
      blocks().narrow(span.count, paired ? scales[row] : 1, values,
                      reinterpret_cast<BFloat16*>(values));
    }
    move_rows(kernels.mutable_data_ptr<BFloat16>(),
              reinterpret_cast<const BFloat16*>(mixed.values), 2 * mixed.stride, span);
  }

  template <typename Value>
  void move_rows(Value* kernels, const Value* mixed, int64_t stride, Span span) const {
    for (int64_t image = 0; image < batch; image++)
      move_columns<true>(kernels + image * kernel_size, mixed + image * p.rows() * stride, stride,
                         p, span.begin, span.begin + span.count);
  }
};

}  // namespace

// (batch, out, in, *kernel_size), of cells (n, cell_out, cell_in, *cell_kernel).
std::vector<int64_t> kernel_shape(int64_t batch, const at::Tensor& cells, at::IntArrayRef grid) {
  places(grid, cells.sizes());
  const size_t dims = grid.size() - 2;
  std::vector<int64_t> shape{batch, grid[dims] * cells.size(1), grid[dims + 1] * cells.size(2)};
  for (size_t dim = 0; dim < dims; dim++) shape.push_back(grid[dim] * cells.size(3 + dim));
  return shape;
}

// --- the operators -----------------------------------------------------------------------------

// Rounds cells (n, cell_out, cell_in, ...) of float32 to panels.
void pack_cells(const at::Tensor& cells, at::Tensor panels) {
  TORCH_CHECK(cells.dim() > 0 && cells.numel() > 0 && is_dense(cells, cells.sizes()), "cells of ",
              cells.sizes(), " must be dense float32");
  const Panels to(panels, cells);
  const int64_t size = cells.numel() / to.num_cells;
  const float* const from = cells.const_data_ptr<float>();
  for_blocks(size, to.columns, 0, [&](Span span, float*, int64_t) {
    BFloat16* row = to.at(span.begin);
    for (int64_t cell = 0; cell < to.num_cells; cell++, row += to.stride)
      blocks().narrow(span.count, 1, from + cell * size + span.begin, row);
  });
}

// Fills kernels (batch, out, in, ...) from attention (batch, mixtures, n) and cells (n, cell_out,
// cell_in, ...). Kernels are of float32 or bfloat16, cells of these or integers of eight bits.
void mix_cells_into(const at::Tensor& attention, const at::Tensor& cells, at::IntArrayRef grid,
                    at::Tensor kernels, std::optional<at::Tensor> panels) {
  const Mixing m(attention, cells, grid, kernels.scalar_type() == at::kBFloat16,
                 panels.has_value());
  m.check_kernels(kernels, grid);
  if (m.by_amx) {
    const amx::Left weights(m.attention.const_data_ptr<float>(), m.rows, m.num_cells);
    const int64_t of_cell = amx::values_of(m.num_cells, 1) / 2;
    const int64_t columns = block_columns(m.size, m.rows + of_cell, AMX_COLUMNS);
    const int64_t values = Block<float>::floats(m.rows, columns);
    for_blocks(m.size, columns, values + of_cell * columns, [&](Span span, float* memory, int64_t) {
      const Block<float> mixed(memory, columns);
      BFloat16* const pairs = reinterpret_cast<BFloat16*>(memory + values);
      const int64_t whole = num_parts(span.count, amx::COLUMNS) * amx::COLUMNS;
      with_cells(m.cells, [&](const auto* warehouse) {
        amx::pair(m.num_cells, whole, span.count, warehouse + span.begin, m.size, pairs);
      });
      weights.multiply(pairs, whole, mixed.values, mixed.stride);
      m.into_kernels(kernels, mixed, span);
    });
    return;
  }
  if (panels) {
    const Panels from(*panels, cells);
    const int64_t columns = from.columns, values = Block<float>::floats(m.rows, columns);
    for_blocks(m.size, columns, values, [&](Span span, float* memory, int64_t) {
      const Block<float> mixed(memory, columns);
      m.weights.for_parts([&](int64_t first, int64_t count) {
        m.mix_part(mixed, span, first, count, from.at(span.begin, first), from.stride, true);
      });
      m.into_kernels(kernels, mixed, span);
    });
    return;
  }
  const int64_t rows = m.streamed ? m.rows : m.rows + m.num_cells;
  const int64_t columns =
      block_columns(m.size, rows, m.streamed ? STREAMED_COLUMNS : COPIED_COLUMNS);
  const int64_t values = Block<float>::floats(rows, columns);
  for_blocks(m.size, columns, values, [&](Span span, float* memory, int64_t) {
    const Block<float> mixed(memory, columns);
    if (m.streamed) {
      m.weights.for_parts([&](int64_t first, int64_t count) {
        m.mix_part(mixed, span, first, count);
      });
    } else {
      const Block<float> copy(memory + m.rows * mixed.stride, columns);
      m.copy_cells(copy, span);
      m.mix_copied(mixed, copy, span);
    }
    m.into_kernels(kernels, mixed, span);
  });
}

// The same, but returns kernels in new memory, in the precision of the cells.
at::Tensor mix_cells(const at::Tensor& attention, const at::Tensor& cells, at::IntArrayRef grid) {
  TORCH_CHECK(attention.dim() == 3, "attention of ", attention.sizes());
  const at::Tensor kernels = at::empty(kernel_shape(attention.size(0), cells, grid), cells.options());
  mix_cells_into(attention, cells, grid, kernels);
  return kernels;
}

// sum (n, cell_out, cell_in, ...) (+)= weights (mixtures, n) transposed * rows (mixtures, cell_out,
// cell_in, ...).
void add_to_cells(const at::Tensor& weights, const at::Tensor& rows, at::Tensor sum, bool begin) {
  TORCH_CHECK(weights.dim() == 2 && rows.dim() > 0 && sum.dim() > 0 && sum.numel() > 0 &&
                  is_dense(sum, sum.sizes()) && rows.is_contiguous() && is_stored(rows) &&
                  weights.scalar_type() == at::kFloat && rows.size(0) == weights.size(0) &&
                  sum.size(0) == weights.size(1) && rows.sizes().slice(1) == sum.sizes().slice(1),
              "weights of ", weights.sizes(), ", rows of ", rows.sizes(), " and a sum of ",
              sum.sizes(), ", the last two dense, all of float32 but the rows, which may be of bfloat16");
  const int64_t terms = weights.size(0), num_cells = weights.size(1);
  if (terms == 0) {
    if (begin) sum.zero_();
    return;
  }
  const at::Tensor given = weights.contiguous();
  const int64_t size = sum.numel() / num_cells, width = blocks().width;
  const bool paired = is_paired(rows, size);
  TORCH_CHECK(paired || rows.scalar_type() == at::kFloat, "rows of ", rows.sizes(), " in ",
              rows.scalar_type(), ": this processor must multiply it, and rows have a multiple of ",
              sbgemm::COLUMNS, " numbers");
  const Weights transposed(given.const_data_ptr<float>(), num_cells, 1, terms, num_cells,
                           COPIED_TERMS, paired);
  with_values(rows, [&]<typename Value>(const Value* from) {
    const int64_t columns =
        block_columns(size, terms * sizeof(Value) / sizeof(float), STREAMED_COLUMNS / 2);
    const int64_t floats = Block<Value>::floats(terms, columns);
    for_blocks(size, columns, floats, [&](Span span, float* memory, int64_t) {
      const Block<Value> copy(memory, columns);
      copy_columns(copy, from, terms, size, span);
      float* to = sum.mutable_data_ptr<float>() + span.begin;
      const int64_t whole = span.count / width * width, rest = span.count - whole;
      // If the last columns do not fill a tile, their sums go to separate memory first.
      std::vector<float> last(rest ? num_cells * width : 0);
      transposed.for_parts([&](int64_t first, int64_t count) {
        const Value* values = copy.values + first * copy.stride;
        transposed.multiply(first, count, to, size, values, copy.stride, whole,
                            begin && first == 0);
        if (rest)
          transposed.multiply(first, count, last.data(), width, values + whole, copy.stride, width,
                              first == 0);
      });
      for (int64_t cell = 0; rest && cell < num_cells; cell++)
        for (int64_t c = 0; c < rest; c++) {
          float& total = to[cell * size + whole + c];
          total = (begin ? 0 : total) + last[cell * width + c];
        }
    });
  });
}

// The backward pass, in one pass over the warehouse. grad_kernels has the gradient (out, in, ...)
// of every image's kernel. If given, kernels (batch, out, in, ...) is filled with the mixed
// kernels. If given, rows (batch, mixtures, cell_out, cell_in, ...) is filled with the gradients,
// cut into cells, for add_to_cells. Returns the gradient of the attention. Gradients and kernels are
// of float32 or bfloat16; cells and rows, which sums are made of, of float32. With panels of the cells
// all is multiplied in bfloat16, and kernels and rows are of it.
at::Tensor mix_backward(at::TensorList grad_kernels, const at::Tensor& attention,
                        const at::Tensor& cells, at::IntArrayRef grid,
                        std::optional<at::Tensor> kernels, std::optional<at::Tensor> rows,
                        std::optional<at::Tensor> panels) {
  // Cells are read row by row, unless panels take their place.
  const Mixing m(attention, panels ? cells : cells.contiguous(), grid, false, panels.has_value());
  const at::ScalarType precision = panels ? at::kBFloat16 : at::kFloat;
  if (kernels) m.check_kernels(*kernels, grid);
  std::vector<int64_t> rows_shape = cells.sizes().slice(1).vec();
  rows_shape.insert(rows_shape.begin(), {m.batch, m.p.rows()});
  TORCH_CHECK(m.cells.scalar_type() == at::kFloat, "cells that learn must be of float32, not ",
              m.cells.scalar_type());
  TORCH_CHECK(!rows || is_dense(*rows, rows_shape, precision), "rows must be dense ", precision,
              " of ", rows_shape);
  TORCH_CHECK(static_cast<int64_t>(grad_kernels.size()) == m.batch, grad_kernels.size(),
              " gradients for ", m.batch, " images");
  const std::vector<int64_t> whole = kernel_shape(m.batch, cells, grid);
  const at::IntArrayRef kernel = at::IntArrayRef(whole).slice(1);
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& gradient : grad_kernels) {
    TORCH_CHECK(gradient.sizes() == kernel && is_stored(gradient),
                "a gradient of ", gradient.sizes(),
                " does not fit grid ", grid, " and cells of ", cells.sizes());
    gradients.push_back(gradient.contiguous());
  }
  const bool to = kernels.has_value();
  at::Tensor result;
  std::optional<Panels> of_cells;
  if (panels) of_cells.emplace(*panels, cells);
  // Value is what gradients are multiplied in.
  const auto run = [&]<typename Value>() {
    constexpr bool IN_PANELS = std::is_same_v<Value, BFloat16>;
    Value* const row = rows ? rows->mutable_data_ptr<Value>() : nullptr;
    // If cells are read directly, there are blocks for the gradients and for the mixtures. Otherwise the
    // mixtures overwrite the gradients, a few columns at a time.
    const int64_t num_rows = m.streamed ? 2 * m.rows : m.rows;
    const int64_t columns = of_cells ? of_cells->columns
                                     : block_columns(m.size, num_rows, STREAMED_COLUMNS / 4);
    const int64_t floats = Block<Value>::floats(m.rows, columns);
    const int64_t others = m.streamed ? Block<float>::floats(m.rows, columns)
                                      : Block<float>::floats(m.num_cells, COLUMNS_STEP);
    // Every share needs its own sum, because all columns add to the whole gradient of the attention.
    const at::Tensor parts =
        at::zeros({num_shares(m.size, columns, m.rows * m.num_cells), m.rows, m.num_cells},
                  m.attention.options());
    float* const part = parts.mutable_data_ptr<float>();
    for_blocks(m.size, columns, floats + others, [&](Span span, float* memory, int64_t share) {
      const Block<Value> gradient(memory, columns);
      for (int64_t image = 0; image < m.batch; image++)
        with_values(gradients[image], [&](const auto* from) {
          move_columns<false>(from, gradient.values + image * m.p.rows() * gradient.stride,
                              gradient.stride, m.p, span.begin, span.begin + span.count);
        });
      clear_rest(gradient, m.rows, span.count);
      for (int64_t r = 0; row && r < m.rows; r++)
        std::memcpy(row + r * m.size + span.begin, gradient.values + r * gradient.stride,
                    span.count * sizeof(Value));

      float* const grad_attention = part + share * m.rows * m.num_cells;
      const Block<float> other(memory + floats, m.streamed ? columns : COLUMNS_STEP);
      if constexpr (IN_PANELS) {
        m.weights.for_parts([&](int64_t first, int64_t count) {
          const BFloat16* const from = of_cells->at(span.begin, first);
          sbgemm::gemm_nt(m.rows, count, span.count, gradient.values, gradient.stride, from,
                          of_cells->stride, grad_attention + first, m.num_cells);
          if (to) m.mix_part(other, span, first, count, from, of_cells->stride, false);
        });
        if (to) m.into_kernels(*kernels, other, span);
      } else {
        // Adds the inner products of some columns of some cells.
        const auto add_dots = [&](int64_t first, int64_t count, const float* from,
                                  int64_t from_stride, int64_t column, int64_t width) {
          blocks().gemm_nt(m.rows, count, padded(width), gradient.values + column, gradient.stride,
                           from, from_stride, grad_attention + first, m.num_cells);
        };
        const float* from = m.cells.const_data_ptr<float>() + span.begin;
        if (m.streamed) {
          m.weights.for_parts([&](int64_t first, int64_t count) {
            if (to) m.mix_part(other, span, first, count);
            add_dots(first, count, from + first * m.size, m.size, 0, span.count);
          });
          if (to) m.into_kernels(*kernels, other, span);
          return;
        }
        // Inner products of long rows are the fastest, so all columns of the span go at once.
        if (m.aligned) add_dots(0, m.num_cells, from, m.size, 0, span.count);
        if (m.aligned && !to) return;
        for (int64_t c = 0; c < span.count; c += COLUMNS_STEP) {
          const Span some{span.begin + c, std::min(COLUMNS_STEP, span.count - c)};
          m.copy_cells(other, some);
          if (!m.aligned) add_dots(0, m.num_cells, other.values, other.stride, c, some.count);
          if (to) m.mix_copied(gradient.from(c), other, some);
        }
        if (to) m.into_kernels(*kernels, gradient, span);
      }
    }, m.rows * m.num_cells);
    result = parts.sum(0).view(attention.sizes());
  };
  if (panels)
    run.template operator()<BFloat16>();
  else
    run.template operator()<float>();
  return result;
}

}  // namespace mmkw
