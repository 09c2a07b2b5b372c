#include "../formulas/asymmetric.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>

#include "terms.h"

namespace fused_bce {

using at::Tensor;

namespace {

// The terms of formulas/asymmetric.h in its notation
struct AsymmetricTerms {
  NumberOrTensor gamma_neg, gamma_pos, clip;
  bool detaches_weight;
  bool clips;
  Tensor t, u, v;  // v: t times pos_weight
  Tensor p, not_p;
  Tensor p_m, is_above;             // p > clip, as 0 or 1
  Tensor of_positive, of_negative;  // their losses

  explicit AsymmetricTerms(const Operands& o, const ParameterTensors& tensors = {})
      : gamma_neg(parameter(o, tensors, 0)),
        gamma_pos(parameter(o, tensors, 1)),
        clip(parameter(o, tensors, 2)),
        detaches_weight(o.parameters[3] != 0),
        clips(clip.tensor || clip.number > 0),
        t(smoothed_target_of(o)),
        u(at::rsub(t, 1)),
        v(times_pos_weight(t, o)) {
    const Tensor x = logits_of(o);
    const Tensor of_weight = bounded(x);
    p = at::sigmoid(of_weight);
    not_p = at::sigmoid(-of_weight);
    of_positive = exact_softplus(-x);
    p_m = clips ? (clip.tensor ? p - *clip.tensor : p - clip.number).clamp_min(0) : p;
    is_above = (p_m > 0).to(p.scalar_type());
    of_negative = clips ? -at::log1p(-p_m) : exact_softplus(x);
  }

  Tensor entropy() const {
    return vanishing_product(v, of_positive) + vanishing_product(u, of_negative);
  }

  Tensor entropy_by_logit() const {
    const Tensor negative = clips ? is_above * p * not_p / at::rsub(p_m, 1) : p;
    return u * negative - v * not_p;
  }

  // m
  Tensor base() const { return away_from_0(t * not_p + u * p_m); }

  Tensor exponent() const { return gamma_pos.times(t) + gamma_neg.times(u); }

  Tensor weight() const {
    const Tensor w = at::exp(exponent() * base().log());
    return detaches_weight ? w.detach() : w;
  }
};

}  // namespace

template <>
Tensor Composite<Asymmetric>::losses(const Operands& o, const ParameterTensors& tensors) {
  const AsymmetricTerms terms(o, tensors);
  return times_weight(vanishing_product(terms.weight(), terms.entropy()), o);
}

template <>
Tensor Composite<Asymmetric>::slope_by_logit(const Operands& o) {
  const AsymmetricTerms terms(o);
  Tensor slope = terms.entropy_by_logit();
  if (!terms.detaches_weight) {
    const Tensor turned =
        (terms.u * terms.is_above - terms.t) * terms.p * (terms.not_p / terms.base());
    slope = slope + terms.exponent() * vanishing_product(turned, terms.entropy());
  }
  return terms.weight() * slope;
}

template <>
Tensor Composite<Asymmetric>::slope_by_target(const Operands& o) {
  const AsymmetricTerms terms(o);
  Tensor slope = times_pos_weight(terms.of_positive, o) - terms.of_negative;
  if (!terms.detaches_weight) {
    const Tensor base = terms.base(), log = base.log();
    const Tensor of_exponent = terms.gamma_pos.times(log) - terms.gamma_neg.times(log);
    const Tensor of_base = terms.exponent() * (terms.not_p - terms.p_m) / base;
    slope = slope + (of_exponent + of_base) * terms.entropy();
  }
  return terms.weight() * slope;
}

}  // namespace fused_bce
