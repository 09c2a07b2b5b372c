// The quality focal loss: cross entropy with a soft target, weighted by its distance from the
// prediction.
#pragma once

#include "../problem.h"
#include "bce.h"
#include "elementary.h"
#include "logistic.h"
#include "loss_and_grad.h"
#include "powers.h"

namespace fused_bce {

//   loss = |t - p|^b ce      p = sigmoid(x), ce: cross entropy of x and t, b: beta
// (Li et al., Generalized Focal Loss, 2020.) The weight has a gradient, too. In the terms of
// logistic.h, with q the target's share of the far side, t if x < 0 else 1 - t, and l = 1 - q:
//   d = q - c = (q - e l) / (1 + e), so that p - t = sign(x) d
//   grad = sign(x) sign(d) |d|^(b - 1) (d^2 + b c (1 - c) ce)
// The two terms of the gradient never cancel; d does, where the prediction is near a soft target:
// it has the error of e, which is one of c (1 - q), or as much as a logit's last place is worth.
// At d = 0 a beta of at most 1 has no derivative: it is 0 there.
struct QualityFocal {
  static constexpr const char* kName = "quality_focal_loss";
  static constexpr ParameterTable<1> kParameters{{exponent("beta", "2")}};
  static constexpr bool kTakesPosWeight = false;

  BinaryCrossEntropy bce;
  double beta;
  bool plain, by_products;

  FUSED_BCE_INLINE explicit QualityFocal(const Problem& p)
      : bce(p),
        beta(p.parameters[0]),
        plain(beta == 0),
        by_products(beta == 1 || beta == 2) {}  // as in focal.h

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real pos_weight) const {
    // The same branch for all elements
    return plain         ? bce.evaluate<false>(x, t, pos_weight)
           : by_products ? weighted<true>(x, t)
                         : weighted<false>(x, t);
  }

 private:
  template <bool kByProducts, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> weighted(Real x, Real t) const {
    const Real zero(0), one(1);
    const auto [a, e, c, sp] = logistic<kByProducts>(x);
    const Real u = one - t;
    const Real q = select(sign_bit(x), t, u);
    const Real l = select(sign_bit(x), u, t);
    const Real ce = fma(select(q == zero, zero, a), q, sp);  // as in bce.h
    const Real b = number<Real>(beta);

    if constexpr (kByProducts) {
      const Real d = q - c;
      const Real m = abs(d);
      const Real m_less = select(b == Real(2), m, one);  // m^(b - 1)
      const Real slope = fma(m, m, b * (one - c) * vanishing_product(c, ce));
      const Real size = select(m == zero, zero, m_less * slope);
      // In this order as in focal.h
      return {m_less * (m * ce), flip_sign(flip_sign(size, d), x)};
    } else {
      const Real r = fma(zero - e, l, q);  // d = r / (1 + e)
      const Real m = abs(r);
      const auto [high, low] = minus_log_as_sum(m);
      // For a hard target the logarithm is known. It is bounded: 0 times infinity
      const Real known = at_most(a, Real(Precision<typename Real::Scalar>::kLargestExponent));
      const Sum<Real> minus_log_m{select(q == zero, known, high), select(q == zero, zero, low)};
      const Real power = select(m == zero, zero, power_of(exponent<Real>(beta), minus_log_m, sp));
      const Real ratio = select(q == zero, one - c, select(m == zero, zero, c / m));
      const Real slope = fma(m, one - c, b * vanishing_product(ratio, ce));
      return {vanishing_product(power, ce), flip_sign(flip_sign(power * slope, r), x)};
    }
  }
};

}  // namespace fused_bce
