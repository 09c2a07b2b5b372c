// The operators fused_bce::*. Importing the module registers them; they are not static
// initialisers, so that the version of torch is compared before torch is called.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fused_bce {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

// logits, target, weight, pos_weight, reduction, dtype of the loss (that of the target if absent),
// divisor of mean (the number of logits if absent)
using LossSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, OptionalDtype,
                                 const OptionalTensor&);
// The same; returns the loss and the gradient of the logits for grad_loss = 1.
using LossAndGradSignature = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
    OptionalDtype, const OptionalTensor&);
// grad_loss, logits, target, weight, pos_weight, reduction, divisor; returns the gradient of the
// logits.
using GradSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, int64_t,
                                 const OptionalTensor&);
// grad_logits *= grad_loss, one number or one for each element
using ScaleSignature = void(at::Tensor&, const at::Tensor&);

void register_ops();
void register_autograd();

}  // namespace fused_bce
