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

// Checks the shape. Parameters may be slices or expanded, so they are copied where they are not
// contiguous.
at::Tensor dense(const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.sizes() == shape && is_stored(tensor), "expected float32 or bfloat16 of ", shape,
              ", got ", tensor.scalar_type(), " of ", tensor.sizes());
  return tensor.contiguous();
}

// `count` values of a dense tensor in float32, in `memory` where they are stored in bfloat16. In small
// layers PyTorch's conversion takes longer than the rest.
const float* as_floats(const at::Tensor& tensor, int64_t first, int64_t count,
                       std::vector<float>& memory) {
  if (tensor.scalar_type() == at::kFloat) return tensor.const_data_ptr<float>() + first;
  if (memory.size() < static_cast<size_t>(count)) memory.resize(count);
  std::get<Widen<BFloat16>>(blocks().widen)(
      count, tensor.const_data_ptr<BFloat16>() + first, memory.data());
  return memory.data();
}

// The values of a small tensor in float32; none of a tensor that is missing.
class Floats {
 public:
  Floats(const std::optional<at::Tensor>& tensor, at::IntArrayRef shape) {
    if (!tensor) return;
    tensor_ = dense(*tensor, shape);
    data_ = as_floats(tensor_, 0, tensor_.numel(), memory_);
  }
  Floats(const Floats&) = delete;

  const float* data() const { return data_; }

 private:
  at::Tensor tensor_;
  std::vector<float> memory_;
  const float* data_ = nullptr;
};

// result (rows, out) = values (rows, in) * weights (out, in) transposed + bias (out), if given.
void linear(float* result, const float* values, int64_t rows, const at::Tensor& weights,
            const float* bias) {
  const int64_t out = weights.size(0), in = weights.size(1);
  const int64_t whole = in / blocks().lanes * blocks().lanes;
  constexpr int64_t GRAIN = 1 << 16, BLOCK_VALUES = 1 << 14;
  const int64_t step = BLOCK_VALUES / (in + 1) + 1;
  at::parallel_for(0, out, GRAIN / (rows * in + 1) + 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> memory;
    for (int64_t first = begin; first < end; first += step) {
      const int64_t count = std::min(step, end - first);
      const float* const block = as_floats(weights, first * in, count * in, memory);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < count; o++) {
          float sum = bias ? bias[first + o] : 0;
          for (int64_t i = whole; i < in; i++) sum += values[r * in + i] * block[o * in + i];
          result[r * out + first + o] = sum;
        }
      blocks().gemm_nt(rows, count, whole, values, in, block, in, result + first, out);
    }
  });
}

// (hidden - mean) / sqrt(variance + eps) * weight + bias, then ReLU. Without given statistics this
// is a LayerNorm: every row has its own statistics.
void normalize(float* hidden, int64_t rows, int64_t width, const float* mean,
               const float* variance, const float* weight, const float* bias, double eps) {
  for (int64_t r = 0; r < rows; r++) {
    float* row = hidden + r * width;
    double own_mean = 0, own_variance = 0;
    if (!mean) {
      for (int64_t i = 0; i < width; i++) own_mean += row[i] / width;
      for (int64_t i = 0; i < width; i++)
        own_variance += (row[i] - own_mean) * (row[i] - own_mean) / width;
    }
    for (int64_t i = 0; i < width; i++) {
      const double center = mean ? mean[i] : own_mean, spread = variance ? variance[i] : own_variance;
      row[i] = std::max<float>((row[i] - center) / std::sqrt(spread + eps) * weight[i] + bias[i], 0);
    }
  }
}

// result (channels) = averages of pixels (places, channels) of bfloat16. Channels fill whole tiles.
void average_pixels(float* result, const at::Tensor& pixels) {
  const int64_t places = pixels.size(0), channels = pixels.size(1), width = blocks().width;
  // So many rows at a time are read from the first column to the last.
  constexpr int64_t PART = 64, GRAIN = 1 << 16;
  const std::vector<float> shares(PART, 1.0f / places);
  const BFloat16* const values = pixels.const_data_ptr<BFloat16>();
  const auto& gemm = std::get<Gemm<BFloat16>>(blocks().gemm);
  at::parallel_for(0, channels / width, GRAIN / (places * width) + 1, [&](int64_t begin, int64_t end) {
    const int64_t column = begin * width, count = end * width - column;
    for (int64_t first = 0; first < places; first += PART)
      gemm(1, count, std::min(PART, places - first), shares.data(),
           values + first * channels + column, channels, first > 0, result + column, channels, {});
  });
}

}  // namespace

// The average of one image over space in float32: over all dimensions but the first and that of the
// channels, which is the second, or of tokens the last. Of bfloat16 PyTorch makes a copy in float32.
at::Tensor average(const at::Tensor& seen, bool is_tokens) {
  std::vector<int64_t> space;
  for (int64_t dim = is_tokens ? 1 : 2; dim < seen.dim() - (is_tokens ? 1 : 0); dim++)
    space.push_back(dim);
  if (space.empty()) return seen.to(at::kFloat);
  const int64_t channels = seen.size(is_tokens ? -1 : 1);
  if (seen.scalar_type() == at::kBFloat16 && seen.numel() > 0) {
    const int64_t places = seen.numel() / channels;
    const at::Tensor result = at::empty({1, channels}, seen.options().dtype(at::kFloat));
    float* const values = result.mutable_data_ptr<float>();
    const at::Tensor pixels = is_tokens ? seen : seen.movedim(1, -1);
    if (!is_tokens && seen.is_contiguous()) {
      const std::vector<float> shares(places, 1.0f / places);
      linear(values, shares.data(), 1, seen.view({channels, places}), nullptr);
      return result;
    }
    if (pixels.is_contiguous() && channels % blocks().width == 0) {
      average_pixels(values, pixels.view({places, channels}));
      return result;
    }
  }
  return at::mean(seen, space, false, at::kFloat);
}

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
  const int64_t in = fc1_weight.size(1);
  const Floats values(pooled, {batch, in}), hidden_bias(fc1_bias, width), center(mean, width),
      spread(variance, width), by(norm_weight, width), plus(norm_bias, width),
      logits_bias(fc2_bias, logits);
  std::vector<float> hidden(batch * width), z(batch * logits);
  linear(hidden.data(), values.data(), batch, dense(fc1_weight, {width, in}), hidden_bias.data());
  normalize(hidden.data(), batch, width, center.data(), spread.data(), by.data(), plus.data(),
            norm_eps);
  linear(z.data(), hidden.data(), batch, dense(fc2_weight, {logits, width}), logits_bias.data());
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
