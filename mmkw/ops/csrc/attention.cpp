// Computes attentions on the CPU: where nothing learns in float32, also of bfloat16; to learn, and their
// gradients, in float32.

#include "blocks.h"
#include "operators.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
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

// What the norm subtracts from the hidden units, and what it then multiplies them by: `shared` by the
// images, one value a unit, or by the units, one value an image. The variance is that of the units
// themselves, and absent where it was given.
struct Statistics {
  bool shared;
  std::vector<double> mean, variance, inverse;
};

Statistics given_statistics(int64_t width, const float* mean, const float* variance, double eps) {
  Statistics result{true, {mean, mean + width}, {}, std::vector<double>(width)};
  for (int64_t i = 0; i < width; i++) result.inverse[i] = 1 / std::sqrt(variance[i] + eps);
  return result;
}

// The statistics of `groups` of `count` values, which lie `stride` apart. The groups lie `step` apart.
Statistics own_statistics(bool shared, const float* values, int64_t groups, int64_t step, int64_t count,
                          int64_t stride, double eps) {
  Statistics result{shared, std::vector<double>(groups), std::vector<double>(groups),
                    std::vector<double>(groups)};
  for (int64_t g = 0; g < groups; g++) {
    const float* const group = values + g * step;
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < count; i++) mean += group[i * stride] / count;
    for (int64_t i = 0; i < count; i++)
      variance += (group[i * stride] - mean) * (group[i * stride] - mean) / count;
    result.mean[g] = mean;
    result.variance[g] = variance;
    result.inverse[g] = 1 / std::sqrt(variance + eps);
  }
  return result;
}

// A LayerNorm's: every image has its own.
Statistics of_images(const float* values, int64_t rows, int64_t width, double eps) {
  return own_statistics(false, values, rows, width, width, 1, eps);
}

// hidden (rows, width) = ReLU(norm(hidden) * weight + bias). What the norm gives goes to `normed`, which
// may be the same memory.
void normalize(const Statistics& by, float* hidden, float* normed, int64_t rows, int64_t width,
               const float* weight, const float* bias) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < width; i++) {
      const int64_t at = r * width + i, group = by.shared ? i : r;
      const double value = (hidden[at] - by.mean[group]) * by.inverse[group];
      normed[at] = value;
      hidden[at] = std::max<float>(value * weight[i] + bias[i], 0);
    }
}

// The sum of value(i) for all i below `count`, several at a time.
template <typename Value>
float sum_of(int64_t count, const Value& value) {
  constexpr int64_t PARTS = 8;
  float parts[PARTS] = {};
  int64_t i = 0;
  for (; i + PARTS <= count; i += PARTS)
    for (int64_t part = 0; part < PARTS; part++) parts[part] += value(i + part);
  for (int64_t part = 0; i + part < count; part++) parts[part] += value(i + part);
  float sum = 0;
  for (const float part : parts) sum += part;
  return sum;
}

// a (m, k) * b (k, n), b dense. In small layers a library takes longer to call than to multiply.
at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t FEW_PRODUCTS = 1 << 16;
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  if (m * k * n > FEW_PRODUCTS) return at::mm(a, b);
  const at::Tensor result = at::zeros({m, n}, b.options());
  float* to = result.mutable_data_ptr<float>();
  const float* const values = a.const_data_ptr<float>();
  for (int64_t i = 0; i < m; i++, to += n) {
    const float* row = b.const_data_ptr<float>();
    for (int64_t j = 0; j < k; j++, row += n) {
      const float value = values[i * a.stride(0) + j * a.stride(1)];
      for (int64_t c = 0; c < n; c++) to[c] += value * row[c];
    }
  }
  return result;
}

// The sums of the columns of a dense matrix.
at::Tensor sum_of_rows(const at::Tensor& matrix) {
  const int64_t columns = matrix.size(1);
  const at::Tensor result = at::zeros({columns}, matrix.options());
  float* const to = result.mutable_data_ptr<float>();
  const float* row = matrix.const_data_ptr<float>();
  for (int64_t r = 0; r < matrix.size(0); r++, row += columns)
    for (int64_t c = 0; c < columns; c++) to[c] += row[c];
  return result;
}

// Calls work(mixture) for all mixtures, on all threads if they have many logits.
template <typename Work>
void for_mixtures(int64_t count, int64_t logits, const Work& work) {
  constexpr int64_t GRAIN = 1 << 15;
  at::parallel_for(0, count, GRAIN / logits + 1, [&](int64_t begin, int64_t end) {
    for (int64_t mixture = begin; mixture < end; mixture++) work(mixture);
  });
}

