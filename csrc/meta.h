// What the operators return but for the numbers: dtypes, sizes, strides. For tensors that have
// none, in a trace for example.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "head/linear_operands.h"
#include "ops.h"

namespace fused_bce::meta {

inline at::Tensor forward(const Operands& o) {
  TORCH_CHECK_VALUE(o.target.sym_sizes() == o.logits.sym_sizes(), "Target size (",
                    o.target.sym_sizes(), ") must be the same as input size (",
                    o.logits.sym_sizes(), ")");
  // Raises where a weight does not broadcast into the logits.
  if (o.pos_weight) o.pos_weight->expand_symint(o.logits.sym_sizes());
  if (o.weight) o.weight->expand_symint(o.logits.sym_sizes());
  const at::ScalarType type = dtype_of_loss(o);
  if (o.reduction == at::Reduction::None)
    return at::empty_like(o.target, o.target.options().dtype(type));
  return at::empty({}, o.logits.options().dtype(type));
}

inline std::tuple<at::Tensor, at::Tensor> forward_with_grad(const Operands& o) {
  return {meta::forward(o), at::empty_like(o.logits)};
}

inline at::Tensor backward(const Operands& o, const at::Tensor&) {
  return at::empty_like(o.logits);
}

inline at::Tensor count_unignored(const at::Tensor& target, OptionalIndex, bool) {
  return at::empty({}, target.options().dtype(at::kDouble));
}

inline void scale_(at::Tensor&, const at::Tensor&, bool) {}

inline LinearLoss linear_loss(const LinearOperands& o, Wanted wanted,
                              const OptionalTensor& grad_loss) {
  check_linear(o, grad_loss);
  const auto options = o.input.options();
  const auto sum = [&](bool of, const at::Tensor& like) {
    const auto wide = options.dtype(o.wide_dtype());
    return of ? at::empty_symint(like.sym_sizes(), wide) : at::empty({0}, wide);
  };
  return {at::empty({}, options.dtype(o.loss_dtype())), sum(wanted[0], o.input),
          wanted[1] ? at::empty_like(o.linear_weight) : at::empty({0}, o.linear_weight.options()),
          sum(wanted[2], o.linear_bias.value_or(o.input))};
}

}  // namespace fused_bce::meta
