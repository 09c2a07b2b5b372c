// What a formula gives.
#pragma once

namespace fused_bce {

template <class Real>
struct LossAndGrad {
  Real loss;
  Real grad;  // of the loss with respect to the logit
};

}  // namespace fused_bce