// What a mixture's `count` logits are divided by.
float magnitude(const float* z, int64_t count, double eps) {
  return sum_of(count, [&](int64_t i) { return std::abs(z[i]); }) + static_cast<float>(eps);
}

// alpha (mixtures, n) = z / (sum |z| + eps), from z (mixtures, n + 1), whose last is the zero cell's.
void divide_by_magnitudes(float* alpha, const float* z, int64_t mixtures, int64_t n, double eps) {
  for_mixtures(mixtures, n + 1, [&](int64_t mixture) {
    const float* const from = z + mixture * (n + 1);
    const float sum = magnitude(from, n + 1, eps);
    for (int64_t i = 0; i < n; i++) alpha[mixture * n + i] = from[i] / sum;
  });
}

// The sizes of an attention, which its operands must have.
struct Sizes {
  int64_t batch, in, width, logits;

  Sizes(const at::Tensor& pooled, const at::Tensor& fc1_weight, const at::Tensor& fc2_weight,
        int64_t mixtures) {
    TORCH_CHECK(pooled.dim() == 2 && fc1_weight.dim() == 2 && fc2_weight.dim() == 2,
                "pooled and weights must be matrices, got ", pooled.sizes(), ", ",
                fc1_weight.sizes(), " and ", fc2_weight.sizes());
    batch = pooled.size(0), in = fc1_weight.size(1);
    width = fc1_weight.size(0), logits = fc2_weight.size(0);
    TORCH_CHECK(mixtures > 0 && logits > 0 && logits % mixtures == 0, logits, " logits for ",
                mixtures, " mixtures");
  }
};

// Whether a norm is a LayerNorm, and whether a BatchNorm by the batch.
std::pair<bool, bool> kind_of(const std::string& norm) {
  TORCH_CHECK(norm == "layer" || norm == "batch" || norm == "running", "unknown norm ", norm);
  return {norm == "layer", norm == "batch"};
}

// As `dense`, of float32 alone.
at::Tensor dense_floats(const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, "expected float32, got ", tensor.scalar_type());
  return dense(tensor, shape);
}

// So many values of a map at a time are summed up in float32. PyTorch takes less time for those of larger
// maps of float32.
constexpr int64_t PART = 1024;

// result (rows) = averages of maps (rows, places).
template <typename Value>
void average_maps(float* result, const Value* maps, int64_t rows, int64_t places) {
  constexpr int64_t ROWS = 12, GRAIN = 1 << 16;
  const std::vector<float> ones(std::min(places, PART), 1);
  at::parallel_for(0, rows, GRAIN / places + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    for_tiles(end - begin, ROWS, [&](int64_t tile, int64_t count) {
      double sum[ROWS] = {};
      for_tiles(places, PART, [&](int64_t first, int64_t terms) {
        const Value* const from = maps + (begin + tile) * places + first;
        const float* part;
        int64_t stride = places;
        if constexpr (std::is_same_v<Value, float>) {
          part = from;
        } else {
          stride = terms;
          memory.resize(std::max<size_t>(memory.size(), count * terms));
          for (int64_t row = 0; row < count; row++)
            std::get<Widen<Value>>(blocks().widen)(terms, from + row * places, &memory[row * terms]);
          part = memory.data();
        }
        const int64_t whole = terms / blocks().lanes * blocks().lanes;
        float of_part[ROWS] = {};
        blocks().gemm_nt(1, count, whole, ones.data(), PART, part, stride, of_part, ROWS);
        for (int64_t row = 0; row < count; row++) {
          for (int64_t i = whole; i < terms; i++) of_part[row] += part[row * stride + i];
          sum[row] += of_part[row];
        }
      });
      for (int64_t row = 0; row < count; row++) result[begin + tile + row] = sum[row] / places;
    });
  });
}

