// Convolves every image of a batch by its own kernel, or maps its tokens, and the gradients of that: what
// mmkw/ops/ways.py does by PyTorch's operators, one by one. In small layers the calls take longer than
// the computation.

#include "operators.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mmkw {
namespace {

// To join small images pays where PyTorch gives no single one of them to its library, as it does with groups
// and larger kernels, if all kernels, or the gradients of all of them, have fewer values than the last.
constexpr int64_t SMALL_KERNEL = 3, FEW_WEIGHTS = 1 << 18;
// Of a channel of an image. Depthwise convolutions of fewer are joined wherever their channels lie.
constexpr int64_t FEW_OF_CHANNEL = 1024;
// Where channels lie last, oneDNN's gradient of more depthwise kernels at once takes up to twenty times
// as long.
constexpr int64_t MOST_CHANNELS = 512;

struct Geometry {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

constexpr std::array<int64_t, 2> ONES{1, 1}, ZEROS{0, 0};
// By which tokens are convolved as pixels.
const Geometry PIXELWISE{ONES, ZEROS, ONES, 1};

int64_t pixels_of(const at::Tensor& x) { return c10::multiply_integers(x.sizes().slice(2)); }

bool are_last(const at::Tensor& x) {
  return !x.is_contiguous() && x.movedim(1, -1).is_contiguous();
}

bool is_channels_last(const at::Tensor& x) {
  // Results of PyTorch's convolutions do not lie so in one dimension, nor of one volume.
  return x.dim() != 3 && !(x.dim() == 5 && x.size(0) == 1) && are_last(x);
}

// Tokens (batch, ..., features), as an image (batch, features, tokens, 1) whose channels lie last.
at::Tensor as_image(const at::Tensor& tokens) {
  const int64_t count = c10::multiply_integers(tokens.sizes().slice(1, tokens.dim() - 2));
  return tokens.reshape({tokens.size(0), count, 1, tokens.size(-1)}).movedim(-1, 1);
}

at::Tensor as_tokens(const at::Tensor& image, const at::Tensor& like) {
  std::vector<int64_t> shape = like.sizes().vec();
  shape.back() = image.size(1);
  return image.movedim(1, -1).reshape(shape);
}

at::Tensor convolve(const Geometry& of, const at::Tensor& x, const at::Tensor& kernel,
                    const std::optional<at::Tensor>& bias, int64_t groups) {
  const std::vector<int64_t> no_output_padding(of.stride.size(), 0);
  return at::convolution(x, kernel, bias, of.stride, of.padding, of.dilation, false, no_output_padding,
                         groups);
}

// The gradient of the image (which 0) or of the kernel (1).
template <int WHICH>
at::Tensor back(const Geometry& of, const at::Tensor& grad, const at::Tensor& x,
                const at::Tensor& kernel, int64_t groups) {
  const std::vector<int64_t> no_output_padding(of.stride.size(), 0);
  return std::get<WHICH>(at::convolution_backward(
      grad, x, kernel, at::OptionalIntArrayRef(), of.stride, of.padding, of.dilation, false,
      no_output_padding, groups, {WHICH == 0, WHICH == 1, false}));
}

at::Tensor image(const at::Tensor& batch, int64_t i) {
  return batch.size(0) == 1 ? batch : batch.narrow(0, i, 1);
}

// What is added to all pixels of an image: (batch, channels, 1, ...).
using Added = std::optional<at::Tensor>;

Added over_pixels(const Added& added, int64_t dims) {
  if (!added) return {};
  std::vector<int64_t> shape = added->sizes().vec();
  shape.resize(dims, 1);
  return added->reshape(shape);
}

// Joins the results of single images, each while it is in the caches. Channels that lie last do so in
// the result.
template <typename Make>
at::Tensor gathered(int64_t batch, const Added& added, const Make& make) {
  const at::Tensor first = make(0);
  if (batch == 1) return added ? first.add_(*added) : first;
  std::vector<int64_t> shape = first.sizes().vec();
  shape[0] = batch;
  const bool is_last = are_last(first);
  if (is_last) std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
  at::Tensor result = at::empty(shape, first.options());
  if (is_last) result = result.movedim(-1, 1);
  const auto put = [&](int64_t i, const at::Tensor& found) {
    at::Tensor place = image(result, i);
    if (added)
      at::add_out(place, found, image(*added, i));
    else
      place.copy_(found);
  };
  put(0, first);
  for (int64_t i = 1; i < batch; i++) put(i, make(i));
  return result;
}

// One convolution's images, of a batch: (1, batch * channels, *size).
at::Tensor joined(const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape[1] *= shape[0];
  shape[0] = 1;
  return x.reshape(shape);
}

// The pixels that a kernel of size one uses, by the stride.
at::Tensor sampled(at::Tensor x, at::IntArrayRef stride) {
  for (size_t dim = 0; dim < stride.size(); dim++)
    if (stride[dim] > 1) x = x.slice(2 + dim, 0, x.size(2 + dim), stride[dim]);
  return x;
}

// (batch * groups, channels / groups, pixels)
at::Tensor columns(const at::Tensor& x, int64_t groups) {
  return x.reshape({x.size(0) * groups, x.size(1) / groups, pixels_of(x)});
}

// (batch, pixels, channels)
at::Tensor pixels(const at::Tensor& x) {
  return x.movedim(1, -1).reshape({x.size(0), pixels_of(x), x.size(1)});
}

// (batch * groups, out_channels / groups, in_channels / groups)
at::Tensor matrices(const at::Tensor& kernels, int64_t groups) {
  return kernels.reshape({kernels.size(0) * groups, kernels.size(1) / groups, kernels.size(2)});
}

// Whether images are multiplied pixel by pixel: as they lie, and if they have one pixel, since products
// with one column are slow.
bool by_pixels(const at::Tensor& x, const at::Tensor& used, int64_t groups) {
  return groups == 1 && (is_channels_last(x) || pixels_of(used) == 1);
}

// Pixels (batch, pixels, channels) of images that are as large as `like`, whose channels lie last. One
// pixel's may lie either way, and lie as those of `like` for what comes after.
at::Tensor from_pixels(const at::Tensor& found, const at::Tensor& like) {
  std::vector<int64_t> shape = like.sizes().vec();
  shape[1] = found.size(2);
  if (pixels_of(like) == 1 && like.suggest_memory_format() == at::MemoryFormat::Contiguous)
    return found.view(shape);
  std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
  return found.view(shape).movedim(-1, 1);
}

// Columns (batch * groups, channels / groups, pixels) of such images.
at::Tensor from_columns(const at::Tensor& found, const at::Tensor& like) {
  std::vector<int64_t> shape = like.sizes().vec();
  shape[1] = found.numel() / std::max<int64_t>(shape[0] * pixels_of(like), 1);
  return found.view(shape);
}

at::Tensor multiply_pixels(const at::Tensor& given, const at::Tensor& b,
                           const std::optional<at::Tensor>& bias, std::optional<bool> by_tiles) {
  if (!by_tiles) by_tiles = are_tiles_faster(given, b);
  if (bias && given.size(0) == 1 && !*by_tiles)
    return at::addmm(*bias, given[0], b[0]).unsqueeze(0);
  const at::Tensor y = mmkw::bmm(given, b, by_tiles);
  if (bias) y.add_(*bias);
  return y;
}

// The ways. Kernels of size one without padding are multiplied (by PyTorch or by tiles), or convolved image
// by image; others are convolved image by image or at once.
enum class Way { IMAGES, GROUPS, PRODUCTS };

bool is_pointwise(const Geometry& of, at::IntArrayRef kernel) {
  return c10::multiply_integers(kernel.slice(2)) == 1 &&
         std::all_of(of.padding.begin(), of.padding.end(), [](int64_t p) { return p == 0; });
}

// Whether PyTorch convolves by kernels of size one faster than it multiplies them.
bool is_convolved(const char* what, const Geometry& of, const at::Tensor& x, at::IntArrayRef kernel) {
  const bool is_last = !x.is_contiguous();
  // Of volumes PyTorch's choice of a library is another one, and gradients are slow.
  if (of.groups > 1 || x.scalar_type() != at::kFloat || x.dim() > 4 || (is_last && !is_channels_last(x)))
    return false;
  int64_t count = 1;
  for (size_t dim = 0; dim < of.stride.size(); dim++)
    count *= (x.size(2 + dim) - 1) / of.stride[dim] + 1;
  return is_convolution_faster(what, x.size(0), kernel[0], kernel[1], count, is_last);
}

bool is_joined(const char* what, const Geometry& of, const at::Tensor& x, at::IntArrayRef kernel) {
  if (x.size(0) == 1) return false;
  const at::IntArrayRef size = kernel.slice(2);
  if (kernel[1] == 1 && of.groups == kernel[0])
    // Where channels lie last, images are copied to be joined.
    return !(x.dim() == 4 && is_channels_last(x) &&
             pixels_of(x) * c10::multiply_integers(size) > FEW_OF_CHANNEL);
  const int64_t kernels = what[0] == 'k' ? x.size(0) : 1;
  // Whether PyTorch convolves one of several images by a way that is slower than for all.
  return x.dim() == 4 && of.groups == 1 && x.scalar_type() == at::kFloat &&
         c10::multiply_integers(x.sizes().slice(1)) <= SMALL_IMAGE &&
         *std::min_element(size.begin(), size.end()) <= SMALL_KERNEL &&
         at::globalContext().userEnabledMkldnn() && x.is_contiguous() &&
         c10::multiply_integers(kernel) * kernels < FEW_WEIGHTS;
}

// Whether products are by tiles, if that is given.
std::optional<bool> tiles_given(const std::optional<std::string>& given) {
  return given ? std::optional<bool>(*given == "tiles") : std::nullopt;
}

Way way_of(const char* what, const Geometry& of, const at::Tensor& x, at::IntArrayRef kernel,
           const std::optional<std::string>& given) {
  const bool by_products = is_pointwise(of, kernel);
  if (given) {
    TORCH_CHECK(*given == "images" || *given == (by_products ? "products" : "groups") ||
                    (by_products && *given == "tiles"),
                "no way '", *given, "' for kernels of ", kernel.slice(2));
    return *given == "images" ? Way::IMAGES : by_products ? Way::PRODUCTS : Way::GROUPS;
  }
  if (by_products) return is_convolved(what, of, x, kernel) ? Way::IMAGES : Way::PRODUCTS;
  return is_joined(what, of, x, kernel) ? Way::GROUPS : Way::IMAGES;
}

at::Tensor forward(const Geometry& of, const at::Tensor& x, const at::Tensor& kernels,
                   const std::optional<at::Tensor>& bias, const std::optional<std::string>& given) {
  const int64_t batch = x.size(0), groups = of.groups;
  switch (way_of("forward", of, x, kernels.sizes().slice(1), given)) {
    case Way::IMAGES:
      return gathered(batch, {}, [&](int64_t i) {
        return convolve(of, image(x, i), kernels[i], bias, groups);
      });
    case Way::GROUPS: {
      std::optional<at::Tensor> biases;
      if (bias) biases = bias->repeat({batch});
      const at::Tensor y = convolve(of, joined(x), kernels.flatten(0, 1), biases, batch * groups);
      std::vector<int64_t> shape = y.sizes().vec();
      shape[0] = batch;
      shape[1] /= batch;
      return y.view(shape);
    }
    case Way::PRODUCTS: break;
  }
  const at::Tensor used = sampled(x, of.stride), weights = matrices(kernels, groups);
  if (by_pixels(x, used, groups))
    return from_pixels(multiply_pixels(pixels(used), weights.transpose(1, 2), bias, tiles_given(given)), used);
  const at::Tensor y = from_columns(mmkw::bmm(weights, columns(used, groups), tiles_given(given)), used);
  if (bias) {
    std::vector<int64_t> shape(x.dim() - 1, 1);
    shape[0] = bias->size(0);
    y.add_(bias->view(shape));
  }
  return y;
}

std::vector<at::Tensor> backward_kernels(const Geometry& of, const at::Tensor& grad,
                                         const at::Tensor& x, at::IntArrayRef kernel,
                                         const std::optional<std::string>& given) {
  const int64_t batch = x.size(0), groups = of.groups, channels = x.size(1);
  std::vector<int64_t> shape = kernel.vec();
  switch (way_of("kernels", of, x, kernel, given)) {
    case Way::IMAGES: {
      const bool is_slow = groups == channels && groups == kernel[0] && !x.is_contiguous();
      // Only its shape is used.
      const at::Tensor like = at::empty(kernel, x.options());
      const int64_t most = is_slow ? MOST_CHANNELS : channels;
      std::vector<at::Tensor> found;
      for (int64_t i = 0; i < batch; i++) {
        if (channels <= most) {
          found.push_back(back<1>(of, image(grad, i), image(x, i), like, groups).unsqueeze(0));
          continue;
        }
        std::vector<at::Tensor> parts;
        for (int64_t first = 0; first < channels; first += most) {
          const int64_t count = std::min(most, channels - first);
          parts.push_back(back<1>(of, image(grad, i).narrow(1, first, count),
                                  image(x, i).narrow(1, first, count), like.narrow(0, 0, count), count));
        }
        found.push_back(at::cat(parts).unsqueeze(0));
      }
      return found;
    }
    case Way::GROUPS: {
      shape[0] *= batch;
      const at::Tensor like = at::empty(shape, x.options());
      const at::Tensor found = back<1>(of, joined(grad), joined(x), like, batch * groups);
      shape[0] = kernel[0];
      shape.insert(shape.begin(), batch);
      return {found.contiguous().view(shape)};
    }
    case Way::PRODUCTS: break;
  }
  const at::Tensor used = sampled(x, of.stride);
  at::Tensor found =
      memory_of_thread({batch * groups, kernel[0] / groups, kernel[1]}, x);
  if (by_pixels(x, used, groups))
    mmkw::bmm_into(pixels(grad).transpose(1, 2), pixels(used), found, tiles_given(given));
  else
    mmkw::bmm_into(columns(grad, groups), columns(used, groups).transpose(1, 2), found, tiles_given(given));
  shape.insert(shape.begin(), batch);
  return {found.view(shape)};
}

at::Tensor backward_images(const Geometry& of, const at::Tensor& grad, const at::Tensor& x,
                           const at::Tensor& kernels, const Added& of_images,
                           const std::optional<std::string>& given) {
  const int64_t batch = x.size(0), groups = of.groups;
  const Added added = over_pixels(of_images, x.dim());
  const auto with_added = [&](const at::Tensor& found) { return added ? found.add_(*added) : found; };
  switch (way_of("x", of, x, kernels.sizes().slice(1), given)) {
    case Way::IMAGES:
      return gathered(batch, added, [&](int64_t i) {
        return back<0>(of, image(grad, i), image(x, i), kernels[i], groups);
      });
    case Way::GROUPS:
      return with_added(back<0>(of, joined(grad), joined(x), kernels.flatten(0, 1), batch * groups)
                            .contiguous()
                            .view(x.sizes()));
    case Way::PRODUCTS: break;
  }
  const at::Tensor weights = matrices(kernels, groups);
  const at::Tensor found =
      by_pixels(x, grad, groups)
          ? from_pixels(multiply_pixels(pixels(grad), weights, {}, tiles_given(given)), grad)
          : from_columns(mmkw::bmm(weights.transpose(1, 2), columns(grad, groups), tiles_given(given)), grad);
  if (std::all_of(of.stride.begin(), of.stride.end(), [](int64_t step) { return step == 1; }))
    return with_added(found);
  // Zeros to all pixels that the kernel has not used.
  const at::Tensor whole = at::zeros_like(x);
  sampled(whole, of.stride).copy_(found);
  return with_added(whole);
}

bool are_positive(at::IntArrayRef numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](int64_t number) { return number > 0; });
}

