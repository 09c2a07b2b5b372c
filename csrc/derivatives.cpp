#include "derivatives.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>

#include <limits>

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

// The terms of formulas/focal.h, with p = sigmoid(x) and n = sigmoid(-x), of which neither is a
// difference.
struct FocalTerms {
  Tensor x, t, u, p, n, m, ce, w, g;
  Tensor power;  // m^g

  explicit FocalTerms(const Operands& o)
      : x(logits_of(o)),
        t(smoothed_target_of(o)),
        u(at::rsub(t, 1)),
        p(at::sigmoid(x)),
        n(at::sigmoid(-x)),
        // Not 0: a power below 1 has a pole there, and the logarithm.
        m(at::clamp_min(u * p + t * n, smallest_normal(x.scalar_type()))),
        ce(-(u * at::log_sigmoid(-x) + t * at::log_sigmoid(x))),
        w(o.focal.alpha < 0 ? at::ones_like(t) : t * o.focal.alpha + u * (1 - o.focal.alpha)),
        g(t * o.focal.gamma + u * o.focal.gamma_neg),
        power(o.focal.gamma == o.focal.gamma_neg ? m.pow(o.focal.gamma) : m.pow(g)) {}

  static double smallest_normal(at::ScalarType type) {
    return type == at::kDouble ? std::numeric_limits<double>::min()
                               : std::numeric_limits<float>::min();
  }

  Tensor slope_by_logit() const {
    return w * power * (g * (u - t) * (p * n / m) * ce + u * p - t * n);
  }

  Tensor slope_by_target(const Focal& focal) const {
    Tensor slope = w * (g * (n - p) * (ce / m) - x);
    if (focal.gamma != focal.gamma_neg)
      slope = slope + (focal.gamma - focal.gamma_neg) * w * m.log() * ce;
    if (focal.alpha >= 0) slope = slope + (2 * focal.alpha - 1) * ce;
    return power * slope;
  }
};

// Written so that hard targets cancel nothing: (1 - t) sigmoid(x) - p t sigmoid(-x).
Tensor slope_by_logit(const Operands& o) {
  if (o.formula == FormulaId::kSigmoidFocal) return FocalTerms(o).slope_by_logit();
  const Tensor x = logits_of(o);
  const Tensor t = smoothed_target_of(o);
  const Tensor positive = o.pos_weight ? widened(*o.pos_weight, o) * t : t;
  return at::rsub(t, 1) * at::sigmoid(x) - positive * at::sigmoid(-x);
}

// p softplus(-x) - softplus(x), which is -x without pos_weight
Tensor slope_by_target(const Operands& o) {
  if (o.formula == FormulaId::kSigmoidFocal) return FocalTerms(o).slope_by_target(o.focal);
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
