// Products of the pixels of images and kernels of size one. Those of many pixels are computed as
// mixing is, if this processor is faster at it than PyTorch's library: pixels are columns of a
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

namespace mmkw {
namespace {

// With fewer columns, or fewer of all images for a thread, packing A is too much beside the product;
// with fewer rows or terms copying B is.
constexpr int64_t LEAST_COLUMNS = 1536, LEAST_OF_THREAD = 768, LEAST_ROWS = 32, LEAST_TERMS = 64;
// The sizes that are timed, as in the second stage of a ResNet, how often, and what tiles must save.
constexpr int64_t TIMED_M = 128, TIMED_K = 512, TIMED_N = 4096;
constexpr int TIMED_RUNS = 5;
constexpr double SAVED = 0.05;

// Operands are what they are, also under autocast.
const c10::DispatchKeySet AUTOCAST(c10::DispatchKey::AutocastCPU);

at::Tensor bmm_by_tiles(const at::Tensor& a, const at::Tensor& b) {
  const int64_t m = a.size(1);
  const at::Tensor c = at::empty({a.size(0), m, b.size(2)}, b.options());
  const auto multiply = [&](int64_t begin, int64_t end) {
    // Other threads do not know that nothing is recorded.
    const at::AutoDispatchBelowADInplaceOrView constants;
    for (int64_t i = begin; i < end; i++)
      mix_cells_into(a.narrow(0, i, 1), b[i].unsqueeze(1).unsqueeze(3), {1, m, 1},
                     c.narrow(0, i, 1).unsqueeze(3));
  };
  // Threads that wait for no other are faster, unless too many have no image in the last round.
  const int64_t batch = a.size(0), threads = at::get_num_threads();
  const int64_t idle = num_parts(batch, threads) * threads - batch;
  if (idle * 10 <= batch)
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

// Measured once, since libraries differ by processor: neither way is the faster one on all.
bool tiles_are_faster() {
  static const bool faster = [] {
    const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
    const at::Tensor a = at::ones({1, TIMED_M, TIMED_K}, at::kFloat);
    const at::Tensor b = at::ones({1, TIMED_K, TIMED_N}, at::kFloat);
    double by_tiles = std::numeric_limits<double>::max(), by_library = by_tiles;
    // The first run of each brings memory and threads.
    for (int run = 0; run <= TIMED_RUNS; run++) {
      const double tiles = seconds([&] { bmm_by_tiles(a, b); });
      const double library = seconds([&] { at::bmm(a, b); });
      if (run == 0) continue;
      by_tiles = std::min(by_tiles, tiles);
      by_library = std::min(by_library, library);
    }
    return by_tiles < (1 - SAVED) * by_library;
  }();
  return faster;
}

}  // namespace

// Whether tiles multiply A (..., m, k) and B (..., k, n), of so many images, faster. Never if all runs
// must compute the same bits: this is measured.
bool is_faster_by_tiles(const at::Tensor& a, const at::Tensor& b, int64_t batch) {
  const int64_t columns = b.size(-1);
  return a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && columns >= LEAST_COLUMNS &&
         batch * columns >= LEAST_OF_THREAD * at::get_num_threads() && a.size(-2) >= LEAST_ROWS &&
         a.size(-1) >= LEAST_TERMS && !at::globalContext().deterministicAlgorithms() &&
         tiles_are_faster();
}

// C (batch, m, n) = A (batch, m, k) * B (batch, k, n), by tiles or by PyTorch as by_tiles says; else by
// what is faster.
at::Tensor bmm(const at::Tensor& a, const at::Tensor& b, std::optional<bool> by_tiles) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
              "no product of ", a.sizes(), " and ", b.sizes());
  if (!by_tiles) by_tiles = is_faster_by_tiles(a, b, a.size(0));
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  if (!*by_tiles) return at::bmm(a, b);
  TORCH_CHECK(a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && a.numel() > 0 &&
                  b.numel() > 0,
              "tiles multiply float32, and not nothing: got ", a.scalar_type(), " and ",
              b.scalar_type(), " of ", a.sizes(), " and ", b.sizes());
  return bmm_by_tiles(a, b);
}

}  // namespace mmkw