// result (batch, channels) = averages of images (batch, places, channels). Channels fill whole tiles.
template <typename Value>
void average_pixels(float* result, const Value* images, int64_t batch, int64_t places,
                    int64_t channels) {
  const int64_t width = blocks().width, tiles = channels / width;
  // So many rows at a time are read from the first column to the last, and summed up in float32.
  constexpr int64_t PIXELS = 64, GRAIN = 1 << 16;
  const std::vector<float> ones(PIXELS, 1);
  const auto& gemm = std::get<Gemm<Value>>(blocks().gemm);
  at::parallel_for(0, batch * tiles, GRAIN / (places * width) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> part(channels);
    std::vector<double> sum(channels);
    for (int64_t tile = begin; tile < end;) {
      const int64_t image = tile / tiles, column = tile % tiles * width;
      const int64_t count = std::min(end - tile, tiles - tile % tiles);
      const Value* const from = images + image * places * channels + column;
      std::fill(sum.begin(), sum.end(), 0);
      for (int64_t first = 0; first < places; first += PIXELS) {
        gemm(1, count * width, std::min(PIXELS, places - first), ones.data(), from + first * channels,
             channels, 0, part.data(), channels, {});
        for (int64_t c = 0; c < count * width; c++) sum[c] += part[c];
      }
      float* const to = result + image * channels + column;
      for (int64_t c = 0; c < count * width; c++) to[c] = sum[c] / places;
      tile += count;
    }
  });
}

}  // namespace

// The average of images over space in float32: over all dimensions but the first and that of the
// channels, which is the second, or of tokens the last.
at::Tensor average(const at::Tensor& seen, bool is_tokens) {
  TORCH_CHECK(seen.dim() > 1, "images have a batch and channels, got ", seen.sizes());
  if (seen.dim() == 2) return seen.to(at::kFloat, false, true);
  const int64_t batch = seen.size(0), channels = seen.size(is_tokens ? -1 : 1);
  const int64_t places = seen.numel() / std::max<int64_t>(batch * channels, 1);
  const bool are_maps = !is_tokens && seen.is_contiguous();
  // PyTorch makes a copy in float32 of what is not of it.
  const bool are_own = are_maps ? seen.scalar_type() != at::kFloat || places <= PART
                                : channels % blocks().width == 0 &&
                                      (is_tokens ? seen : seen.movedim(1, -1)).is_contiguous();
  if (is_stored(seen) && places > 0 && are_own) {
    const at::Tensor result = at::empty({batch, channels}, seen.options().dtype(at::kFloat));
    float* const to = result.mutable_data_ptr<float>();
    with_values(seen, [&](const auto* values) {
      if (are_maps)
        average_maps(to, values, batch * channels, places);
      else
        average_pixels(to, values, batch, places, channels);
    });
    return result;
  }
  std::vector<int64_t> space(seen.dim() - 2);
  std::iota(space.begin(), space.end(), is_tokens ? 1 : 2);
  return at::mean(seen, space, false, at::kFloat);
}

// Computes the same as mmkw/layers/attention.py at temperature 0: alpha (batch, mixtures, n) from
// pooled (batch, in). The steps are fc1, a norm of given statistics or a LayerNorm, ReLU, and fc2.
at::Tensor attend(const at::Tensor& pooled, const at::Tensor& fc1_weight,
                  const std::optional<at::Tensor>& fc1_bias, const std::optional<at::Tensor>& mean,
                  const std::optional<at::Tensor>& variance, const at::Tensor& norm_weight,
                  const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
                  const at::Tensor& fc2_bias, int64_t mixtures, double norm_eps, double eps) {
  const auto [batch, in, width, logits] = Sizes(pooled, fc1_weight, fc2_weight, mixtures);
  TORCH_CHECK(mean.has_value() == variance.has_value(), "mean and variance come together");
  const int64_t n = logits / mixtures - 1;
  const Floats values(pooled, {batch, in}), hidden_bias(fc1_bias, width), center(mean, width),
      spread(variance, width), by(norm_weight, width), plus(norm_bias, width),
      logits_bias(fc2_bias, logits);
  std::vector<float> hidden(batch * width), z(batch * logits);
  linear(hidden.data(), values.data(), batch, dense(fc1_weight, {width, in}), hidden_bias.data());
  const Statistics statistics =
      mean ? given_statistics(width, center.data(), spread.data(), norm_eps)
           : of_images(hidden.data(), batch, width, norm_eps);
  normalize(statistics, hidden.data(), hidden.data(), batch, width, by.data(), plus.data());
  linear(z.data(), hidden.data(), batch, dense(fc2_weight, {logits, width}), logits_bias.data());
  const at::Tensor alpha = at::empty({batch, mixtures, n}, pooled.options().dtype(at::kFloat));
  divide_by_magnitudes(alpha.mutable_data_ptr<float>(), z.data(), batch * mixtures, n, eps);
  return alpha.to(pooled.scalar_type());
}

