#include "../formulas/quality_focal.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>

#include "terms.h"

namespace fused_bce {

using at::Tensor;

namespace {

// The terms of formulas/quality_focal.h in its notation
struct QualityFocalTerms : LogisticTerms {
  NumberOrTensor beta;
  Tensor d, m;

  explicit QualityFocalTerms(const Operands& o, const ParameterTensors& tensors = {})
      : LogisticTerms(o), beta(parameter(o, tensors, 0)), d(q - c), m(away_from_0(d.abs())) {}

  Tensor power() const { return beta.tensor ? at::pow(m, *beta.tensor) : at::pow(m, beta.number); }
};

}  // namespace

template <>
Tensor Composite<QualityFocal>::losses(const Operands& o, const ParameterTensors& tensors) {
  const QualityFocalTerms terms(o, tensors);
  return times_weight(terms.product(terms.power(), terms.ce), o);
}

template <>
Tensor Composite<QualityFocal>::slope_by_logit(const Operands& o) {
  const QualityFocalTerms v(o);
  const Tensor by_weight = v.beta.times(v.c / v.m * at::rsub(v.c, 1) * v.finite_ce());
  return v.side * v.d.sign() * v.power() * (v.m + by_weight) * -1;
}

template <>
Tensor Composite<QualityFocal>::slope_by_target(const Operands& o) {
  const QualityFocalTerms v(o);
  const Tensor by_weight = v.beta.times(v.d.sign() * v.finite_ce() / v.m);
  return v.side * v.power() * (by_weight - v.b);
}

}  // namespace fused_bce