// That the images fit the kernels, and their gradient both.
void check(const Geometry& of, const at::Tensor& x, at::IntArrayRef kernel,
           const std::optional<at::Tensor>& grad) {
  const size_t dims = of.stride.size();
  TORCH_CHECK(is_stored(x), "images of float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(x.dim() == int64_t(dims) + 2 && kernel.size() == dims + 2 &&
                  of.padding.size() == dims && of.dilation.size() == dims && x.size(0) > 0,
              "images of ", x.sizes(), " do not fit kernels of ", kernel, " and a stride of ", of.stride);
  TORCH_CHECK(are_positive(of.stride) && are_positive(of.dilation), "no stride of ", of.stride,
              " or dilation of ", of.dilation);
  TORCH_CHECK(of.groups > 0 && kernel[1] * of.groups == x.size(1) && kernel[0] % of.groups == 0,
              "kernels of ", kernel, " and ", of.groups, " groups do not fit ", x.size(1), " channels");
  if (!grad) return;
  TORCH_CHECK(grad->scalar_type() == x.scalar_type(), "a gradient of ", grad->scalar_type(),
              " for images of ", x.scalar_type());
  std::vector<int64_t> shape{x.size(0), kernel[0]};
  for (size_t dim = 0; dim < dims; dim++)
    shape.push_back((x.size(2 + dim) + 2 * of.padding[dim] - of.dilation[dim] * (kernel[2 + dim] - 1) - 1) /
                        of.stride[dim] + 1);
  TORCH_CHECK(grad->sizes() == shape, "a gradient of ", grad->sizes(), " for a result of ", shape);
}

