// The operators of torch.ops.mmkw, and what they share: on the CPU, without gradients of their own.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mmkw {

// Operands are what they are, also under autocast.
inline const c10::DispatchKeySet AUTOCAST(c10::DispatchKey::AutocastCPU);

// PyTorch gives no single image of so few values to its library for convolutions (float32).
constexpr int64_t SMALL_IMAGE = 20480;

// Whether values are of float32 or bfloat16, which all operators read.
inline bool is_stored(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16;
}

// Calls work(pointer) with a pointer to the values, which are of float32 or bfloat16.
template <typename Work>
void with_values(const at::Tensor& tensor, const Work& work) {
  if (tensor.scalar_type() == at::kFloat)
    work(tensor.const_data_ptr<float>());
  else
    work(tensor.const_data_ptr<c10::BFloat16>());
}

// Memory that the thread uses again. Fresh memory of megabytes takes as long as mixing.
at::Tensor memory_of_thread(at::IntArrayRef shape, const at::Tensor& like);

std::vector<int64_t> kernel_shape(int64_t batch, const at::Tensor& cells, at::IntArrayRef grid);

at::Tensor mix_cells(const at::Tensor& attention, const at::Tensor& cells, at::IntArrayRef grid);

void pack_cells(const at::Tensor& cells, at::Tensor panels);

void mix_cells_into(const at::Tensor& attention, const at::Tensor& cells, at::IntArrayRef grid,
                    at::Tensor kernels, std::optional<at::Tensor> panels = {});

at::Tensor mix_backward(at::TensorList grad_kernels, const at::Tensor& attention,
                        const at::Tensor& cells, at::IntArrayRef grid,
                        std::optional<at::Tensor> kernels, std::optional<at::Tensor> rows,
                        std::optional<at::Tensor> panels);

void add_to_cells(const at::Tensor& weights, const at::Tensor& rows, at::Tensor sum, bool begin);

at::Tensor bmm(const at::Tensor& a, const at::Tensor& b, std::optional<bool> by_tiles = {});

void bmm_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c,
              std::optional<bool> by_tiles = {});

bool are_tiles_faster(int64_t batch, int64_t m, int64_t k, int64_t n);
bool are_tiles_faster(const at::Tensor& a, const at::Tensor& b);

bool is_convolution_faster(const std::string& what, int64_t batch, int64_t out, int64_t in,
                           int64_t pixels, bool channels_last,
                           std::optional<double> saved = {});

at::Tensor average(const at::Tensor& seen, bool is_tokens);

at::Tensor attend(const at::Tensor& pooled, const at::Tensor& fc1_weight,
                  const std::optional<at::Tensor>& fc1_bias, const std::optional<at::Tensor>& mean,
                  const std::optional<at::Tensor>& variance, const at::Tensor& norm_weight,
                  const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
                  const at::Tensor& fc2_bias, int64_t mixtures, double norm_eps, double eps);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attend_to_learn(
    const at::Tensor& pooled, const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
    const at::Tensor& fc2_bias, const at::Tensor& assigned, const std::string& norm, double norm_eps,
    double momentum, const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance,
    const std::optional<at::Tensor>& batches, double temperature, double eps);

std::vector<at::Tensor> attend_backward(
    const at::Tensor& grad, const at::Tensor& pooled, const at::Tensor& fc1_weight,
    const at::Tensor& norm_weight, const at::Tensor& fc2_weight, const std::string& norm,
    double temperature, double eps, const at::Tensor& hidden, const at::Tensor& normed,
    const at::Tensor& inverses, const at::Tensor& z);

at::Tensor apply_kernels(const at::Tensor& x, const at::Tensor& kernels,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         std::optional<std::string> way = {});

std::vector<at::Tensor> backward_kernels(const at::Tensor& grad, const at::Tensor& x,
                                         at::IntArrayRef kernel, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation,
                                         int64_t groups, std::optional<std::string> way = {});

at::Tensor backward_images(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& kernels,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                           int64_t groups, std::optional<at::Tensor> added = {},
                           std::optional<std::string> way = {});

at::Tensor apply_to_image(const at::Tensor& x, const at::Tensor& seen, const at::Tensor& fc1_weight,
                          const std::optional<at::Tensor>& fc1_bias,
                          const std::optional<at::Tensor>& mean,
                          const std::optional<at::Tensor>& variance, const at::Tensor& norm_weight,
                          const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
                          const at::Tensor& fc2_bias, int64_t mixtures, double norm_eps, double eps,
                          const at::Tensor& cells, at::IntArrayRef grid,
                          const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

}  // namespace mmkw
