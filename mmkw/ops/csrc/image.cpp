// One image, where nothing learns: what mmkw/ops/dynamic.py does for batches, by one call. In small
// layers the calls take longer than the computation.

#include "operators.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace mmkw {
namespace {

// Memory for a kernel, which the thread uses again. Fresh memory of megabytes takes as long as
// mixing.
at::Tensor memory_of_thread(at::IntArrayRef shape, const at::Tensor& like) {
  // It outlives an inference mode.
  const c10::InferenceMode normal(false);
  thread_local at::Tensor memory;
  const int64_t size = c10::multiply_integers(shape);
  if (!memory.defined() || memory.scalar_type() != like.scalar_type() || memory.numel() < size)
    memory = at::empty({size}, at::TensorOptions(like.scalar_type()));
  return memory.narrow(0, 0, size).view(shape);
}

bool is_channels_last(const at::Tensor& x) {
  return x.dim() == 4 && !x.is_contiguous() && x.movedim(1, -1).is_contiguous();
}

// Whether PyTorch convolves by a kernel of size one faster than it is multiplied.
bool is_convolved(const at::Tensor& x, const at::Tensor& kernel, at::IntArrayRef stride) {
  const bool channels_last = !x.is_contiguous();
  // Of volumes PyTorch's choice of a library is another one, and gradients are slow.
  if (x.scalar_type() != at::kFloat || x.dim() > 4 || (channels_last && !is_channels_last(x)))
    return false;
  int64_t pixels = 1;
  for (size_t dim = 0; dim < stride.size(); dim++)
    pixels *= (x.size(2 + dim) - 1) / stride[dim] + 1;
  return is_convolution_faster("forward", 1, kernel.size(0), x.size(1), pixels, channels_last);
}

// A convolution by kernels of size one is a product of matrices, whether channels lie last or not.
at::Tensor convolve_pixels(at::Tensor x, const at::Tensor& kernel,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride) {
  const bool channels_last = is_channels_last(x);
  for (size_t dim = 0; dim < stride.size(); dim++)
    if (stride[dim] > 1) x = x.slice(2 + dim, 0, x.size(2 + dim), stride[dim]);
  const at::Tensor weights = kernel.flatten(1);
  std::vector<int64_t> shape = x.sizes().vec();
  if (channels_last) {
    shape.erase(shape.begin() + 1);
    shape.push_back(kernel.size(0));
    const at::Tensor y = at::mm(x.movedim(1, -1).reshape({-1, x.size(1)}), weights.t());
    if (bias) y.add_(*bias);
    return y.view(shape).movedim(-1, 1);
  }
  shape[1] = kernel.size(0);
  const at::Tensor pixels = x.reshape({x.size(1), -1});
  const bool by_tiles = x.scalar_type() == at::kFloat &&
                        are_tiles_faster(1, weights.size(0), weights.size(1), pixels.size(1));
  const at::Tensor y = by_tiles ? mmkw::bmm(weights.unsqueeze(0), pixels.unsqueeze(0), true)
                                : at::mm(weights, pixels);
  if (bias) y.add_(bias->unsqueeze(1));
  return y.view(shape);
}

// The same of tokens (1, ..., features), which may be convolved as pixels whose channels lie last.
at::Tensor map_tokens(const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& bias) {
  const at::Tensor weights = kernel.flatten(1);
  const int64_t out = weights.size(0), in = weights.size(1), tokens = x.numel() / in;
  if (x.scalar_type() != at::kFloat || !x.is_contiguous() ||
      !is_convolution_faster("forward", 1, out, in, tokens, true))
    return at::linear(x, weights, bias);
  const at::Tensor y = at::conv2d(x.view({1, tokens, 1, in}).movedim(-1, 1),
                                  weights.view({out, in, 1, 1}), bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  return y.movedim(1, -1).reshape(shape);
}

}  // namespace

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
  const bool is_tokens = stride.empty();
  const at::Tensor attention =
      attend(average(seen, is_tokens), fc1_weight, fc1_bias, mean, variance, norm_weight, norm_bias,
             fc2_weight, fc2_bias, mixtures, norm_eps, eps);
  // In the precision of the image, which autocast has chosen.
  const at::Tensor kernels = memory_of_thread(kernel_shape(1, cells, grid), x);
  mix_cells_into(attention, cells, grid, kernels);
  const at::Tensor kernel = kernels[0];
  if (is_tokens) return map_tokens(x, kernel, bias);
  const bool is_pointwise = c10::multiply_integers(kernel.sizes().slice(2)) == 1 && groups == 1 &&
                            std::all_of(padding.begin(), padding.end(), [](int64_t p) { return !p; });
  if (is_pointwise && !is_convolved(x, kernel, stride)) return convolve_pixels(x, kernel, bias, stride);
  const std::vector<int64_t> no_output_padding(stride.size(), 0);
  return at::convolution(x, kernel, bias, stride, padding, dilation, false, no_output_padding,
                         groups);
}

}  // namespace mmkw
