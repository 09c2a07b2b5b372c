// THE definition: loss and gradient of binary cross entropy with logits, one element at a time.
#pragma once

#include "../problem.h"
#include "elementary.h"
#include "loss_and_grad.h"

namespace fused_bce {

//   loss = (1 - t) softplus(x) + p t softplus(-x)        t: target, p: pos_weight
// With a = |x|, one of the two softplus is sp = log1p(exp(-a)), the other a + sp, so
//   loss = a q + (u + v) sp         u = 1 - t, v = p t, q = v if x < 0 else u
//   grad = sign(x) (q - (u + v) c)  c = sigmoid(-a)
// Both come from one exponential, and for hard targets nothing cancels on either side. The limit
// for an infinite logit on the side of its target is 0, not inf * 0.
struct BinaryCrossEntropy {
  static constexpr const char* kName = "binary_cross_entropy_with_logits";
  static constexpr ParameterTable<0> kParameters{};
  static constexpr bool kTakesPosWeight = true;

  FUSED_BCE_INLINE explicit BinaryCrossEntropy(const Problem&) {}

  // Without pos_weight the target may be of a type that has select and complement alone.
  template <bool kHasPosWeight, class Real, class Target>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Target t, Real pos_weight) const {
    const Real a = abs(x);
    const Real e = exp_minus(a);
    const Real sigmoid = quotient(e, Real(1) + e);
    const Real sp = log1p_beside(e, sigmoid);

    const Target u = complement(t);
    if constexpr (kHasPosWeight) {
      const Real v = pos_weight * t;
      const Real q = select(sign_bit(x), v, u);
      // A factor, and its rounding, more: from e - e c, hardly any error of c is left.
      const Real c = e - e * sigmoid;
      return {add_vanishing_product(a, q, (u + v) * sp), flip_sign(q - (u + v) * c, x)};
    } else {
      // u + v is 1; not computing it saves a rounding as well.
      const Target q = select(sign_bit(x), t, u);
      return {add_vanishing_product(a, q, sp), flip_sign(q - sigmoid, x)};
    }
  }
};

}  // namespace fused_bce
