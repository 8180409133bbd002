// Products of the pixels of images and kernels of size one, by what this processor is the fastest at.
// PyTorch has one library for products and one for convolutions, and either is the slower one on some
// processors. Those of many pixels may also be computed as mixing is: pixels are columns of a
// warehouse then, and kernels the attentions.

#include "blocks.h"
#include "operators.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>
#include <string>
#include <utility>

namespace mmkw {
namespace {

// What another way must save of the library's time.
constexpr double SAVED = 0.05;
// Packing rows takes one thread as long as multiplying them with so many columns. What tiles save of all
// columns must be more. With fewer rows or terms copying the columns is too much beside the product.
constexpr int64_t PACKING_COLUMNS = 100, LEAST_ROWS = 32, LEAST_TERMS = 48;
// So many columns are enough, though there are more rows.
constexpr int64_t MANY_COLUMNS = 512;
// The multiplications below which a convolution's preparations take longer than what it saves. The
// gradient of a kernel is slow of few pixels, also if there are more weights for each, and where channels
// lie last so is all else; and PyTorch gives no image of so few values to its library for convolutions.
constexpr int64_t FEW_PRODUCTS = 12 << 20, FEW_PIXELS = 192, MANY_WEIGHTS = 1 << 13;
// How often each is timed.
constexpr int TIMED_RUNS = 5;

// Whether each thread multiplies images of its own. Threads that wait for no other are faster, unless
// too many have no image in the last round.
bool is_shared_out(int64_t batch) {
  const int64_t threads = at::get_num_threads();
  return (num_parts(batch, threads) * threads - batch) * 10 <= batch;
}

// Whether tiles compute C transposed, of m rows and n columns: the more columns, the faster.
bool is_turned(int64_t m, int64_t n) { return m > n && n < MANY_COLUMNS; }

void bmm_by_tiles(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
  const int64_t batch = a.size(0), m = a.size(1), n = b.size(2);
  // One product: a mixture is a row of C. If it is turned a mixture is a column, and the values of all
  // mixtures lie together, as the taps of a kernel do.
  const auto mix = [&](int64_t i) {
    const at::Tensor left = a.narrow(0, i, 1), right = b.narrow(0, i, 1), to = c.narrow(0, i, 1);
    if (is_turned(m, n))
      mix_cells_into(right.transpose(1, 2), left[0].t().unsqueeze(1).unsqueeze(3), {n, 1, 1},
                     to.view({1, 1, m, n}));
    else
      mix_cells_into(left, right[0].unsqueeze(1).unsqueeze(3), {1, m, 1}, to.unsqueeze(3));
  };
  const auto multiply = [&](int64_t begin, int64_t end) {
    // Other threads do not know that nothing is recorded.
    const at::AutoDispatchBelowADInplaceOrView constants;
    for (int64_t i = begin; i < end; i++) mix(i);
  };
  if (is_shared_out(batch))
    at::parallel_for(0, batch, 1, multiply);
  else
    multiply(0, batch);
}

at::Tensor empty_product(const at::Tensor& a, const at::Tensor& b) {
  return at::empty({a.size(0), a.size(1), b.size(2)}, b.options());
}

template <typename Product>
double seconds(const Product& product) {
  const auto begin = std::chrono::steady_clock::now();
  product();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The share of the time of PyTorch's library for products that another way saves.
template <typename Way, typename Library>
double share_saved(const Way& way, const Library& library) {
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  double by_way = std::numeric_limits<double>::max(), by_library = by_way;
  // The first run of each brings memory and threads.
  for (int run = 0; run <= TIMED_RUNS; run++) {
    const double other = seconds(way), theirs = seconds(library);
    if (run == 0) continue;
    by_way = std::min(by_way, other);
    by_library = std::min(by_library, theirs);
  }
  return 1 - by_way / by_library;
}

// What is measured once for a process, of sizes as in a ResNet: no way is the fastest on all processors.
double saved_by_tiles() {
  static const double saved = [] {
    const at::Tensor a = at::ones({1, 128, 512}, at::kFloat), b = at::ones({1, 512, 4096}, at::kFloat);
    return share_saved([&] { bmm_by_tiles(a, b, empty_product(a, b)); }, [&] { at::bmm(a, b); });
  }();
  return saved;
}

template <bool CHANNELS_LAST>
double saved_by_convolution() {
  static const double saved = [] {
    constexpr int64_t CHANNELS = 512, SIDE = 24, PIXELS = SIDE * SIDE;
    const at::Tensor pixels = at::ones({CHANNELS, PIXELS}, at::kFloat);
    const at::Tensor kernel = at::ones({CHANNELS, CHANNELS}, at::kFloat);
    const at::Tensor x = CHANNELS_LAST ? pixels.view({1, SIDE, SIDE, CHANNELS}).movedim(-1, 1)
                                       : pixels.view({1, CHANNELS, SIDE, SIDE});
    return share_saved(
        [&] { at::conv2d(x, kernel.view({CHANNELS, CHANNELS, 1, 1})); },
        [&] {
          CHANNELS_LAST ? at::mm(pixels.view({PIXELS, CHANNELS}), kernel.t()) : at::mm(kernel, pixels);
        });
  }();
  return saved;
}

}  // namespace

// Whether tiles multiply A (batch, m, k) and B (batch, k, n) of float32 faster. Never if all runs must
// compute the same bits: this is measured.
bool are_tiles_faster(int64_t batch, int64_t m, int64_t k, int64_t n) {
  const int64_t packed = PACKING_COLUMNS * (is_shared_out(batch) ? 1 : at::get_num_threads());
  const auto [rows, columns] = is_turned(m, n) ? std::pair(n, m) : std::pair(m, n);
  // Of what is too small in any case nothing is measured.
  return batch > 0 && columns > packed && rows >= LEAST_ROWS && k >= LEAST_TERMS &&
         !at::globalContext().deterministicAlgorithms() && saved_by_tiles() > SAVED &&
         columns * saved_by_tiles() > packed;
}

bool are_tiles_faster(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         are_tiles_faster(a.size(0), a.size(1), a.size(2), b.size(2));
}

// Whether PyTorch convolves images (batch, in, pixels) of float32 faster by kernels (batch, out, in), one
// image after the other, than they are multiplied: to get the result (`forward`), the gradient of the
// `kernels`, or of `x`. Channels lie last or first. The share that convolutions have `saved` is measured if
// it is not given, of the result: that of gradients is taken to be the same.
bool is_convolution_faster(const std::string& what, int64_t batch, int64_t out, int64_t in,
                           int64_t pixels, bool channels_last, std::optional<double> saved) {
  TORCH_CHECK(what == "forward" || what == "kernels" || what == "x", "unknown part ", what);
  // One thread convolves by products, too.
  const bool is_alone = at::in_parallel_region() || at::get_num_threads() == 1;
  if (batch == 0 || out * in * pixels < FEW_PRODUCTS || in * pixels <= SMALL_IMAGE || is_alone ||
      !at::globalContext().userEnabledMkldnn() || at::globalContext().deterministicAlgorithms())
    return false;
  if (what == "kernels") {
    if (pixels < FEW_PIXELS || out * in > MANY_WEIGHTS * pixels ||
        are_tiles_faster(batch, out, pixels, in))
      return false;
  } else {
    const int64_t from = what == "x" ? out : in, to = what == "x" ? in : out;
    if (channels_last ? pixels < FEW_PIXELS && are_tiles_faster(batch, pixels, from, to)
                      : are_tiles_faster(batch, to, from, pixels))
      return false;
  }
  if (!saved) saved = channels_last ? saved_by_convolution<true>() : saved_by_convolution<false>();
  return *saved > SAVED;
}

// C (batch, m, n) = A (batch, m, k) * B (batch, k, n), by tiles or by PyTorch as by_tiles says; else by
// what is faster.
at::Tensor bmm(const at::Tensor& a, const at::Tensor& b, std::optional<bool> by_tiles) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
              "no product of ", a.sizes(), " and ", b.sizes());
  if (!by_tiles) by_tiles = are_tiles_faster(a, b);
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  if (!*by_tiles) return a.size(0) == 1 ? at::mm(a[0], b[0]).unsqueeze(0) : at::bmm(a, b);
  TORCH_CHECK(a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && a.numel() > 0 &&
                  b.numel() > 0,
              "tiles multiply float32, and not nothing: got ", a.scalar_type(), " and ",
              b.scalar_type(), " of ", a.sizes(), " and ", b.sizes());
  const at::Tensor c = empty_product(a, b);
  bmm_by_tiles(a, b, c);
  return c;
}

// The same into C, which is contiguous, of operands as they are.
void bmm_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c,
              std::optional<bool> by_tiles) {
  if (!by_tiles) by_tiles = are_tiles_faster(a, b);
  if (*by_tiles) return bmm_by_tiles(a, b, c);
  at::Tensor result = c;
  at::bmm_out(result, a, b);
}

}  // namespace mmkw
