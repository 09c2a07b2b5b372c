// The varifocal loss: cross entropy in which positives count by their soft target, and negatives
// by what is predicted for them.
#pragma once

#include "../problem.h"
#include "elementary.h"
#include "logistic.h"
#include "loss_and_grad.h"
#include "powers.h"

namespace fused_bce {

//   loss = w ce      w = alpha p^g if t = 0 else t, p = sigmoid(x), ce: cross entropy of x and t
// (Zhang et al., VarifocalNet, 2021.) In the terms of logistic.h and quality_focal.h:
//   grad = w (sign(x) (q - c) + g (1 - p) ce), the second term for negatives only, and only
//   if the weight is not detached
// For hard targets nothing cancels.
struct Varifocal {
  static constexpr const char* kName = "varifocal_loss";
  static constexpr ParameterTable<3> kParameters{{
      {"alpha", "0.75", 0, 1e6},
      exponent("gamma", "2"),
      {"detach_weight", "0", 0, 1},
  }};
  static constexpr bool kTakesPosWeight = false;

  double alpha, gamma, gamma_of_slope;
  bool by_products;

  FUSED_BCE_INLINE explicit Varifocal(const Problem& p)
      : alpha(p.parameters[0]),
        gamma(p.parameters[1]),
        gamma_of_slope(p.parameters[2] != 0 ? 0 : gamma),
        by_products(gamma == 1 || gamma == 2) {}  // as in focal.h

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real) const {
    // The same branch for all elements
    return by_products ? weighted<true>(x, t) : weighted<false>(x, t);
  }

 private:
  template <bool kByProducts, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> weighted(Real x, Real t) const {
    const Real zero(0), one(1);
    const auto [a, e, c, sp] = logistic<kByProducts>(x);
    const Real q = select(sign_bit(x), t, one - t);
    const Real ce = fma(select(q == zero, zero, a), q, sp);  // as in bce.h
    const Real p = select(sign_bit(x), c, one - c);
    const Real not_p = select(sign_bit(x), one - c, c);

    Real power;
    if constexpr (kByProducts) {
      power = select(number<Real>(gamma) == Real(2), p * p, p);
    } else {
      // -log(p) = sp, and for x < 0 a + sp. It is bounded: 0 times infinity
      const Real known = at_most(a, Real(Precision<typename Real::Scalar>::kLargestExponent));
      power = power_of(exponent<Real>(gamma), select(sign_bit(x), known, zero), sp);
    }
    const auto negative = t == zero;
    const Real w = select(negative, number<Real>(alpha) * power, t);
    const Real through_weight =
        number<Real>(gamma_of_slope) * select(negative, vanishing_product(not_p, ce), zero);
    return {w * ce, w * (flip_sign(q - c, x) + through_weight)};
  }
};

}  // namespace fused_bce
