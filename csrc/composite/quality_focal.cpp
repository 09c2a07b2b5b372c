#include "../formulas/quality_focal.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>

#include "of_terms.h"

namespace fused_bce {

using at::Tensor;

// In the notation of formulas/quality_focal.h
template <>
struct Terms<QualityFocal> : LogisticTerms {
  NumberOrTensor beta;
  Tensor d, m;

  Terms(const Operands& o, const ParameterTensors& tensors)
      : LogisticTerms(o), beta(parameter(o, tensors, 0)), d(q - c), m(away_from_0(d.abs())) {}

  Tensor power() const { return beta.tensor ? at::pow(m, *beta.tensor) : at::pow(m, beta.number); }

  Tensor losses() const { return product(power(), ce); }

  Tensor slope_by_logit() const {
    const Tensor by_weight = beta.times(c / m * at::rsub(c, 1) * finite_ce());
    return side * d.sign() * power() * (m + by_weight) * -1;
  }

  Tensor slope_by_target() const {
    const Tensor by_weight = beta.times(d.sign() * finite_ce() / m);
    return side * power() * (by_weight - b);
  }
};

template struct Composite<QualityFocal>;

}  // namespace fused_bce
