// What a formula is made of as ATen operations, and what it gives: composite.cpp makes losses and
// gradients of it.
#pragma once

#include <ATen/TensorOperators.h>

#include "../composite.h"
#include "../formulas/formulas.h"

namespace fused_bce {

// In the dtype of the arithmetic: half types would lose digits, and a float64 number times a
// float32 array is float32.
at::Tensor widened(const at::Tensor& t, const Operands& o);

// Of a call, 0 where it is ignored: 0 times the derivative at nan is nan.
at::Tensor logits_of(const Operands& o);
at::Tensor smoothed_target_of(const Operands& o);

// losses * weight, if there is one
at::Tensor times_weight(const at::Tensor& losses, const Operands& o);
// y * pos_weight, if there is one
at::Tensor times_pos_weight(const at::Tensor& y, const Operands& o);

// Of a sigmoid, so that losses made of them keep their digits in the tails, and have derivatives
// that do: c, sp and ce are functions of -|x|. The names are those of formulas/logistic.h.
struct LogisticTerms {
  explicit LogisticTerms(const Operands& o);

  bool may_be_extreme;
  at::Tensor x, t;
  at::Tensor side;  // 1 for a negative logit, else -1
  at::Tensor b;     // -|x|, but for its slope at 0
  at::Tensor q, c;
  at::Tensor ce;  // without pos_weight

  // power * loss; 0 where the power underflows, even if the loss is infinite
  at::Tensor product(const at::Tensor& power, const at::Tensor& loss) const;
  // 0 where the logit is infinite: the limit of what vanishes there, times ce
  at::Tensor finite_ce() const;
};

// Of which the exponential is 0
constexpr double kVanishing = -1e4;

// Logits as powers of probabilities take them: constant far out, where a product with an infinite
// loss has no slope
at::Tensor bounded(const at::Tensor& logits);

// What a power is of, or a quotient by: near 0, where that would be infinite, a constant, which has
// no slope
at::Tensor away_from_0(const at::Tensor& base);

// log(1 + exp(x)) to the last digits of float64
at::Tensor exact_softplus(const at::Tensor& x);

// x * y, 0 where x is, whatever y is
at::Tensor vanishing_product(const at::Tensor& x, const at::Tensor& y);

// A parameter of a formula: a number, or the tensor in its place
struct NumberOrTensor {
  double number;
  OptionalTensor tensor;

  at::Tensor times(const at::Tensor& y) const { return tensor ? y * *tensor : y * number; }
};

inline NumberOrTensor parameter(const Operands& o, const ParameterTensors& tensors, size_t place) {
  return {o.parameters[place], tensors[place]};
}

// Each formula defines these in a file of its name: see of_terms.h.
template <class Formula>
struct Composite {
  // Of each element, times its weight. The tensors take the place of the formula's parameters.
  static at::Tensor losses(const Operands& operands, const ParameterTensors& tensors);
  // Their derivatives without the weight
  static at::Tensor slope_by_logit(const Operands& operands);
  static at::Tensor slope_by_target(const Operands& operands);
};

}  // namespace fused_bce
