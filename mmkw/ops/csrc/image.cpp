// One image, where nothing learns: what mmkw/ops/dynamic.py does for batches, by one call. In small
// layers the calls take longer than the computation.

#include "operators.h"

#include <ATen/ATen.h>

#include <optional>

namespace mmkw {

// Attends to x as it is seen (before it is padded), mixes its kernel, and applies it: a convolution
// of x (1, channels, *size), or without a stride a linear map of x (1, ..., channels).
at::Tensor apply_to_image(const at::Tensor& x, const at::Tensor& seen, const at::Tensor& fc1_weight,
                          const std::optional<at::Tensor>& fc1_bias,
                          const std::optional<at::Tensor>& mean,
                          const std::optional<at::Tensor>& variance, const at::Tensor& norm_weight,
                          const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
                          const at::Tensor& fc2_bias, int64_t mixtures, double norm_eps, double eps,
                          const at::Tensor& cells, at::IntArrayRef grid,
                          const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK(x.size(0) == 1 && seen.size(0) == 1, "one image, got ", x.sizes(), " and ",
              seen.sizes());
  const at::Tensor attention =
      attend(average(seen, stride.empty()), fc1_weight, fc1_bias, mean, variance, norm_weight,
             norm_bias, fc2_weight, fc2_bias, mixtures, norm_eps, eps);
  // In the precision of the image, which autocast has chosen.
  const at::Tensor kernels = memory_of_thread(kernel_shape(1, cells, grid), x);
  mix_cells_into(attention, cells, grid, kernels);
  return apply_kernels(x, kernels, bias, stride, padding, dilation, groups);
}

}  // namespace mmkw
