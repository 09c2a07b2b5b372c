#include <ATen/TensorOperators.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>

#include "terms.h"

namespace fused_bce {

using at::Tensor;

// By torch's loss, whose errors are those for weights.
template <>
Tensor Composite<BinaryCrossEntropy>::losses(const Operands& o, const ParameterTensors&) {
  const auto widened_if_any = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(widened(*t, o)) : std::nullopt;
  };
  return at::binary_cross_entropy_with_logits(logits_of(o), smoothed_target_of(o),
                                              widened_if_any(o.weight),
                                              widened_if_any(o.pos_weight), at::Reduction::None);
}

// Written so that hard targets cancel nothing: (1 - t) sigmoid(x) - p t sigmoid(-x).
template <>
Tensor Composite<BinaryCrossEntropy>::slope_by_logit(const Operands& o) {
  const Tensor x = logits_of(o);
  const Tensor t = smoothed_target_of(o);
  return at::rsub(t, 1) * at::sigmoid(x) - times_pos_weight(t, o) * at::sigmoid(-x);
}

// p softplus(-x) - softplus(x), which is -x without pos_weight
template <>
Tensor Composite<BinaryCrossEntropy>::slope_by_target(const Operands& o) {
  const Tensor x = logits_of(o);
  if (!o.pos_weight) return -x;
  return at::log_sigmoid(-x) - times_pos_weight(at::log_sigmoid(x), o);
}

}  // namespace fused_bce
