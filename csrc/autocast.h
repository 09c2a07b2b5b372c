// Autocast runs a loss in float32. The kernel widens as it reads, so that only the dtype of the
// result is set, and no operand is cast in memory.
#pragma once

#include <ATen/autocast_mode.h>

#include "operators.h"

namespace fused_bce {

template <class Operators, c10::DeviceType device>
at::Tensor autocast(const Operands& operands) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  Operands widened = operands;
  widened.dtype.reset();
  widened.dtype = at_least_float(dtype_of_loss(widened));
  return Operators::call_loss(widened);
}

}  // namespace fused_bce
