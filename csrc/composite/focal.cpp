#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <limits>

#include "terms.h"

namespace fused_bce {

using at::Tensor;

namespace {

struct FocalParameters {
  double alpha, gamma, gamma_neg;

  explicit FocalParameters(const Operands& o)
      : alpha(o.parameters[0]), gamma(o.parameters[1]), gamma_neg(o.parameters[2]) {}
};

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

}  // namespace

template <>
Tensor Composite<SigmoidFocal>::losses(const Operands& o, const ParameterTensors& tensors) {
  const auto& [alpha, gamma, gamma_neg, none] = tensors;
  return times_weight(FocalTerms(o, {alpha, gamma, gamma_neg}).losses(), o);
}

template <>
Tensor Composite<SigmoidFocal>::slope_by_logit(const Operands& o) {
  return FocalTerms(o).slope_by_logit();
}

template <>
Tensor Composite<SigmoidFocal>::slope_by_target(const Operands& o) {
  return FocalTerms(o).slope_by_target();
}

}  // namespace fused_bce
