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
using OptionalIndex = std::optional<int64_t>;

// logits, target, weight, pos_weight, reduction, dtype of the loss, label_smoothing, ignore_index,
// divisor. The dtype is that of the target if absent, or of the logits if the target is of
// integers. The divisor of mean is the number of targets other than ignore_index if absent.
using LossSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, OptionalDtype, double,
                                 OptionalIndex, const OptionalTensor&);
// The same; returns the loss and the gradient of the logits for grad_loss = 1.
using LossAndGradSignature = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
    OptionalDtype, double, OptionalIndex, const OptionalTensor&);
// grad_loss, then the same but for the dtype; returns the gradient of the logits.
using GradSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, int64_t, double,
                                 OptionalIndex, const OptionalTensor&);
// target, ignore_index; returns how many elements are not that, a float64 number.
using CountSignature = at::Tensor(const at::Tensor&, int64_t);
// grad_logits *= grad_loss, one number or one for each element
using ScaleSignature = void(at::Tensor&, const at::Tensor&);

void register_ops();
void register_autograd();

}  // namespace fused_bce
