// The operators fused_bce::* and what they are made of. schemas.cpp has their names and schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fused_bce {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;
using OptionalIndex = std::optional<int64_t>;

constexpr const char* kLossName = "fused_bce::binary_cross_entropy_with_logits";

// logits, target, weight, pos_weight, reduction, dtype of the loss, label_smoothing, ignore_index,
// ignore_nan, divisor, recompute. The dtype is that of the target if absent, or of the logits if
// the target is of integers. label_smoothing is a number, in a tensor because a float would become
// a constant of a compiled graph. The divisor of mean is the number of targets that are not ignored
// if absent. recompute is for autograd: whether the gradient waits for backward.
using LossSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, OptionalDtype,
                                 const OptionalTensor&, OptionalIndex, bool, const OptionalTensor&,
                                 bool);
// The same but for recompute; returns the loss and the gradient of the logits for grad_loss = 1.
using LossAndGradSignature = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
    OptionalDtype, const OptionalTensor&, OptionalIndex, bool, const OptionalTensor&);
// grad_loss, then the same but for the dtype; returns the gradient of the logits.
using GradSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, int64_t,
                                 const OptionalTensor&, OptionalIndex, bool, const OptionalTensor&);
// target, ignore_index, ignore_nan; returns how many targets are not ignored, a float64 number.
using CountSignature = at::Tensor(const at::Tensor&, OptionalIndex, bool);
// grad_logits *= grad_loss, one number or one for each element; whether a 0 stays 0 whatever that
// is.
using ScaleSignature = void(at::Tensor&, const at::Tensor&, bool);

// losses.cpp: on dense operands of the CPU and, with CUDA, of a GPU.
LossSignature forward;
LossAndGradSignature forward_with_grad;
GradSignature backward;
CountSignature count_kept;
ScaleSignature scale_;

// autograd.cpp
LossSignature autograd;
// What backward is in torch's operations, hence differentiable.
GradSignature differentiable_backward;
// stored * grad_loss, rounded as by scale_, in torch's operations.
at::Tensor scaled_by_torch(const at::Tensor& stored, const at::Tensor& grad_loss, bool zero_stays);

inline bool is_integer(at::ScalarType type) {
  return at::isIntegralType(type, /*includeBool=*/true);
}

// That of the loss, if nobody asks for another.
inline at::ScalarType dtype_of_loss(const at::Tensor& logits, const at::Tensor& target) {
  return is_integer(target.scalar_type()) ? logits.scalar_type() : target.scalar_type();
}

inline at::ScalarType at_least_float(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Importing the module does this; it is no static initialiser, so that the version of torch is
// compared before torch is called.
void register_ops();

}  // namespace fused_bce
