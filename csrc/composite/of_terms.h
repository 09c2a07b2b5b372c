// What composite.cpp calls, of the terms of a formula: for the files of formulas, each of which
// ends with `template struct Composite<Formula>;`.
#pragma once

#include "terms.h"

namespace fused_bce {

// Made of a call, and of the tensors in the place of the formula's parameters. losses() are those
// of each element without the weight, slope_by_logit() and slope_by_target() their derivatives.
template <class Formula>
struct Terms;

template <class Formula>
at::Tensor Composite<Formula>::losses(const Operands& o, const ParameterTensors& tensors) {
  return times_weight(Terms<Formula>(o, tensors).losses(), o);
}

template <class Formula>
at::Tensor Composite<Formula>::slope_by_logit(const Operands& o) {
  return Terms<Formula>(o, {}).slope_by_logit();
}

template <class Formula>
at::Tensor Composite<Formula>::slope_by_target(const Operands& o) {
  return Terms<Formula>(o, {}).slope_by_target();
}

}  // namespace fused_bce
