#include "composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>

#include <cmath>
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

// Whether masks are needed for what is infinite or underflows. In eager mode on the CPU, where such
// a mask takes as long as three logarithms, the logits are asked first.
bool may_be_extreme(const Tensor& x) {
  const bool readable = x.is_cpu() && x.sym_numel() > 0 && !at::isTensorSubclassLike(x) &&
                        !at::tracer::impl::is_dispatch_enabled();
  return !readable || !(x.abs().amax().item<double>() < 87);  // exp(-87) is a normal number
}

struct FocalParameters {
  double alpha, gamma, gamma_neg;

  explicit FocalParameters(const Operands& o)
      : alpha(o.parameters[0]), gamma(o.parameters[1]), gamma_neg(o.parameters[2]) {}
};

// Where present they take the place of the numbers.
struct FocalTensors {
  OptionalTensor alpha, gamma, gamma_neg;
};

// The terms of formulas/focal.h in its notation, and so that all of their derivatives are finite
// and right in the tails: c and sp are functions of -|x|.
struct FocalTerms {
  FocalParameters focal;
  FocalTensors tensors;
  bool same_exponents, may_be_extreme;
  Tensor t;
  Tensor side;  // 1 for a negative logit, else -1
  Tensor b;     // -|x|, but for its slope at 0
  Tensor q, c, ce, m;

  explicit FocalTerms(const Operands& o, const FocalTensors& given = {})
      : focal(o),
        tensors(given),
        same_exponents(!tensors.gamma_neg && (tensors.gamma || focal.gamma == focal.gamma_neg)),
        t(smoothed_target_of(o)) {
    const Tensor x = logits_of(o);
    may_be_extreme = fused_bce::may_be_extreme(x.detach());
    // No comparison: on the CPU a mask costs as much as ten products.
    side = at::rsub(x.detach().sign(), -0.5).sign();
    b = x * side;
    // t for a negative logit, else 1 - t, to the last bit
    q = at::addcmul(t, at::clamp_max(side, 0), at::rsub(t, 1, 2), -1);
    // The loss of an infinite logit on the side of its target is 0.
    if (may_be_extreme) b = b.masked_fill((q == 0).logical_and(b.isinf()), kVanishing);
    ce = at::addcmul(at::softplus(b), b, q, -1);
    c = at::sigmoid(b);
    m = at::addcmul(q + c, c, q, -2);
    if (may_be_extreme) m = m.masked_fill(m == 0, smallest_normal(m.scalar_type()));
  }

  static constexpr double kVanishing = -1e4;  // of which the exponential is 0

  static double smallest_normal(at::ScalarType type) {
    return type == at::kDouble ? std::numeric_limits<double>::min()
                               : std::numeric_limits<float>::min();
  }

  // In this order backward frees most before it needs most.
  Tensor losses() && {
    const Tensor power = this->power();
    const Tensor weighted_ce = weighted(ce);
    ce.reset();
    return power * weighted_ce;
  }

  // times w
  Tensor weighted(const Tensor& y) const {
    if (tensors.alpha) {
      const Tensor& alpha = *tensors.alpha;
      const Tensor w = t * alpha + at::rsub(t, 1) * at::rsub(alpha, 1);
      return y * at::where(alpha >= 0, w, 1);
    }
    if (focal.alpha < 0) return y;
    Tensor w = at::rsub(t, 1) * (1 - focal.alpha);
    w = at::add(w, t, focal.alpha);
    return y * w;
  }

  // m^g
  Tensor power() const {
    if (same_exponents && tensors.gamma) {
      // It may be a whole number: a negative m has a power then.
      const Tensor sign = at::where(m < 0, at::pow(-1, tensors.gamma->detach()), 1);
      return at::exp(times_exponent(m.abs().log())) * sign;
    }
    // Other powers of m have poles at 0.
    const bool whole = focal.gamma >= 0 && focal.gamma == std::floor(focal.gamma);
    return same_exponents && whole ? m.pow(focal.gamma) : at::exp(times_exponent(m.log()));
  }