void check_kernels(const at::Tensor& x, const at::Tensor& kernels,
                   const std::optional<at::Tensor>& bias = {}) {
  TORCH_CHECK(kernels.dim() > 2 && kernels.size(0) == x.size(0), "one kernel for an image, got ",
              kernels.sizes(), " for ", x.sizes());
  TORCH_CHECK(kernels.scalar_type() == x.scalar_type(), "input type ", x.scalar_type(),
              " and kernel type ", kernels.scalar_type(), " should be the same");
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == kernels.size(1), "a bias of ", bias->sizes(),
              " for kernels of ", kernels.sizes());
  TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "input type ", x.scalar_type(),
              " and bias type ", bias->scalar_type(), " should be the same");
}

void check_tokens(const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 1, "tokens have features, got ", x.sizes());
}

}  // namespace

at::Tensor memory_of_thread(at::IntArrayRef shape, const at::Tensor& like) {
  // It outlives an inference mode.
  const c10::InferenceMode normal(false);
  thread_local at::Tensor of_float, of_half;
  at::Tensor& memory = like.scalar_type() == at::kFloat ? of_float : of_half;
  const int64_t size = c10::multiply_integers(shape);
  if (!memory.defined() || memory.numel() < size)
    memory = at::empty({size}, at::TensorOptions(like.scalar_type()));
  return memory.narrow(0, 0, size).view(shape);
}

