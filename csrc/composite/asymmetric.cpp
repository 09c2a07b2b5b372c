#include "../formulas/asymmetric.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>

#include "of_terms.h"

namespace fused_bce {

using at::Tensor;

// In the notation of formulas/asymmetric.h
template <>
struct Terms<Asymmetric> {
  NumberOrTensor gamma_neg, gamma_pos, clip;
  bool detaches_weight;
  bool clips;
  const Operands& operands;
  Tensor t, u, v;  // v: t times pos_weight
  Tensor p, not_p;
  Tensor p_m, is_above;  // p > clip, as 0 or 1
  Tensor m;
  Tensor of_positive, of_negative;  // their losses

  Terms(const Operands& o, const ParameterTensors& tensors)
      : gamma_neg(parameter(o, tensors, 0)),
        gamma_pos(parameter(o, tensors, 1)),
        clip(parameter(o, tensors, 2)),
        detaches_weight(o.parameters[3] != 0),
        clips(clip.tensor || clip.number > 0),
        operands(o),
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
    m = away_from_0(t * not_p + u * p_m);
    of_negative = clips ? -at::log1p(-p_m) : exact_softplus(x);
  }

  Tensor entropy() const {
    return vanishing_product(v, of_positive) + vanishing_product(u, of_negative);
  }

  Tensor entropy_by_logit() const {
    const Tensor negative = clips ? is_above * p * not_p / at::rsub(p_m, 1) : p;
    return u * negative - v * not_p;
  }

  Tensor exponent() const { return gamma_pos.times(t) + gamma_neg.times(u); }

  Tensor weight() const {
    const Tensor w = at::exp(exponent() * m.log());
    return detaches_weight ? w.detach() : w;
  }

  Tensor losses() const { return vanishing_product(weight(), entropy()); }

  Tensor slope_by_logit() const {
    Tensor slope = entropy_by_logit();
    if (!detaches_weight) {
      const Tensor turned = (u * is_above - t) * p * (not_p / m);
      slope = slope + exponent() * vanishing_product(turned, entropy());
    }
    return weight() * slope;
  }

  Tensor slope_by_target() const {
    Tensor slope = times_pos_weight(of_positive, operands) - of_negative;
    if (!detaches_weight) {
      const Tensor log_m = m.log();
      const Tensor of_exponent = gamma_pos.times(log_m) - gamma_neg.times(log_m);
      const Tensor of_base = exponent() * (not_p - p_m) / m;
      slope = slope + (of_exponent + of_base) * entropy();
    }
    return weight() * slope;
  }
};

template struct Composite<Asymmetric>;

}  // namespace fused_bce
