// The argument lists of the operators: what the dispatcher calls, and calls through it, where
// tracers and subclasses see them. They stand here only; everything else has Operands.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <tuple>

#include "ops.h"

namespace fused_bce {

template <class Signature>
auto find_operator(const char* name) {
  const std::string full_name = std::string("fused_bce::") + name;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(full_name.c_str(), "")
      .template typed<Signature>();
}

// Those of one loss: its names, and its Own arguments between weight and reduction.
template <class Loss, class... Own>
struct Operators : Loss {
  using Tensor = at::Tensor;

  // What the dispatcher calls, around a function of Operands
  template <Tensor (*run)(const Operands&)>
  static Tensor loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                     Own... own, int64_t reduction, OptionalDtype dtype,
                     const OptionalTensor& label_smoothing, OptionalIndex ignore_index,
                     bool ignore_nan, const OptionalTensor& divisor, bool recompute) {
    return run(operands(logits, target, weight, own..., reduction, dtype, label_smoothing,
                        ignore_index, ignore_nan, divisor, recompute));
  }

  template <std::tuple<Tensor, Tensor> (*run)(const Operands&)>
  static std::tuple<Tensor, Tensor> loss_and_grad(const Tensor& logits, const Tensor& target,
                                                  const OptionalTensor& weight, Own... own,
                                                  int64_t reduction, OptionalDtype dtype,
                                                  const OptionalTensor& label_smoothing,
                                                  OptionalIndex ignore_index, bool ignore_nan,
                                                  const OptionalTensor& divisor) {
    return run(operands(logits, target, weight, own..., reduction, dtype, label_smoothing,
                        ignore_index, ignore_nan, divisor, false));
  }

  template <Tensor (*run)(const Tensor&, const Operands&)>
  static Tensor grad(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                     const OptionalTensor& weight, Own... own, int64_t reduction,
                     const OptionalTensor& label_smoothing, OptionalIndex ignore_index,
                     bool ignore_nan, const OptionalTensor& divisor) {
    return run(grad_loss, operands(logits, target, weight, own..., reduction, std::nullopt,
                                   label_smoothing, ignore_index, ignore_nan, divisor, false));
  }

  // Calls through it
  static Tensor call_loss(const Operands& o) {
    static const auto op = find_operator<decltype(loss<nullptr>)>(Loss::kLoss);
    return with_own(o, [&](const auto&... own) {
      return op.call(o.logits, o.target, o.weight, own..., o.reduction, o.dtype, o.label_smoothing,
                     o.ignore_index, o.ignore_nan, o.divisor, o.recompute);
    });
  }

  static std::tuple<Tensor, Tensor> call_loss_and_grad(const Operands& o) {
    static const auto op = find_operator<decltype(loss_and_grad<nullptr>)>(Loss::kLossAndGrad);
    return with_own(o, [&](const auto&... own) {
      return op.call(o.logits, o.target, o.weight, own..., o.reduction, o.dtype, o.label_smoothing,
                     o.ignore_index, o.ignore_nan, o.divisor);
    });
  }

  static Tensor call_backward(const Tensor& grad_loss, const Operands& o) {
    static const auto op = find_operator<decltype(grad<nullptr>)>(Loss::kBackward);
    return with_own(o, [&](const auto&... own) {
      return op.call(grad_loss, o.logits, o.target, o.weight, own..., o.reduction,
                     o.label_smoothing, o.ignore_index, o.ignore_nan, o.divisor);
    });
  }

 private:
  static Operands operands(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                           Own... own, int64_t reduction, OptionalDtype dtype,
                           const OptionalTensor& label_smoothing, OptionalIndex ignore_index,
                           bool ignore_nan, const OptionalTensor& divisor, bool recompute) {
    Operands o{.formula = Loss::kFormula,
               .logits = logits,
               .target = target,
               .weight = weight,
               .reduction = reduction,
               .dtype = dtype,
               .label_smoothing = label_smoothing,
               .ignore_index = ignore_index,
               .ignore_nan = ignore_nan,
               .divisor = divisor,
               .recompute = recompute};
    Loss::own(o) = std::tie(own...);
    return o;
  }

  template <class F>
  static auto with_own(const Operands& o, const F& f) {
    return std::apply(f, Loss::own(o));
  }
};

struct BinaryCrossEntropyNames {
  static constexpr FormulaId kFormula = FormulaId::kBinaryCrossEntropy;
  static constexpr const char* kLoss = "binary_cross_entropy_with_logits";
  static constexpr const char* kLossAndGrad = "forward_with_grad";
  static constexpr const char* kBackward = "backward";
  static constexpr const char* kDifferentiableBackward = "differentiable_backward";

  template <class O>
  static auto own(O& operands) {
    return std::tie(operands.pos_weight);
  }
};

struct SigmoidFocalNames {
  static constexpr FormulaId kFormula = FormulaId::kSigmoidFocal;
  static constexpr const char* kLoss = "sigmoid_focal_loss";
  static constexpr const char* kLossAndGrad = "sigmoid_focal_loss_with_grad";
  static constexpr const char* kBackward = "sigmoid_focal_loss_backward";
  static constexpr const char* kDifferentiableBackward =
      "sigmoid_focal_loss_differentiable_backward";

  template <class O>
  static auto own(O& operands) {
    return std::tie(operands.focal.alpha, operands.focal.gamma, operands.focal.gamma_neg);
  }
};

using BinaryCrossEntropyOperators = Operators<BinaryCrossEntropyNames, const OptionalTensor&>;
using SigmoidFocalOperators = Operators<SigmoidFocalNames, double, double, double>;

}  // namespace fused_bce
