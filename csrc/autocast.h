// What autocast makes of the operators. It runs a loss in float32: the kernel widens as it reads,
// so that only the dtype of the result is set, and no operand is cast in memory.
#pragma once

#include <ATen/autocast_mode.h>

#include "head/linear_operands.h"
#include "operators.h"

namespace fused_bce {

template <class Loss, c10::DeviceType device>
at::Tensor autocast(const Operands& operands) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  Operands widened = operands;
  widened.dtype.reset();
  widened.dtype = at_least_float(dtype_of_loss(widened));
  return call_loss<Loss>(widened);
}

// A linear layer runs in the dtype of autocast unless it is of float64. The operator casts the
// weight block by block.
template <c10::DeviceType device>
at::Tensor linear_autocast(const LinearOperands& operands) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  LinearOperands cast = operands;
  if (cast.input.scalar_type() != at::kDouble)
    cast.dtype = at::autocast::get_autocast_dtype(device);
  return call_loss<Linear>(cast);
}

}  // namespace fused_bce
