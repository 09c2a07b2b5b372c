// The sigmoid focal loss: cross entropy with the easy elements turned down, one at a time.
#pragma once

#include <cmath>

#include "../problem.h"
#include "bce.h"
#include "elementary.h"
#include "logistic.h"
#include "loss_and_grad.h"
#include "powers.h"

namespace fused_bce {

//   loss = w m^g ce     m = (1 - t) sigmoid(x) + t sigmoid(-x): 1 - p_t
//   w = alpha t + (1 - alpha) (1 - t), 1 if alpha < 0;  g = gamma t + gamma_neg (1 - t)
//   ce: cross entropy with pos_weight p, of the target t, or smoothed, of s = t + (1/2 - t) epsilon
// (Lin et al., Focal Loss for Dense Object Detection, 2017; soft targets as in torchvision,
// smoothing as in EfficientDet.) In the terms of bce.h, with l = 1 - q:
//   m = q (1 - c) + l c
//   grad = sign(x) w m^g (q - c + g (q - l) c (1 - c) ce / m)
// For a hard target m is c or 1 - c, no division is left, and both terms have the same sign. With
// pos_weight or smoothing, q - c becomes the slope of that ce, its own q - (u + v) c.
struct SigmoidFocal {
  static constexpr const char* kName = "sigmoid_focal_loss";
  static constexpr ParameterTable<4> kParameters{{
      {"alpha", "0.25", 0, 1, -1},
      exponent("gamma", "2"),
      exponent("gamma_neg", "2"),
      {"entropy_smoothing", "0", 0, 1},
  }};
  static constexpr bool kTakesPosWeight = true;

  BinaryCrossEntropy bce;
  double of_positives, of_negatives;  // w
  double gamma, gamma_neg, smoothing;
  // For targets outside [0, 1], of which 1 - p_t may be negative: nan for a fractional gamma.
  double power_of_minus_1;
  bool plain, by_products;

  FUSED_BCE_INLINE explicit SigmoidFocal(const Problem& p)
      : SigmoidFocal(p, p.parameters[0], p.parameters[1], p.parameters[2], p.parameters[3]) {}

  FUSED_BCE_INLINE SigmoidFocal(const Problem& p, double alpha, double gamma_, double gamma_neg_,
                                double smoothing_)
      : bce(p),
        of_positives(alpha < 0 ? 1 : alpha),
        of_negatives(alpha < 0 ? 1 : 1 - alpha),
        gamma(gamma_),
        gamma_neg(gamma_neg_),
        smoothing(smoothing_),
        power_of_minus_1(power_of_minus_1_to(gamma, gamma_neg)),
        plain(gamma == 0 && gamma_neg == 0),
        // Beyond 2 the errors of m add up to more than those of its exponential.
        by_products(gamma == gamma_neg && (gamma == 1 || gamma == 2)) {}

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real pos_weight) const {
    // The same branches for all elements
    return weighted(t, kHasPosWeight || smoothing != 0 ? focused<true>(x, t, pos_weight)
                                                       : focused<false>(x, t, pos_weight));
  }

  // The same for the usual numbers, without these branches
  struct Usual;
  FUSED_BCE_INLINE bool is_usual() const { return by_products && gamma == 2 && smoothing == 0; }

 private:
  template <class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> weighted(Real t, LossAndGrad<Real> r) const {
    const Real w = number<Real>(of_positives) * t + number<Real>(of_negatives) * (Real(1) - t);
    return {w * r.loss, w * r.grad};
  }

  static FUSED_BCE_INLINE double power_of_minus_1_to(double gamma, double gamma_neg) {
    const int whole = static_cast<int>(gamma);  // it is at most 1e6
    if (gamma != gamma_neg || gamma != whole) return NAN;
    return whole % 2 == 0 ? 1 : -1;
  }

  // kOwnEntropy: cross entropy has a pos_weight, or a target of its own.
  template <bool kOwnEntropy, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> focused(Real x, Real t, Real pos_weight) const {
    if (plain && smoothing == 0) return bce.evaluate<kOwnEntropy>(x, t, pos_weight);
    return by_products ? focused<kOwnEntropy, true>(x, t, pos_weight)
                       : focused<kOwnEntropy, false>(x, t, pos_weight);
  }

  template <class Real>
  FUSED_BCE_INLINE Real smoothed(Real t) const {
    return fma(number<Real>(1 - smoothing), t, number<Real>(smoothing / 2));
  }

  // kGamma: gamma, or 0 if it is not known when this is compiled
  template <bool kOwnEntropy, bool kByProducts, int kGamma = 0, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> focused(Real x, Real t, Real pos_weight) const {
    const Real zero(0), one(1);
    const Real most(Precision<typename Real::Scalar>::kLargestExponent);
    const auto [a, e, c, sp] = logistic<kByProducts>(x);
    const Real u = one - t;
    const Real q = select(sign_bit(x), t, u);
    const Real l = select(sign_bit(x), u, t);
    // As in bce.h
    const Real of_positive = kOwnEntropy ? pos_weight * smoothed(t) : t;
    const Real of_negative = kOwnEntropy ? smoothed(u) : u;
    const Real share = kOwnEntropy ? select(sign_bit(x), of_positive, of_negative) : q;
    const Real both = of_positive + of_negative;
    const Real ce = add_vanishing_product(a, share, kOwnEntropy ? both * sp : sp);
    const Real slope = kOwnEntropy ? share - both * c : q - c;

    if constexpr (kByProducts) {
      const Real m = fma(q, one - c, l * c);
      const Real g = kGamma ? Real(kGamma) : number<Real>(gamma);
      const Real m_less = kGamma == 2 ? m : select(g == Real(2), m, one);  // m^(g - 1)
      const Real c_ce = vanishing_product(c, ce);
      const Real turned = fma(m, slope, g * (q - l) * (one - c) * c_ce);
      // Without an entropy of its own, m is 0 only where ce is: m^2, which underflows first, must
      // not meet an infinite ce.
      const Real focused_ce = kOwnEntropy ? vanishing_product(m_less * m, ce) : m_less * (m * ce);
      return {focused_ce, flip_sign(m_less * turned, x)};
    } else {
      const Real g = number<Real>(gamma) * t + number<Real>(gamma_neg) * u;
      const Real g_rest = rest<Real>(gamma) * t + rest<Real>(gamma_neg) * u;
      const Real r = fma(l, e, q);  // m = r / (1 + e)
      // 0 times infinity. A ce that does not vanish has a use for more of a.
      const Real bounded = at_most(a, kOwnEntropy ? Real(1e9) : most);
      const Real size =
          power_of(Exponent<Real>{g, g_rest}, select(q == zero, bounded, minus_log(abs(r))), sp);
      const Real power = select(zero > r, size * number<Real>(power_of_minus_1), size);
      if constexpr (kOwnEntropy) {
        const Real ratio = select(q == zero, one - c, c / r);
        const Real turned = (q - l) * vanishing_product(ratio, ce);
        return {vanishing_product(power, ce),
                flip_sign(vanishing_product(power, slope + vanishing_product(g, turned)), x)};
      } else {
        const Real turned =
            select(q == zero, (c - one) * sp, (q - l) * vanishing_product(c, ce) / r);
        return {vanishing_product(power, ce), flip_sign(power * fma(g, turned, slope), x)};
      }
    }
  }
};

struct SigmoidFocal::Usual {
  SigmoidFocal formula;

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real pos_weight) const {
    return formula.weighted(t, formula.focused<kHasPosWeight, true, 2>(x, t, pos_weight));
  }
};

}  // namespace fused_bce
