// What backward makes of a gradient that was computed in forward, for a grad_loss of 1.
#pragma once

#include "ops.h"

namespace fused_bce {

bool has_tangent(const at::Tensor& t);
// Under vmap and forward-mode differentiation a number is more than the numbers in memory.
bool is_transformed(const at::Tensor& t);

// stored * grad_loss, in place unless there is another reference to it, as in compiled autograd.
// zero_stays: a 0 stays 0 whatever grad_loss is.
at::Tensor scaled(at::Tensor stored, const at::Tensor& grad_loss, bool zero_stays);
// The same, rounded as by scale_, as ATen operations
at::Tensor scaled_by_torch(const at::Tensor& stored, const at::Tensor& grad_loss, bool zero_stays);

}  // namespace fused_bce
