// The derivatives in torch's own operations, none of them in place, hence differentiable, batchable
// and traceable.
#pragma once

#include "ops.h"

namespace fused_bce {

at::Tensor grad_of_logits(const at::Tensor& grad_loss, const Operands& operands);
at::Tensor grad_of_target(const at::Tensor& grad_loss, const Operands& operands);

}  // namespace fused_bce
