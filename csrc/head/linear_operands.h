// A linear layer and the loss of its logits: what their operators take and return.
#pragma once

#include <array>

#include "../operators.h"

namespace fused_bce {

// N rows of F features, C labels.
struct LinearOperands : LossOptions {
  at::Tensor input;                 // (N, F)
  at::Tensor linear_weight;         // (C, F)
  OptionalTensor linear_bias = {};  // (C,)
  // (N, C), or with offsets (P,): row i has the labels target[offsets[i] : offsets[i + 1]], whose
  // targets are 1, or those in values.
  at::Tensor target;
  OptionalTensor offsets = {};  // (N + 1,)
  OptionalTensor values = {};   // (P,)
  // Of shape (), (C,) or (N, 1)
  OptionalTensor weight = {};
  OptionalTensor pos_weight = {};
  int64_t chunk_bytes = 0;  // most bytes of a block of logits; 0: by default
  // For autograd: whether the gradients wait for backward.
  bool recompute = false;

  at::ScalarType logits_dtype() const { return dtype.value_or(input.scalar_type()); }
  // The losses and the sums over rows and labels
  at::ScalarType wide_dtype() const { return at_least_float(logits_dtype()); }
  at::ScalarType loss_dtype() const;
};

// Which gradients: of the input, the weight, the bias.
using Wanted = std::array<bool, 3>;

// The loss, and the gradients of input, weight and bias for a grad_loss of 1, empty where not
// wanted. Those of input and bias are sums in wide_dtype; that of the weight has the dtype of
// the weight.
using LinearLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LinearGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// linear_loss.cpp. A grad_loss is for a weight in float16 only, where its gradient would underflow
// without: it is the gradient for that grad_loss.
LinearLoss linear_loss(const LinearOperands& operands, Wanted wanted,
                       const OptionalTensor& grad_loss);
// What runs for the loss alone, by what runs for all of it
template <auto run>
at::Tensor loss_only(const LinearOperands& operands) {
  return std::get<0>(run(operands, {}, {}));
}
void check_linear(const LinearOperands& operands, const OptionalTensor& grad_loss);
// Of it what concerns the input and the layer alone
void check_layer(const LinearOperands& operands);

// linear_autograd.cpp
at::Tensor linear_autograd(const LinearOperands& operands);
LinearGrads linear_derivatives(const LinearOperands& operands, Wanted wanted,
                               const at::Tensor& grad_loss);

// linear_topk.cpp: the k largest logits (N, k) of each row, in descending order, and their labels,
// of equal logits the lower one first.
using TopLogits = std::tuple<at::Tensor, at::Tensor>;
constexpr const char* kTopkSchema =
    "_linear_topk(Tensor input, Tensor linear_weight, Tensor? linear_bias, int k, "
    "ScalarType? dtype=None, int chunk_bytes=0) -> (Tensor values, Tensor labels)";
TopLogits linear_topk(const at::Tensor& input, const at::Tensor& linear_weight,
                      const OptionalTensor& linear_bias, int64_t k, OptionalDtype dtype,
                      int64_t chunk_bytes);
// As ATen operations, for devices without a kernel
TopLogits linear_topk_composite(const at::Tensor& input, const at::Tensor& linear_weight,
                                const OptionalTensor& linear_bias, int64_t k, OptionalDtype dtype,
                                int64_t chunk_bytes);
// Without values
TopLogits linear_topk_meta(const at::Tensor& input, const at::Tensor& linear_weight,
                           const OptionalTensor& linear_bias, int64_t k, OptionalDtype dtype,
                           int64_t chunk_bytes);

struct Linear {
  using Arguments = LinearOperands;
  static constexpr const char* kName = "linear_binary_cross_entropy_with_logits";
  static constexpr const char* kWithGrads = "_linear_binary_cross_entropy_with_grads";
  static constexpr const char* kDifferentiableBackward =
      "_linear_binary_cross_entropy_differentiable_backward";
  static std::string schema() {
    return std::string(
               "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
               "Tensor? offsets=None, Tensor? values=None, Tensor? weight=None, "
               "Tensor? pos_weight=None, ") +
           LossOptions::kSchema + ", int chunk_bytes=0, bool recompute=False";
  }

  template <class O>
  static auto tie(O& o) {
    return std::tuple_cat(std::tie(o.input, o.linear_weight, o.linear_bias, o.target, o.offsets,
                                   o.values, o.weight, o.pos_weight),
                          LossOptions::tie(o), std::tie(o.chunk_bytes, o.recompute));
  }

  static LinearOperands empty() { return {}; }

  static LinearLoss call_with_grads(const LinearOperands& o, const Wanted& wanted,
                                    const OptionalTensor& grad_loss) {
    static const auto op =
        Operators<Linear>::find<LinearLoss, Wanted, const OptionalTensor&>(kWithGrads);
    return Operators<Linear>::call(op, o, wanted, grad_loss);
  }
};

}  // namespace fused_bce
