#include "composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rsub.h>

#include "composite/terms.h"

namespace fused_bce {

using at::Tensor;

namespace {

Tensor over_divisor(const Tensor& t, const Tensor& divisor) {
  return t / divisor.masked_fill(divisor == 0, 1);
}

// grad_loss * weight, over N for mean
Tensor factor_of(const Tensor& grad_loss, const Operands& o) {
  Tensor factor = widened(grad_loss, o);
  if (o.reduction == at::Reduction::Mean)
    factor =
        o.divisor ? over_divisor(factor, *o.divisor) : factor / at::Scalar(o.logits.sym_numel());
  return o.weight ? factor * widened(*o.weight, o) : factor;
}

Tensor zero_where_ignored(Tensor t, const Operands& o) {
  if (o.ignore_index) t = t.masked_fill(o.target == *o.ignore_index, 0);
  if (o.ignore_nan) t = t.masked_fill(o.target.isnan(), 0);
  return t;
}

void check_composite(const Operands& o) {
  const Tensor &logits = o.logits, &target = o.target;
  TORCH_CHECK_VALUE(target.sym_sizes() == logits.sym_sizes(), "Target size (torch.Size(",
                    target.sym_sizes(), ")) must be the same as input size (torch.Size(",
                    logits.sym_sizes(), "))");
  TORCH_CHECK_NOT_IMPLEMENTED(logits.is_floating_point(), "logits must be of floats, not ",
                              logits.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(!target.is_complex(), "targets must be real, not ",
                              target.scalar_type());
  TORCH_CHECK(!o.weight || !o.weight->is_complex(), "weight must be real, not ",
              o.weight->scalar_type());
}

Tensor reduced(const Tensor& losses, const Operands& o) {
  if (o.reduction == at::Reduction::None) return losses;
  if (o.reduction != at::Reduction::Mean) return losses.sum();
  if (o.divisor) return over_divisor(losses.sum(), *o.divisor);
  if (!o.ignores()) return losses.mean();
  return losses.sum() /
         zero_where_ignored(at::ones_like(o.target, at::kLong), o).sum().clamp_min(1);
}

}  // namespace

Tensor widened(const Tensor& t, const Operands& o) {
  const bool in_double = o.target.scalar_type() == at::kDouble;
  return t.to(at_least_float(in_double ? at::kDouble : o.logits.scalar_type()));
}

Tensor logits_of(const Operands& o) { return zero_where_ignored(widened(o.logits, o), o); }

Tensor smoothed_target_of(const Operands& o) {
  Tensor t = zero_where_ignored(widened(o.target, o), o);
  if (!o.label_smoothing) return t;
  return t * at::rsub(*o.label_smoothing, 1) + *o.label_smoothing / 2;
}

Tensor times_weight(const Tensor& losses, const Operands& o) {
  return o.weight ? losses * widened(*o.weight, o).expand_symint(o.logits.sym_sizes()) : losses;
}

Tensor times_pos_weight(const Tensor& y, const Operands& o) {
  return o.pos_weight ? y * widened(*o.pos_weight, o) : y;
}

Tensor composite_loss(const Operands& o, const OptionalTensor& first, const OptionalTensor& second,
                      const OptionalTensor& third, const OptionalTensor& fourth) {
  check_composite(o);
  const Tensor losses = with_formula_at(o.formula, [&](auto formula) {
    return Composite<typename decltype(formula)::type>::losses(o, {first, second, third, fourth});
  });
  return reduced(zero_where_ignored(losses, o), o).to(dtype_of_loss(o));
}

Tensor grad_of_logits(const Tensor& grad_loss, const Operands& o) {
  const Tensor slope = with_formula_at(o.formula, [&](auto formula) {
    return Composite<typename decltype(formula)::type>::slope_by_logit(o);
  });
  return zero_where_ignored(slope * factor_of(grad_loss, o), o).to(o.logits.scalar_type());
}

Tensor grad_of_target(const Tensor& grad_loss, const Operands& o) {
  Tensor grad = with_formula_at(o.formula, [&](auto formula) {
    return Composite<typename decltype(formula)::type>::slope_by_target(o);
  });
  grad = grad * factor_of(grad_loss, o);
  // What smoothing leaves of the target
  if (o.label_smoothing) grad = grad * at::rsub(*o.label_smoothing, 1);
  return zero_where_ignored(grad, o).to(o.target.scalar_type());
}

}  // namespace fused_bce
