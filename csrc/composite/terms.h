// What a formula is made of as ATen operations, and what it gives: composite.cpp makes losses and
// gradients of it.
#pragma once

#include "../composite.h"
#include "../formulas/formulas.h"

namespace fused_bce {

// In the dtype of the arithmetic: half types would lose digits, and a float64 number times a
// float32 array is float32.
at::Tensor widened(const at::Tensor& t, const Operands& o);

// Of a call, 0 where it is ignored: 0 times the derivative at nan is nan.
at::Tensor logits_of(const Operands& o);
at::Tensor smoothed_target_of(const Operands& o);

// Whether masks are needed for what is infinite or underflows. In eager mode on the CPU, where such
// a mask takes as long as three logarithms, the logits are asked first.
bool may_be_extreme(const at::Tensor& logits);

// losses * weight, if there is one
at::Tensor times_weight(const at::Tensor& losses, const Operands& o);

// Each formula defines these in a file of its name.
template <class Formula>
struct Composite {
  // Of each element, times its weight. The tensors take the place of the formula's parameters.
  static at::Tensor losses(const Operands& operands, const ParameterTensors& tensors);
  // Their derivatives without the weight
  static at::Tensor slope_by_logit(const Operands& operands);
  static at::Tensor slope_by_target(const Operands& operands);
};

}  // namespace fused_bce