// x (batch, in_channels, *size) convolved by kernels (batch, out_channels, in_channels / groups,
// *kernel_size); without a stride a linear map of tokens x (batch, ..., in) by kernels (batch, out, in, 1).
at::Tensor apply_kernels(const at::Tensor& x, const at::Tensor& kernels,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         std::optional<std::string> way) {
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  check_kernels(x, kernels, bias);
  if (!stride.empty()) {
    const Geometry of{stride, padding, dilation, groups};
    check(of, x, kernels.sizes().slice(1), {});
    return forward(of, x, kernels, bias, way);
  }
  check_tokens(x);
  const at::Tensor seen = as_image(x), weights = kernels.unsqueeze(-1);
  check(PIXELWISE, seen, weights.sizes().slice(1), {});
  return as_tokens(forward(PIXELWISE, seen, weights, bias, way), x);
}

// The gradients of kernels of `kernel` (out_channels, in_channels / groups, *kernel_size), of one image after
// the other, or of all: (images, *kernel). They are valid until the next call in the same thread.
std::vector<at::Tensor> backward_kernels(const at::Tensor& grad, const at::Tensor& x,
                                         at::IntArrayRef kernel, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation,
                                         int64_t groups, std::optional<std::string> way) {
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  if (!stride.empty()) {
    const Geometry of{stride, padding, dilation, groups};
    check(of, x, kernel, grad);
    return backward_kernels(of, grad, x, kernel, way);
  }
  check_tokens(x);
  check_tokens(grad);
  std::vector<int64_t> shape = kernel.vec();
  shape.push_back(1);
  const at::Tensor seen = as_image(x), given = as_image(grad);
  check(PIXELWISE, seen, shape, given);
  std::vector<at::Tensor> found = backward_kernels(PIXELWISE, given, seen, shape, way);
  for (at::Tensor& gradient : found) gradient = gradient.squeeze(-1);
  return found;
}

// The gradient of the images; to all pixels of an image some numbers are `added` (batch, in_channels).
at::Tensor backward_images(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& kernels,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                           int64_t groups, std::optional<at::Tensor> added,
                           std::optional<std::string> way) {
  const c10::impl::ExcludeDispatchKeyGuard as_given(AUTOCAST);
  check_kernels(x, kernels);
  const int64_t channels = kernels.size(2) * groups;
  TORCH_CHECK(!added || (added->sizes() == at::IntArrayRef({x.size(0), channels}) &&
                         added->scalar_type() == x.scalar_type()),
              "numbers to add must be ", x.scalar_type(), ", one for each of ", channels,
              " channels of ", x.size(0), " images");
  if (!stride.empty()) {
    const Geometry of{stride, padding, dilation, groups};
    check(of, x, kernels.sizes().slice(1), grad);
    return backward_images(of, grad, x, kernels, added, way);
  }
  check_tokens(x);
  check_tokens(grad);
  const at::Tensor seen = as_image(x), given = as_image(grad), weights = kernels.unsqueeze(-1);
  check(PIXELWISE, seen, weights.sizes().slice(1), given);
  return as_tokens(backward_images(PIXELWISE, given, seen, weights, added, way), x);
}

}  // namespace mmkw
