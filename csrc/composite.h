// The losses and their derivatives as ATen operations, none of them in place, hence differentiable,
// batchable and traceable.
#pragma once

#include <array>

#include "ops.h"

namespace fused_bce {

// In the place of a formula's parameters, in their order: learnable ones, one for each element, or
// those that change from call to call in compiled code.
using ParameterTensors = std::array<OptionalTensor, kMostParameters>;

at::Tensor composite_loss(const Operands& operands, const OptionalTensor& first,
                          const OptionalTensor& second, const OptionalTensor& third,
                          const OptionalTensor& fourth);
at::Tensor grad_of_logits(const at::Tensor& grad_loss, const Operands& operands);
at::Tensor grad_of_target(const at::Tensor& grad_loss, const Operands& operands);

}  // namespace fused_bce
