#include "../formulas/varifocal.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>

#include "of_terms.h"

namespace fused_bce {

using at::Tensor;

// In the notation of formulas/varifocal.h
template <>
struct Terms<Varifocal> : LogisticTerms {
  NumberOrTensor alpha, gamma;
  bool detaches_weight;
  Tensor is_negative;

  Terms(const Operands& o, const ParameterTensors& tensors)
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

  Tensor losses() const { return product(weight(), ce); }

  Tensor slope_by_logit() const {
    Tensor slope = side * (c - q);
    if (!detaches_weight) {
      const Tensor not_p = at::sigmoid(-x);
      const Tensor through_weight = gamma.times(not_p * ce.masked_fill(not_p == 0, 0));
      slope = slope + at::where(is_negative, through_weight, 0);
    }
    return weight() * slope;
  }

  Tensor slope_by_target() const {
    const Tensor slope = weight() * -x;
    return detaches_weight ? slope : slope + ce.masked_fill(is_negative, 0);
  }
};

template struct Composite<Varifocal>;

}  // namespace fused_bce
