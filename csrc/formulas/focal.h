// The sigmoid focal loss: cross entropy with the easy elements turned down, one at a time.
#pragma once

#include <cmath>

#include "../problem.h"
#include "bce.h"
#include "elementary.h"
#include "loss_and_grad.h"

namespace fused_bce {

//   loss = w m^g ce     ce: cross entropy, m = (1 - t) sigmoid(x) + t sigmoid(-x): 1 - p_t
//   w = alpha t + (1 - alpha) (1 - t), 1 if alpha < 0;  g = gamma t + gamma_neg (1 - t)
// (Lin et al., Focal Loss for Dense Object Detection, 2017; soft targets as in torchvision.) In the
// terms of bce.h, with l = 1 - q:
//   m = q (1 - c) + l c
//   grad = sign(x) w m^g (q - c + g (q - l) c (1 - c) ce / m)
// For a hard target m is c or 1 - c, no division is left, and both terms have the same sign.
struct SigmoidFocal {
  static constexpr const char* kName = "sigmoid_focal_loss";
  static constexpr ParameterTable<3> kParameters{{
      {"alpha", "0.25", 0, 1, -1},
      exponent("gamma", "2"),
      exponent("gamma_neg", "2"),
  }};
  static constexpr bool kTakesPosWeight = false;

  BinaryCrossEntropy bce;
  double of_positives, of_negatives;  // w
  double gamma, gamma_neg;
  // For targets outside [0, 1], of which 1 - p_t may be negative: nan for a fractional gamma.
  double power_of_minus_1;
  bool plain, by_products;

  FUSED_BCE_INLINE explicit SigmoidFocal(const Problem& p)
      : SigmoidFocal(p, p.parameters[0], p.parameters[1], p.parameters[2]) {}

  FUSED_BCE_INLINE SigmoidFocal(const Problem& p, double alpha, double gamma_, double gamma_neg_)
      : bce(p),
        of_positives(alpha < 0 ? 1 : alpha),
        of_negatives(alpha < 0 ? 1 : 1 - alpha),
        gamma(gamma_),
        gamma_neg(gamma_neg_),
        power_of_minus_1(power_of_minus_1_to(gamma, gamma_neg)),
        plain(gamma == 0 && gamma_neg == 0),
        // Beyond 2 the errors of m add up to more than those of its exponential.
        by_products(gamma == gamma_neg && (gamma == 1 || gamma == 2)) {}

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real pos_weight) const {
    const Real w = number<Real>(of_positives) * t + number<Real>(of_negatives) * (Real(1) - t);
    // The same branch for all elements
    const LossAndGrad<Real> r = plain         ? bce.evaluate<false>(x, t, pos_weight)
                                : by_products ? focused<true>(x, t)
                                              : focused<false>(x, t);
    return {w * r.loss, w * r.grad};
  }

 private:
  static FUSED_BCE_INLINE double power_of_minus_1_to(double gamma, double gamma_neg) {
    const int whole = static_cast<int>(gamma);  // it is at most 1e6
    if (gamma != gamma_neg || gamma != whole) return NAN;
    return whole % 2 == 0 ? 1 : -1;
  }

  template <class Real>
  static FUSED_BCE_INLINE Real number(double value) {
    return Real(static_cast<typename Real::Scalar>(value));
  }

  // What that rounds off
  template <class Real>
  static FUSED_BCE_INLINE Real rest(double value) {
    return number<Real>(value - static_cast<typename Real::Scalar>(value));
  }

  template <bool kByProducts, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> focused(Real x, Real t) const {
    const Real zero(0), one(1);
    const Real most(Precision<typename Real::Scalar>::kLargestExponent);
    const Real a = abs(x);
    const auto [e, lost] = exp_minus_and_lost(a);
    const Real sigmoid = quotient(e, one + e);
    // From e - e c, as in bce.h, since powers multiply its error. A product of three factors also
    // has three times the error of e: half of it in excess, in both that are c, puts it right, in
    // the tail, where all three are nearly e.
    const Real c = e - e * (kByProducts ? sigmoid - lost * fma(e, Real(-1.5), Real(1.5)) : sigmoid);
    const Real sp = Precision<typename Real::Scalar>::log1p(e);
    const Real u = one - t;
    const Real q = select(sign_bit(x), t, u);
    const Real l = select(sign_bit(x), u, t);
    const Real ce = fma(select(q == zero, zero, a), q, sp);  // as in bce.h
    // Its limit is 0 where ce is infinite.
    const Real c_ce = select(c == zero, zero, c * ce);

    if constexpr (kByProducts) {
      const Real m = fma(q, one - c, l * c);
      const Real m_less = select(number<Real>(gamma) == Real(2), m, one);  // m^(g - 1)
      const Real slope = fma(m, q - c, number<Real>(gamma) * (q - l) * (one - c) * c_ce);
      return {m_less * m * ce, flip_sign(m_less * slope, x)};
    } else {
      const Real g = number<Real>(gamma) * t + number<Real>(gamma_neg) * u;
      const Real g_rest = rest<Real>(gamma) * t + rest<Real>(gamma_neg) * u;
      const Real r = fma(l, e, q);            // m = r / (1 + e)
      const Real bounded = at_most(a, most);  // 0 times infinity
      const Real size = power_of(g, g_rest, select(q == zero, bounded, minus_log(abs(r))), sp);
      const Real power = select(zero > r, size * number<Real>(power_of_minus_1), size);
      const Real turned = select(q == zero, (c - one) * sp, (q - l) * c_ce / r);
      return {power * ce, flip_sign(power * fma(g, turned, q - c), x)};
    }
  }

  // (exp(-minus_log_r) / (1 + e))^g = exp(-g minus_log_r) exp(-g sp). In the tail the first product
  // is large, and its rounding error one of the exponent: it is put right to first order. For a
  // target outside [0, 1] the base may be above 1, and the power infinite.
  template <class Real>
  static FUSED_BCE_INLINE Real power_of(Real g, Real g_rest, Real minus_log_r, Real sp) {
    const Real exponent = g * minus_log_r;
    const Real largest(Precision<typename Real::Scalar>::kLargestExponent);
    const Real rounded = select(Real(0) - largest > exponent, Real(INFINITY), exp_minus(exponent));
    const Real error = fma(g_rest, minus_log_r, product_rest(g, minus_log_r, exponent));
    return (rounded - rounded * error) * exp_minus(g * sp);
  }
};

}  // namespace fused_bce