// As `attend`, to learn: in float32, at any temperature, with a norm by the `batch`, by `running`
// statistics or by `layer`. Statistics of the batch change the running ones, and count the batch. Returns
// alpha, and for the backward pass the hidden units, what the norm gave before its weights, what it
// multiplied by, and the logits.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attend_to_learn(
    const at::Tensor& pooled, const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& fc2_weight,
    const at::Tensor& fc2_bias, const at::Tensor& assigned, const std::string& norm, double norm_eps,
    double momentum, const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance,
    const std::optional<at::Tensor>& batches, double temperature, double eps) {
  const int64_t mixtures = assigned.numel();
  const auto [batch, in, width, logits] = Sizes(pooled, fc1_weight, fc2_weight, mixtures);
  const auto [is_layer, by_batch] = kind_of(norm);
  TORCH_CHECK(mean.has_value() != is_layer && variance.has_value() != is_layer,
              "running statistics are a BatchNorm's");
  TORCH_CHECK(!by_batch || batch > 1, "one image has no variance");
  TORCH_CHECK(!batches || (batches->scalar_type() == at::kLong && batches->numel() == 1),
              "batches are counted by an integer");
  TORCH_CHECK(assigned.scalar_type() == at::kLong && assigned.is_contiguous(),
              "the cells of the start must be dense integers");
  const at::Tensor first = dense_floats(fc1_weight, {width, in}),
                   last = dense_floats(fc2_weight, {logits, width}),
                   values = dense_floats(pooled, {batch, in}), by = dense_floats(norm_weight, width),
                   plus = dense_floats(norm_bias, width);
  const Floats hidden_bias(fc1_bias, width), logits_bias(fc2_bias, logits);
  const at::Tensor hidden = at::empty({batch, width}, values.options());
  const at::Tensor normed = at::empty_like(hidden), z = at::empty({batch, logits}, values.options());
  float* const units = hidden.mutable_data_ptr<float>();
  linear(units, values.const_data_ptr<float>(), batch, first, hidden_bias.data());

  Statistics statistics;
  if (is_layer) {
    statistics = of_images(units, batch, width, norm_eps);
  } else {
    for (const at::Tensor& running : {*mean, *variance})
      TORCH_CHECK(running.is_contiguous() && running.scalar_type() == at::kFloat &&
                      running.sizes() == at::IntArrayRef(width),
                  "running statistics must be dense float32 of ", width);
    if (by_batch) {
      float* const center = mean->mutable_data_ptr<float>();
      float* const spread = variance->mutable_data_ptr<float>();
      statistics = own_statistics(true, units, width, 1, batch, width, norm_eps);
      for (int64_t i = 0; i < width; i++) {
        const double unbiased = statistics.variance[i] * batch / (batch - 1);
        center[i] = (1 - momentum) * center[i] + momentum * statistics.mean[i];
        spread[i] = (1 - momentum) * spread[i] + momentum * unbiased;
      }
      if (batches) ++*batches->mutable_data_ptr<int64_t>();
    } else {
      statistics = given_statistics(width, mean->const_data_ptr<float>(),
                                    variance->const_data_ptr<float>(), norm_eps);
    }
  }
  normalize(statistics, units, normed.mutable_data_ptr<float>(), batch, width,
            by.const_data_ptr<float>(), plus.const_data_ptr<float>());
  const at::Tensor inverses =
      at::empty({static_cast<int64_t>(statistics.inverse.size())}, values.options());
  std::copy(statistics.inverse.begin(), statistics.inverse.end(), inverses.mutable_data_ptr<float>());

  linear(z.mutable_data_ptr<float>(), units, batch, last, logits_bias.data());
  const int64_t n = logits / mixtures - 1;
  const at::Tensor alpha = at::empty({batch, mixtures, n}, values.options());
  float* const to = alpha.mutable_data_ptr<float>();
  divide_by_magnitudes(to, z.const_data_ptr<float>(), batch * mixtures, n, eps);
  if (temperature > 0) {
    const float tau = temperature;
    const int64_t* const cells = assigned.const_data_ptr<int64_t>();
    for (int64_t mixture = 0; mixture < batch * mixtures; mixture++)
      for (int64_t i = 0; i < n; i++) {
        float& value = to[mixture * n + i];
        const float beta = i == cells[mixture % mixtures];
        // Exact at both ends.
        value = tau < 0.5f ? value + tau * (beta - value) : beta - (1 - tau) * (beta - value);
      }
  }
  return {alpha, hidden, normed, inverses, z};
}

