#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>

#include <cmath>

#include "of_terms.h"

namespace fused_bce {

using at::Tensor;

// In the notation of formulas/focal.h
template <>
struct Terms<SigmoidFocal> : LogisticTerms {
  NumberOrTensor alpha, gamma, gamma_neg, smoothing;
  bool same_exponents;
  const Operands& operands;
  bool has_own_entropy;  // its ce is not that of t
  Tensor m;

  Terms(const Operands& o, const ParameterTensors& tensors)
      : LogisticTerms(o),
        alpha(parameter(o, tensors, 0)),
        gamma(parameter(o, tensors, 1)),
        gamma_neg(parameter(o, tensors, 2)),
        smoothing(parameter(o, tensors, 3)),
        same_exponents(!gamma_neg.tensor && (gamma.tensor || gamma.number == gamma_neg.number)),
        operands(o),
        has_own_entropy(o.pos_weight || smoothing.tensor || smoothing.number != 0) {
    if (has_own_entropy)
      ce = at::addcmul((of_positive() + of_negative()) * at::softplus(b), b, far_share(), -1);
    m = at::addcmul(q + c, c, q, -2);
    if (may_be_extreme) m = away_from_0(m);
  }

  Tensor smoothed(const Tensor& y) const { return y + smoothing.times(at::rsub(y, 0.5)); }
  Tensor of_positive() const { return times_pos_weight(smoothed(t), operands); }
  Tensor of_negative() const { return smoothed(at::rsub(t, 1)); }
  // What q is of t
  Tensor far_share() const { return at::where(side > 0, of_positive(), of_negative()); }

  // side times the slope of ce
  Tensor entropy_by_logit() const {
    return has_own_entropy ? (of_positive() + of_negative()) * c - far_share() : c - q;
  }

  // side times the slope of ce
  Tensor entropy_by_target() const {
    if (!has_own_entropy) return -b;
    const Tensor slope = times_pos_weight(at::softplus(-x), operands) - at::softplus(x);
    return side * (slope - smoothing.times(slope));
  }

  // In this order backward frees most before it needs most.
  Tensor losses() && {
    const Tensor power = this->power();
    const Tensor weighted_ce = weighted(ce);
    ce.reset();
    return product(power, weighted_ce);
  }

  // times w
  Tensor weighted(const Tensor& y) const {
    if (alpha.tensor) {
      const Tensor w = alpha.times(t) + at::rsub(t, 1) * at::rsub(*alpha.tensor, 1);
      return y * at::where(*alpha.tensor >= 0, w, 1);
    }
    if (alpha.number < 0) return y;
    Tensor w = at::rsub(t, 1) * (1 - alpha.number);
    w = at::add(w, t, alpha.number);
    return y * w;
  }

  // m^g
  Tensor power() const {
    if (same_exponents && gamma.tensor) {
      // It may be a whole number: a negative m has a power then.
      const Tensor sign = at::where(m < 0, at::pow(-1, gamma.tensor->detach()), 1);
      return at::exp(times_exponent(m.abs().log())) * sign;
    }
    // Other powers of m have poles at 0.
    const bool whole = gamma.number >= 0 && gamma.number == std::floor(gamma.number);
    return same_exponents && whole ? m.pow(gamma.number) : at::exp(times_exponent(m.log()));
  }

  Tensor times_exponent(const Tensor& y) const {
    if (same_exponents) return gamma.times(y);
    return y * (gamma.times(t) + gamma_neg.times(at::rsub(t, 1)));
  }

  // side w m^g (c - q + g (1 - 2 q) c (1 - c) ce / m) for the entropy of t, where for a hard target
  // c is m or 1 - m.
  Tensor slope_by_logit() const {
    const Tensor turned = at::rsub(q, 1, 2) * at::rsub(c, 1) * (c / m) * finite_ce();
    return side * power() * weighted(entropy_by_logit() + times_exponent(turned));
  }

  Tensor slope_by_target() const {
    Tensor slope =
        weighted(side * (times_exponent(at::rsub(c, 1, 2) * (ce / m)) + entropy_by_target()));
    if (!same_exponents) slope = slope + weighted(m.log() * ce) * (gamma.number - gamma_neg.number);
    if (alpha.number >= 0) slope = slope + ce * (2 * alpha.number - 1);
    return power() * slope;
  }
};

template struct Composite<SigmoidFocal>;

}  // namespace fused_bce
