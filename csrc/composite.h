// The losses and their derivatives as ATen operations, none of them in place, hence differentiable,
// batchable and traceable.
#pragma once

#include "ops.h"

namespace fused_bce {

// The tensors take the place of the formula's parameters, in their order: they are learnable, one
// for each element, or change from call to call in compiled code.
at::Tensor composite_loss(const Operands& operands, const OptionalTensor& first,
                          const OptionalTensor& second, const OptionalTensor& third,
                          const OptionalTensor& fourth);
at::Tensor grad_of_logits(const at::Tensor& grad_loss, const Operands& operands);
at::Tensor grad_of_target(const at::Tensor& grad_loss, const Operands& operands);

}  // namespace fused_bce