// The gradients of pooled and, in the order of `attend_to_learn`, of the parameters, also of a bias of
// fc1. What attend_to_learn returns beside alpha comes last.
std::vector<at::Tensor> attend_backward(
    const at::Tensor& grad, const at::Tensor& pooled, const at::Tensor& fc1_weight,
    const at::Tensor& norm_weight, const at::Tensor& fc2_weight, const std::string& norm,
    double temperature, double eps, const at::Tensor& hidden, const at::Tensor& normed,
    const at::Tensor& inverses, const at::Tensor& z) {
  TORCH_CHECK(grad.dim() == 3, "the gradient of attentions has three dimensions, got ", grad.sizes());
  const int64_t mixtures = grad.size(1), n = grad.size(2);
  const auto [batch, in, width, logits] = Sizes(pooled, fc1_weight, fc2_weight, mixtures);
  const auto [is_layer, by_batch] = kind_of(norm);
  const at::Tensor outer = dense_floats(grad, {batch, mixtures, logits / mixtures - 1}),
                   values = dense_floats(pooled, {batch, in}),
                   first = dense_floats(fc1_weight, {width, in}),
                   last = dense_floats(fc2_weight, {logits, width}),
                   by = dense_floats(norm_weight, width), after = dense_floats(hidden, {batch, width}),
                   before = dense_floats(normed, {batch, width}),
                   scales = dense_floats(inverses, is_layer ? batch : width),
                   given = dense_floats(z, {batch, logits});

  const at::Tensor grad_z = at::empty_like(given);
  const float* const all_g = outer.const_data_ptr<float>();
  const float* const all_z = given.const_data_ptr<float>();
  float* const all_grad = grad_z.mutable_data_ptr<float>();
  for_mixtures(batch * mixtures, n + 1, [&](int64_t mixture) {
    const float* const g = all_g + mixture * n;
    const float* const from = all_z + mixture * (n + 1);
    float* const to = all_grad + mixture * (n + 1);
    const float sum = magnitude(from, n + 1, eps);
    const float along = sum_of(n, [&](int64_t i) { return g[i] * from[i]; }) / sum;
    const float share = (1 - static_cast<float>(temperature)) / sum;
    for (int64_t i = 0; i <= n; i++) {
      const float sign = (from[i] > 0) - (from[i] < 0);
      to[i] = share * ((i < n ? g[i] : 0) - sign * along);
    }
  });

  const at::Tensor grad_units = product(grad_z, last);
  const at::Tensor grad_weight = at::zeros({width}, by.options()), grad_bias = at::zeros_like(grad_weight);
  float* const of_weight = grad_weight.mutable_data_ptr<float>();
  float* const of_bias = grad_bias.mutable_data_ptr<float>();
  float* const d = grad_units.mutable_data_ptr<float>();
  const float* const units = after.const_data_ptr<float>();
  const float* const x = before.const_data_ptr<float>();
  const float* const weight = by.const_data_ptr<float>();
  const float* const scale = scales.const_data_ptr<float>();
  for (int64_t r = 0; r < batch; r++)
    for (int64_t i = 0; i < width; i++) {
      const int64_t at = r * width + i;
      if (units[at] <= 0) d[at] = 0;
      of_weight[i] += d[at] * x[at];
      of_bias[i] += d[at];
      d[at] *= weight[i];
    }
  // Of statistics that the units themselves have: groups of them, as in own_statistics.
  const int64_t groups = is_layer ? batch : by_batch ? width : 0, count = is_layer ? width : batch;
  const int64_t step = is_layer ? width : 1, stride = is_layer ? 1 : width;
  for (int64_t g = 0; g < groups; g++) {
    double mean = 0, along = 0;
    for (int64_t i = 0; i < count; i++) {
      mean += d[g * step + i * stride] / count;
      along += d[g * step + i * stride] * x[g * step + i * stride] / count;
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = g * step + i * stride;
      d[at] -= mean + x[at] * along;
    }
  }
  for (int64_t r = 0; r < batch; r++)
    for (int64_t i = 0; i < width; i++) d[r * width + i] *= scale[is_layer ? r : i];

  return {product(grad_units, first), product(grad_units.t(), values), sum_of_rows(grad_units),
          grad_weight, grad_bias, product(grad_z.t(), after), sum_of_rows(grad_z)};
}

}  // namespace mmkw
