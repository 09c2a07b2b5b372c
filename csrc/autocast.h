// Autocast runs this loss in float32. The kernel widens as it reads, so that only the dtype of the
// result is set, and no operand is cast in memory.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "ops.h"

namespace fused_bce {

template <c10::DeviceType device, class... Rest>
at::Tensor autocast(const at::Tensor& logits, const at::Tensor& target,
                    const OptionalTensor& weight, const OptionalTensor& pos_weight,
                    int64_t reduction, OptionalDtype, Rest... rest) {
  static const auto loss =
      c10::Dispatcher::singleton().findSchemaOrThrow(kLossName, "").typed<LossSignature>();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const OptionalDtype dtype = at_least_float(dtype_of_loss(logits, target));
  return loss.call(logits, target, weight, pos_weight, reduction, dtype, rest...);
}

}  // namespace fused_bce
