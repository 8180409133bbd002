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

namespace mmkw {
namespace {

// Packing A takes one thread as long as multiplying so many columns. What tiles save of all columns must
// be more. With fewer rows or terms copying B is too much beside the product.
constexpr int64_t PACKING_COLUMNS = 150, LEAST_ROWS = 32, LEAST_TERMS = 64;
// What a convolution must save, and the multiplications below which its preparations take longer than
// that. The gradient of a kernel is slow of few pixels, also if there are more weights for each; and
// PyTorch gives no image of so few values to its library for convolutions.
constexpr double SAVED = 0.05;
constexpr int64_t FEW_PRODUCTS = 12 << 20, FEW_PIXELS = 192, MANY_WEIGHTS = 1 << 13,
                  SMALL_IMAGE = 20480;
// How often each is timed.
constexpr int TIMED_RUNS = 5;

// Operands are what they are, also under autocast.
const c10::DispatchKeySet AUTOCAST(c10::DispatchKey::AutocastCPU);

// Whether each thread multiplies images of its own. Threads that wait for no other are faster, unless
// too many have no image in the last round.
bool is_shared_out(int64_t batch) {
  const int64_t threads = at::get_num_threads();
  return (num_parts(batch, threads) * threads - batch) * 10 <= batch;
}

at::Tensor bmm_by_tiles(const at::Tensor& a, const at::Tensor& b) {
  const int64_t batch = a.size(0), m = a.size(1);
  const at::Tensor c = at::empty({batch, m, b.size(2)}, b.options());
  const auto multiply = [&](int64_t begin, int64_t end) {
    // Other threads do not know that nothing is recorded.
    const at::AutoDispatchBelowADInplaceOrView constants;
    for (int64_t i = begin; i < end; i++)
      mix_cells_into(a.narrow(0, i, 1), b[i].unsqueeze(1).unsqueeze(3), {1, m, 1},
                     c.narrow(0, i, 1).unsqueeze(3));
  };
  if (is_shared_out(batch))
    at::parallel_for(0, batch, 1, multiply);
  else
    multiply(0, batch);
  return c;
}

template <typename Product>
double seconds(const Product& product) {
  const auto begin = std::chrono::steady_clock::now();
  product();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The share of the time of a product A (m, k) * B (k, n) that another way saves.
template <typename Way>
double saved_by(int64_t m, int64_t k, int64_t n, const Way& way) {
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  const at::Tensor a = at::ones({1, m, k}, at::kFloat), b = at::ones({1, k, n}, at::kFloat);
  double by_way = std::numeric_limits<double>::max(), by_library = by_way;
  // The first run of each brings memory and threads.
  for (int run = 0; run <= TIMED_RUNS; run++) {
    const double other = seconds([&] { way(a, b); });
    const double library = seconds([&] { at::bmm(a, b); });
    if (run == 0) continue;
    by_way = std::min(by_way, other);
    by_library = std::min(by_library, library);
  }
  return 1 - by_way / by_library;
}

// Both are measured once, of sizes as in a ResNet: no way is the fastest on all processors.
double saved_by_tiles() {
  static const double saved = saved_by(128, 512, 4096, bmm_by_tiles);
  return saved;
}

template <bool CHANNELS_LAST>
double saved_by_convolution() {
  static const double saved = saved_by(512, 512, 576, [](const at::Tensor& a, const at::Tensor& b) {
    // As many rows as columns: of channels that lie last the pixels are rows.
    const at::Tensor image = b.view({1, 512, 24, 24});
    at::conv2d(CHANNELS_LAST ? b.view({1, 24, 24, 512}).movedim(-1, 1) : image,
               a[0].unsqueeze(2).unsqueeze(3));
  });
  return saved;
}

}  // namespace

// Whether tiles multiply A (batch, m, k) and B (batch, k, n) of float32 faster. Never if all runs must
// compute the same bits: this is measured.
bool are_tiles_faster(int64_t batch, int64_t m, int64_t k, int64_t n) {
  const int64_t packed = PACKING_COLUMNS * (is_shared_out(batch) ? 1 : at::get_num_threads());
  // Of what is too small in any case nothing is measured.
  return n > packed && m >= LEAST_ROWS && k >= LEAST_TERMS &&
         !at::globalContext().deterministicAlgorithms() && n * saved_by_tiles() > packed;
}

// Whether PyTorch convolves images (batch, in, pixels) of float32 faster by kernels (batch, out, in), one
// image after the other, than they are multiplied: to get the result, the gradient of the `kernels`, or of
// `x`. Channels lie last or first.
bool is_convolution_faster(const std::string& what, int64_t batch, int64_t out, int64_t in,
                           int64_t pixels, bool channels_last) {
  if (out * in * pixels < FEW_PRODUCTS || in * pixels <= SMALL_IMAGE ||
      !at::globalContext().userEnabledMkldnn() || at::globalContext().deterministicAlgorithms())
    return false;
  if (what == "kernels") {
    if (pixels < FEW_PIXELS || out * in > MANY_WEIGHTS * pixels) return false;
  } else if (!channels_last) {
    const bool back = what == "x";
    if (are_tiles_faster(batch, back ? in : out, back ? out : in, pixels)) return false;
  }
  return (channels_last ? saved_by_convolution<true>() : saved_by_convolution<false>()) > SAVED;
}

// C (batch, m, n) = A (batch, m, k) * B (batch, k, n), by tiles or by PyTorch as by_tiles says; else by
// what is faster.
at::Tensor bmm(const at::Tensor& a, const at::Tensor& b, std::optional<bool> by_tiles) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
              "no product of ", a.sizes(), " and ", b.sizes());
  if (!by_tiles)
    by_tiles = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
               are_tiles_faster(a.size(0), a.size(1), a.size(2), b.size(2));
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  if (!*by_tiles) return at::bmm(a, b);
  TORCH_CHECK(a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && a.numel() > 0 &&
                  b.numel() > 0,
              "tiles multiply float32, and not nothing: got ", a.scalar_type(), " and ",
              b.scalar_type(), " of ", a.sizes(), " and ", b.sizes());
  return bmm_by_tiles(a, b);
}

}  // namespace mmkw
