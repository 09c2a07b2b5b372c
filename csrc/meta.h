// What the operators return but for the numbers: dtypes, sizes, strides. For tensors that have
// none, in a trace for example.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops.h"

namespace fused_bce::meta {

inline at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& pos_weight,
                          int64_t reduction, OptionalDtype dtype) {
  TORCH_CHECK_VALUE(target.sym_sizes() == logits.sym_sizes(), "Target size (", target.sym_sizes(),
                    ") must be the same as input size (", logits.sym_sizes(), ")");
  // Raises where a weight does not broadcast into the logits.
  if (pos_weight) pos_weight->expand_symint(logits.sym_sizes());
  if (weight) weight->expand_symint(logits.sym_sizes());
  const at::ScalarType type = dtype.value_or(dtype_of_loss(logits, target));
  if (reduction == at::Reduction::None) return at::empty_like(target, target.options().dtype(type));
  return at::empty({}, logits.options().dtype(type));
}

// Parameters that decide nothing here are left to the pack.
template <class... Rest>
at::Tensor forward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype dtype,
                   Rest...) {
  return loss_of(logits, target, weight, pos_weight, reduction, dtype);
}

template <class... Rest>
std::tuple<at::Tensor, at::Tensor> forward_with_grad(
    const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype dtype, Rest...) {
  return {loss_of(logits, target, weight, pos_weight, reduction, dtype), at::empty_like(logits)};
}

template <class... Rest>
at::Tensor backward(const at::Tensor&, const at::Tensor& logits, Rest...) {
  return at::empty_like(logits);
}

inline at::Tensor count_kept(const at::Tensor& target, OptionalIndex, bool) {
  return at::empty({}, target.options().dtype(at::kDouble));
}

inline void scale_(at::Tensor&, const at::Tensor&, bool) {}

}  // namespace fused_bce::meta
