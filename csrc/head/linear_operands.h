// A linear layer and the loss of its logits: what their operators take and return.
#pragma once

#include <array>

#include "../operators.h"

namespace fused_bce {

// N rows of F features, C labels. In the order of the operators' arguments.
struct LinearOperands {
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
  int64_t reduction = at::Reduction::Mean;  // or Sum
  OptionalDtype dtype = {};                 // of the logits; absent: that of the input
  OptionalTensor label_smoothing = {};
  OptionalIndex ignore_index = {};
  bool ignore_nan = false;
  OptionalTensor divisor = {};  // of mean
  int64_t chunk_bytes = 0;      // most bytes of a block of logits; 0: by default

  auto tie() const {
    return std::tie(input, linear_weight, linear_bias, target, offsets, values, weight, pos_weight,
                    reduction, dtype, label_smoothing, ignore_index, ignore_nan, divisor,
                    chunk_bytes);
  }

  at::ScalarType logits_dtype() const { return dtype.value_or(input.scalar_type()); }
  // The losses and the sums over rows and labels
  at::ScalarType wide_dtype() const { return at_least_float(logits_dtype()); }
  at::ScalarType loss_dtype() const;
  bool ignores() const { return ignore_index || ignore_nan; }
};

// Which gradients: of the input, the weight, the bias.
using Wanted = std::array<bool, 3>;

// The loss, and its gradients for a grad_loss of 1, empty where not wanted. Those of input and bias
// are sums in wide_dtype; that of the weight has the dtype of the weight.
struct LinearLoss {
  at::Tensor loss, grad_input, grad_weight, grad_bias;
};

// linear_loss.cpp. A grad_loss is for a weight in float16 only, where its gradient would underflow
// without: it is the gradient for that grad_loss.
LinearLoss linear_loss(const LinearOperands& operands, Wanted wanted,
                       const OptionalTensor& grad_loss);
inline at::Tensor linear_loss_only(const LinearOperands& operands) {
  return linear_loss(operands, {}, {}).loss;
}
void check_linear(const LinearOperands& operands, const OptionalTensor& grad_loss);

// linear_autograd.cpp
at::Tensor linear_autograd(const LinearOperands& operands);
std::array<at::Tensor, 3> linear_derivatives(const at::Tensor& grad_loss,
                                             const LinearOperands& operands, Wanted wanted);

template <class... Arguments>
struct LinearOperatorsOf {
  using Tensor = at::Tensor;
  using LossAndGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using Grads = std::tuple<Tensor, Tensor, Tensor>;
  static constexpr const char* kLoss = "linear_binary_cross_entropy_with_logits";
  static constexpr const char* kLossAndGrads = "linear_binary_cross_entropy_with_grads";
  static constexpr const char* kDifferentiableBackward =
      "linear_binary_cross_entropy_differentiable_backward";

  // What the dispatcher calls
  template <Tensor (*run)(const LinearOperands&)>
  static Tensor loss(Arguments... arguments) {
    return run({arguments...});
  }

  template <LinearLoss (*run)(const LinearOperands&, Wanted, const OptionalTensor&)>
  static LossAndGrads loss_and_grads(Wanted wanted, const OptionalTensor& grad_loss,
                                     Arguments... arguments) {
    LinearLoss all = run({arguments...}, wanted, grad_loss);
    return {std::move(all.loss), std::move(all.grad_input), std::move(all.grad_weight),
            std::move(all.grad_bias)};
  }

  template <std::array<Tensor, 3> (*run)(const Tensor&, const LinearOperands&, Wanted)>
  static Grads grads(Wanted wanted, const Tensor& grad_loss, Arguments... arguments) {
    auto [input, weight, bias] = run(grad_loss, {arguments...}, wanted);
    return {std::move(input), std::move(weight), std::move(bias)};
  }

  // Calls through it
  static Tensor call_loss(const LinearOperands& o) {
    static const auto op = find_operator<Tensor(Arguments...)>(kLoss);
    return std::apply([](const auto&... arguments) { return op.call(arguments...); }, o.tie());
  }

  static LossAndGrads call_loss_and_grads(const LinearOperands& o, Wanted wanted,
                                          const OptionalTensor& grad_loss) {
    static const auto op =
        find_operator<LossAndGrads(Wanted, const OptionalTensor&, Arguments...)>(kLossAndGrads);
    return std::apply(
        [&](const auto&... arguments) { return op.call(wanted, grad_loss, arguments...); },
        o.tie());
  }
};

using LinearOperators =
    LinearOperatorsOf<const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                      const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, const OptionalTensor&, int64_t, OptionalDtype,
                      const OptionalTensor&, OptionalIndex, bool, const OptionalTensor&, int64_t>;

}  // namespace fused_bce
