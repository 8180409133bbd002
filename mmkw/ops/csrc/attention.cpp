// Computes attentions on the CPU, where nothing learns: in float32, also of bfloat16.

#include "blocks.h"
#include "operators.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace mmkw {
namespace {

// Checks the shape, and makes the tensor contiguous and of float32.
at::Tensor dense(const at::Tensor& tensor, at::IntArrayRef shape) {
  const bool is_stored =
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16;
  TORCH_CHECK(tensor.sizes() == shape && is_stored, "expected float32 or bfloat16 of ", shape,
              ", got ", tensor.scalar_type(), " of ", tensor.sizes());
  return tensor.to(at::kFloat).contiguous();
}

std::optional<at::Tensor> dense_or_none(const std::optional<at::Tensor>& tensor, int64_t size) {
  if (!tensor) return tensor;
  return dense(*tensor, {size});
}

// result (rows, out) = values (rows, in) * weights (out, in) transposed + bias (out), if given.
void linear(float* result, const float* values, int64_t rows, const at::Tensor& weights,
            const std::optional<at::Tensor>& bias) {
  const int64_t out = weights.size(0), in = weights.size(1);
  const int64_t whole = in / blocks().lanes * blocks().lanes;
  const float* all = weights.const_data_ptr<float>();
  const float* constant = bias ? bias->const_data_ptr<float>() : nullptr;
  constexpr int64_t GRAIN = 1 << 16;
  at::parallel_for(0, out, GRAIN / (rows * in + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t o = first; o < last; o++) {
        float sum = constant ? constant[o] : 0;
        for (int64_t i = whole; i < in; i++) sum += values[r * in + i] * all[o * in + i];
        result[r * out + o] = sum;
      }
    blocks().gemm_nt(rows, last - first, whole, values, in, all + first * in, in, result + first,
                     out);
  });
}

// (hidden - mean) / sqrt(variance + eps) * weight + bias, then ReLU. Without given statistics this
// is a LayerNorm: every row has its own statistics.
void normalize(float* hidden, int64_t rows, int64_t width, const std::optional<at::Tensor>& mean,
               const std::optional<at::Tensor>& variance, const at::Tensor& weight,
               const at::Tensor& bias, double eps) {
  const float* by = weight.const_data_ptr<float>();
  const float* plus = bias.const_data_ptr<float>();
  for (int64_t r = 0; r < rows; r++) {
    float* row = hidden + r * width;
    double own_mean = 0, own_variance = 0;
    if (!mean) {
      for (int64_t i = 0; i < width; i++) own_mean += row[i] / width;
      for (int64_t i = 0; i < width; i++)
        own_variance += (row[i] - own_mean) * (row[i] - own_mean) / width;
    }
    for (int64_t i = 0; i < width; i++) {
      const double center = mean ? mean->const_data_ptr<float>()[i] : own_mean;
      const double spread = variance ? variance->const_data_ptr<float>()[i] : own_variance;
      row[i] = std::max<float>((row[i] - center) / std::sqrt(spread + eps) * by[i] + plus[i], 0);
    }
  }
}

}  // namespace

// Computes the same as mmkw/layers/attention.py at temperature 0: alpha (batch, mixtures, n) from
// pooled (batch, in). The steps are fc1, a norm of given statistics or a LayerNorm, ReLU, and fc2.
at::Tensor attend(const at::Tensor& pooled, const at::Tensor& fc1_weight,
                  const std::optional<at::Tensor>& fc1_bias, const std::optional<at::Tensor>& mean,
                  const std::optional<at::Tensor>& variance, const at::Tensor& norm_weight,
                  const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
                  const at::Tensor& fc2_bias, int64_t mixtures, double norm_eps, double eps) {
  TORCH_CHECK(pooled.dim() == 2 && fc1_weight.dim() == 2 && fc2_weight.dim() == 2,
              "pooled and weights must be matrices, got ", pooled.sizes(), ", ",
              fc1_weight.sizes(), " and ", fc2_weight.sizes());
  const int64_t batch = pooled.size(0), width = fc1_weight.size(0), logits = fc2_weight.size(0);
  TORCH_CHECK(mixtures > 0 && logits > 0 && logits % mixtures == 0, logits, " logits for ",
              mixtures, " mixtures");
  TORCH_CHECK(mean.has_value() == variance.has_value(), "mean and variance come together");
  const int64_t n = logits / mixtures - 1;
  // Parameters may be slices or expanded, so dense() copies them where they are not contiguous.
  const at::Tensor values = dense(pooled, {batch, fc1_weight.size(1)});
  std::vector<float> hidden(batch * width), z(batch * logits);
  linear(hidden.data(), values.const_data_ptr<float>(), batch,
         dense(fc1_weight, {width, values.size(1)}), dense_or_none(fc1_bias, width));
  normalize(hidden.data(), batch, width, dense_or_none(mean, width),
            dense_or_none(variance, width), dense(norm_weight, {width}), dense(norm_bias, {width}),
            norm_eps);
  linear(z.data(), hidden.data(), batch, dense(fc2_weight, {logits, width}),
         dense(fc2_bias, {logits}));
  const at::Tensor alpha = at::empty({batch, mixtures, n}, pooled.options().dtype(at::kFloat));
  float* to = alpha.mutable_data_ptr<float>();
  for (int64_t mixture = 0; mixture < batch * mixtures; mixture++) {
    const float* from = z.data() + mixture * (n + 1);
    float sum = 0;
    for (int64_t i = 0; i <= n; i++) sum += std::abs(from[i]);
    for (int64_t i = 0; i < n; i++) to[mixture * n + i] = from[i] / (sum + static_cast<float>(eps));
  }
  return alpha.to(pooled.scalar_type());
}

}  // namespace mmkw