  Tensor times_exponent(const Tensor& y) const {
    if (same_exponents) return tensors.gamma ? y * *tensors.gamma : y * focal.gamma;
    const Tensor of_t = tensors.gamma ? t * *tensors.gamma : t * focal.gamma;
    const Tensor u = at::rsub(t, 1);
    return y * (of_t + (tensors.gamma_neg ? u * *tensors.gamma_neg : u * focal.gamma_neg));
  }

  // side w m^g (c - q + g (1 - 2 q) c (1 - c) ce / m), where for a hard target c is m or 1 - m, and
  // the limit of c ce at an infinite logit is 0.
  Tensor slope_by_logit() const {
    const Tensor finite = may_be_extreme ? ce.masked_fill(b.isinf(), 0) : ce;
    const Tensor turned = at::rsub(q, 1, 2) * at::rsub(c, 1) * (c / m) * finite;
    return side * power() * weighted(c - q + times_exponent(turned));
  }

  Tensor slope_by_target() const {
    Tensor slope = weighted(side * (times_exponent(at::rsub(c, 1, 2) * (ce / m)) - b));
    if (!same_exponents) slope = slope + weighted(m.log() * ce) * (focal.gamma - focal.gamma_neg);
    if (focal.alpha >= 0) slope = slope + ce * (2 * focal.alpha - 1);
    return power() * slope;
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
  if (o.formula == kFormulaId<SigmoidFocal>) return FocalTerms(o).slope_by_target();
  const Tensor x = logits_of(o);
  if (!o.pos_weight) return -x;
  return at::log_sigmoid(-x) - widened(*o.pos_weight, o) * at::log_sigmoid(x);
}

void check_composite(const Operands& o) {
  const Tensor &logits = o.logits, &target = o.target;
  TORCH_CHECK_VALUE(target.sym_sizes() == logits.sym_sizes(), "Target size (torch.Size(",
                    target.sym_sizes(), ")) must be the same as input size (torch.Size(",
                    logits.sym_sizes(), "))");
  TORCH_CHECK_NOT_IMPLEMENTED(logits.is_floating_point(), "inputs must be of floats, not ",
                              logits.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(!target.is_complex(), "targets must be real, not ",
                              target.scalar_type());
  TORCH_CHECK(!o.weight || !o.weight->is_complex(), "weight must be real, not ",
              o.weight->scalar_type());
}

Tensor losses_of(const Operands& o, const FocalTensors& tensors) {
  if (o.formula == kFormulaId<SigmoidFocal>) return FocalTerms(o, tensors).losses();
  OptionalTensor pos_weight;
  if (o.pos_weight) pos_weight = widened(*o.pos_weight, o);
  return at::binary_cross_entropy_with_logits(logits_of(o), smoothed_target_of(o), {}, pos_weight,
                                              at::Reduction::None);
}

Tensor reduced(const Tensor& losses, const Operands& o) {
  if (o.reduction == at::Reduction::None) return losses;
  if (o.reduction == at::Reduction::Mean && o.divisor)
    return losses.sum() / o.divisor->masked_fill(*o.divisor == 0, 1);
  if (o.reduction == at::Reduction::Mean && !o.ignores()) return losses.mean();
  if (o.reduction == at::Reduction::Mean)
    return losses.sum() /
           zero_where_ignored(at::ones_like(o.target, at::kLong), o).sum().clamp_min(1);
  return losses.sum();
}

}  // namespace

Tensor composite_loss(const Operands& o, const OptionalTensor& first, const OptionalTensor& second,
                      const OptionalTensor& third, const OptionalTensor&) {
  check_composite(o);
  Tensor losses = losses_of(o, {first, second, third});
  if (o.weight) losses = losses * widened(*o.weight, o).expand_symint(o.logits.sym_sizes());
  return reduced(zero_where_ignored(losses, o), o).to(dtype_of_loss(o));
}

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
