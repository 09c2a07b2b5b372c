// The asymmetric loss of multi-label classification: a focal loss whose negatives have an exponent
// of their own, and count as predicted rightly below a small probability.
#pragma once

#include <limits>

#include "../problem.h"
#include "elementary.h"
#include "logistic.h"
#include "loss_and_grad.h"
#include "powers.h"

namespace fused_bce {

//   loss = m^g ce      p = sigmoid(x), p_m = max(p - k, 0), k: clip, u = 1 - t, v = pos_weight t
//   ce = -v log(p) - u log(1 - p_m),  m = t (1 - p) + u p_m,  g = gamma_pos t + gamma_neg u
// (Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2021; soft targets as in their
// code.) In the terms of logistic.h, all probabilities are multiples of 1 / (1 + e):
//   p_m = n / (1 + e)      n = e - k - k e if x < 0 else 1 - k - k e, at least 0
//   1 - p_m = b / (1 + e)  b = 1 + e - n
//   m = r / (1 + e)        r = u n + (t if x < 0 else t e)
// so that with s = u where p > k, else 0, the slope of ce is s c / b - v (1 - p), and
//   grad = m^g (s c / b - v (1 - p) + g (s - t) c ce / r), the last term if the weight is not
//   detached
// Nothing cancels for hard targets, but p - k near 0, to the error of e. Nor is there an epsilon:
// -log(p) is a softplus, and -log(1 - p_m) is log1p(n / b), or where that is large, a logarithm of
// at most 1/2; without clip a softplus, too.
struct Asymmetric {
  static constexpr const char* kName = "asymmetric_loss";
  static constexpr ParameterTable<4> kParameters{{
      exponent("gamma_neg", "4"),
      exponent("gamma_pos", "1"),
      {"clip", "0.05", 0, 1},
      {"detach_weight", "0", 0, 1},
  }};
  static constexpr bool kTakesPosWeight = true;

  double gamma_neg, gamma_pos, clip;
  bool detaches_weight;

  FUSED_BCE_INLINE explicit Asymmetric(const Problem& p)
      : gamma_neg(p.parameters[0]),
        gamma_pos(p.parameters[1]),
        clip(p.parameters[2]),
        detaches_weight(p.parameters[3] != 0) {}

  template <bool kHasPosWeight, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> evaluate(Real x, Real t, Real pos_weight) const {
    const Real v = kHasPosWeight ? pos_weight * t : t;
    // The same branch for all elements
    return clip > 0 ? weighted<true>(x, t, v) : weighted<false>(x, t, v);
  }

 private:
  template <bool kClips, class Real>
  FUSED_BCE_INLINE LossAndGrad<Real> weighted(Real x, Real t, Real v) const {
    const Real zero(0), one(1);
    const auto [a, e, c, sp] = logistic<false>(x);
    const Real u = one - t;

    const Negative<Real> negative = kClips ? clipped(x, e, c) : unclipped(x, a, e, c, sp);
    const Real away = select(sign_bit(x), select(v == zero, zero, a), zero);
    const Real ce = fma(u, select(u == zero, zero, negative.loss), v * (away + sp));
    const Real not_p = select(sign_bit(x), one - c, c);
    const Real slope = fma(u, negative.slope, zero - v * not_p);

    const Exponent<Real> g = mixed_exponent(gamma_pos, gamma_neg, t);
    const Real r = fma(u, negative.n, select(sign_bit(x), t, t * e));
    // Where r is e, its logarithm is known. It is bounded: 0 times infinity
    const Real far = select(sign_bit(x), kClips ? one : t, u);
    const Real known = at_most(a, Real(Precision<typename Real::Scalar>::kLargestExponent));
    const auto [high, low] = minus_log_as_sum(r);
    const Sum<Real> minus_log_r{select(far == zero, known, high), select(far == zero, zero, low)};
    const Real power = power_of(g, minus_log_r, sp);

    // Below it c / r may be infinite, and the power of r is nearly 0, or its slope is.
    const Real smallest(std::numeric_limits<typename Real::Scalar>::min());
    const Real ratio = select(far == zero, one - c, select(smallest > r, zero, c / r));
    const Real turned = (select(negative.n == zero, zero, u) - t) * vanishing_product(ratio, ce);
    const Real through_weight = (detaches_weight ? zero : g.value) * turned;
    return {vanishing_product(power, ce), power * (slope + through_weight)};
  }

  // -log(1 - p_m) and its slope
  template <class Real>
  struct Negative {
    Real n, loss, slope;
  };

  template <class Real>
  static FUSED_BCE_INLINE Negative<Real> unclipped(Real x, Real a, Real e, Real c, Real sp) {
    const Real zero(0), one(1);
    return {select(sign_bit(x), e, one), select(sign_bit(x), zero, a) + sp,
            select(sign_bit(x), c, one - c)};
  }

  template <class Real>
  FUSED_BCE_INLINE Negative<Real> clipped(Real x, Real e, Real c) const {
    using P = Precision<typename Real::Scalar>;
    const Real zero(0), one(1), k = number<Real>(clip);
    const Real above = fma(zero - k, e, select(sign_bit(x), e, one) - k);
    const auto is_below = zero > above;
    const Real n = select(is_below, zero, above);
    const Real b = select(is_below, one + e, fma(k, e, select(sign_bit(x), one, e) + k));
    const Real odds = n / b;
    const Real not_p_m = b * (one / (one + e));
    const auto is_large = odds > one;
    const Real log1p = P::log1p(select(is_large, mantissa(not_p_m) - one, odds));
    const Real minus_log = fma(minus_exponent(not_p_m), Real(P::kLn2High),
                               fma(minus_exponent(not_p_m), Real(P::kLn2Low), zero - log1p));
    return {n, select(is_large, minus_log, log1p), select(is_below, zero, c / b)};
  }
};

}  // namespace fused_bce
