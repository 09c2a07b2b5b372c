#include "../formulas/varifocal.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>

#include "terms.h"

namespace fused_bce {

using at::Tensor;

namespace {

// The terms of formulas/varifocal.h in its notation
struct VarifocalTerms : LogisticTerms {
  NumberOrTensor alpha, gamma;
  bool detaches_weight;
  Tensor is_negative;

  explicit VarifocalTerms(const Operands& o, const ParameterTensors& tensors = {})
      : LogisticTerms(o),
        alpha(parameter(o, tensors, 0)),
        gamma(parameter(o, tensors, 1)),
        detaches_weight(o.parameters[2] != 0),
        is_negative(t == 0) {}

  Tensor weight() const {
    const Tensor of_weight = detaches_weight ? x.detach() : x;
    const Tensor log_p = -exact_softplus(-bounded(of_weight));
    return at::where(is_negative, alpha.times(at::exp(gamma.times(log_p))),
                     detaches_weight ? t.detach() : t);
  }
};

}  // namespace

template <>
Tensor Composite<Varifocal>::losses(const Operands& o, const ParameterTensors& tensors) {
  const VarifocalTerms terms(o, tensors);
  return times_weight(terms.product(terms.weight(), terms.ce), o);
}

template <>
Tensor Composite<Varifocal>::slope_by_logit(const Operands& o) {
  const VarifocalTerms v(o);
  Tensor slope = v.side * (v.c - v.q);
  if (!v.detaches_weight) {
    const Tensor not_p = at::sigmoid(-v.x);
    const Tensor through_weight = v.gamma.times(not_p * v.ce.masked_fill(not_p == 0, 0));
    slope = slope + at::where(v.is_negative, through_weight, 0);
  }
  return v.weight() * slope;
}

template <>
Tensor Composite<Varifocal>::slope_by_target(const Operands& o) {
  const VarifocalTerms v(o);
  const Tensor slope = v.weight() * -v.x;
  return v.detaches_weight ? slope : slope + v.ce.masked_fill(v.is_negative, 0);
}

}  // namespace fused_bce
