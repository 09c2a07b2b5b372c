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
// Both come from one exponential, and for hard targets nothing cancels on either side.
struct BinaryCrossEntropy {
  static constexpr const char* kName = "binary_cross_entropy_with_logits";
  static constexpr ParameterTable<0> kParameters{};
  static constexpr bool kTakesPosWeight = true;

  FUSED_BCE_INLINE explicit BinaryCrossEntropy(const Problem&) {}

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real pos_weight) const {
    const Real zero(0), one(1);
    const Real a = abs(x);
    const Real e = exp_minus(a);
    // With pos_weight a factor, and its rounding, more: from e - e c, hardly any error of c is
    // left.
    const Real sigmoid = quotient(e, one + e);
    const Real c = kHasPosWeight ? e - e * sigmoid : sigmoid;
    const Real sp = Precision<typename Real::Scalar>::log1p(e);

    const Real u = one - t;
    const Real v = kHasPosWeight ? pos_weight * t : t;
    const Real q = select(sign_bit(x), v, u);
    // The limit for an infinite logit on the side of its target is 0, not inf * 0.
    const Real distance = select(q == zero, zero, a);

    // Without pos_weight u + v is 1; not computing it saves a rounding as well.
    const Real loss = fma(distance, q, kHasPosWeight ? (u + v) * sp : sp);
    const Real slope = kHasPosWeight ? q - (u + v) * c : q - c;
    return {loss, flip_sign(slope, x)};
  }
};

}  // namespace fused_bce
