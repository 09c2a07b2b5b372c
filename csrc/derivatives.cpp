#include "derivatives.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/isinf.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>

#include <limits>

#include "formulas/formulas.h"

namespace fused_bce {

using at::Tensor;

namespace {

// In the dtype of the arithmetic: half types would lose digits, and a float64 number times a
// float32 array is float32.
Tensor widened(const Tensor& t, const Operands& o) {
  const bool in_double = o.target.scalar_type() == at::kDouble;
  return t.to(at_least_float(in_double ? at::kDouble : o.logits.scalar_type()));
}

// grad_loss * weight, over N for mean
Tensor factor_of(const Tensor& grad_loss, const Operands& o) {
  Tensor factor = widened(grad_loss, o);
  if (o.reduction == at::Reduction::Mean)
    factor = o.divisor ? factor / o.divisor->masked_fill(*o.divisor == 0, 1)
                       : factor / at::Scalar(o.logits.sym_numel());
  return o.weight ? factor * widened(*o.weight, o) : factor;
}

// What is ignored is taken out of operands as well as of results, for 0 times the derivative at nan
// is nan.
Tensor zero_where_ignored(Tensor t, const Operands& o) {
  if (o.ignore_index) t = t.masked_fill(o.target == *o.ignore_index, 0);
  if (o.ignore_nan) t = t.masked_fill(o.target.isnan(), 0);
  return t;
}

Tensor logits_of(const Operands& o) { return zero_where_ignored(widened(o.logits, o), o); }

Tensor smoothed_target_of(const Operands& o) {
  Tensor t = zero_where_ignored(widened(o.target, o), o);
  if (!o.label_smoothing) return t;
  return t * at::rsub(*o.label_smoothing, 1) + *o.label_smoothing / 2;
}

struct Focal {
  double alpha, gamma, gamma_neg;

  explicit Focal(const Operands& o)
      : alpha(o.parameters[0]), gamma(o.parameters[1]), gamma_neg(o.parameters[2]) {}
};

// The terms of formulas/focal.h, in the same notation, and so that all of their derivatives are
// finite: for a hard target m is exp(-a) times `base`, whose powers have no pole.
struct FocalTerms {
  Tensor t, u, negative, a, q, l, e, s, hard, ce, g, w;
  Tensor size, base;  // m = size base
  Tensor power;       // m^g

  explicit FocalTerms(const Operands& o) : t(smoothed_target_of(o)), u(at::rsub(t, 1)) {
    const Focal focal(o);
    const Tensor x = logits_of(o);
    negative = x < 0;
    a = at::where(negative, -x, x);  // |x|, but for its slope at 0
    q = at::where(negative, t, u);
    l = at::where(negative, u, t);
    e = at::exp(-a);
    s = at::reciprocal(1 + e);  // sigmoid(a), whose derivative would be s (1 - s)
    hard = q == 0;
    // 0 at an infinite logit on the side of its target
    ce = a.masked_fill(hard.logical_and(a.isinf()), 0) * q + at::log1p(e);
    g = t * focal.gamma + u * focal.gamma_neg;
    w = focal.alpha < 0 ? at::ones_like(t) : t * focal.alpha + u * (1 - focal.alpha);

    const Tensor bounded = at::clamp_max(a, largest_exponent(x.scalar_type()));
    const auto if_hard = [&](const Tensor& value) {
      return value.masked_fill(hard.logical_not(), 0);
    };
    size = at::exp(-if_hard(bounded));
    // q is 0 where it is hard; this is for the derivative by the target.
    base = s * at::where(hard, l + if_hard(q) * at::exp(bounded), q + l * e);
    const bool same = focal.gamma == focal.gamma_neg;
    if (!same) base = base.masked_fill(base < 0, std::numeric_limits<double>::quiet_NaN());
    power = (same ? base.pow(focal.gamma) : base.pow(g)) * at::exp(-g * if_hard(bounded));
  }

  static double largest_exponent(at::ScalarType type) {
    return type == at::kDouble ? Precision<double>::kLargestExponent
                               : Precision<float>::kLargestExponent;
  }

  Tensor with_sign_of_logits(const Tensor& y) const { return at::where(negative, -y, y); }

  // sigmoid(x) sigmoid(-x) / m is e s^2 / m, and the e of a hard target cancels. Else the limit of
  // e ce is 0.
  Tensor slope_by_logit() const {
    const Tensor e_ce = at::where(hard, ce, e * ce.masked_fill(a.isinf(), 0));
    return w * power * with_sign_of_logits(g * (q - l) * s * s * e_ce / base + s * (q - l * e));
  }

  Tensor slope_by_target(const Focal& focal) const {
    const Tensor m_by_target = with_sign_of_logits(s * (e - 1));
    Tensor slope = w * (g * m_by_target * (ce / (size * base)) - with_sign_of_logits(a));
    if (focal.gamma != focal.gamma_neg)
      slope = slope + (focal.gamma - focal.gamma_neg) * w * (base.log() + size.log()) * ce;
    if (focal.alpha >= 0) slope = slope + (2 * focal.alpha - 1) * ce;
    return power * slope;
  }
};

// Written so that hard targets cancel nothing: (1 - t) sigmoid(x) - p t sigmoid(-x).
Tensor slope_by_logit(const Operands& o) {
  if (o.formula == kFormulaId<SigmoidFocal>) return FocalTerms(o).slope_by_logit();
  const Tensor x = logits_of(o);
  const Tensor t = smoothed_target_of(o);
  const Tensor positive = o.pos_weight ? widened(*o.pos_weight, o) * t : t;
  return at::rsub(t, 1) * at::sigmoid(x) - positive * at::sigmoid(-x);
}

// p softplus(-x) - softplus(x), which is -x without pos_weight
Tensor slope_by_target(const Operands& o) {
  if (o.formula == kFormulaId<SigmoidFocal>) return FocalTerms(o).slope_by_target(Focal(o));
  const Tensor x = logits_of(o);
  if (!o.pos_weight) return -x;
  return at::log_sigmoid(-x) - widened(*o.pos_weight, o) * at::log_sigmoid(x);
}

}  // namespace

Tensor grad_of_logits(const Tensor& grad_loss, const Operands& o) {
  const Tensor grad = slope_by_logit(o) * factor_of(grad_loss, o);
  return zero_where_ignored(grad, o).to(o.logits.scalar_type());
}

Tensor grad_of_target(const Tensor& grad_loss, const Operands& o) {
  Tensor grad = slope_by_target(o) * factor_of(grad_loss, o);
  // What smoothing leaves of the target
  if (o.label_smoothing) grad = grad * at::rsub(*o.label_smoothing, 1);
  return zero_where_ignored(grad, o).to(o.target.scalar_type());
}

}  // namespace fused_bce
