#include "stored_gradients.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include "operators.h"

namespace fused_bce {

using at::Tensor;

namespace {

// A float64 grad_loss is rounded first, as scale_ does: it would widen the product.
Tensor factor_for(const Tensor& stored, const Tensor& grad_loss) {
  return grad_loss.scalar_type() == at::kDouble ? grad_loss.to(at_least_float(stored.scalar_type()))
                                                : grad_loss;
}

}  // namespace

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

bool is_transformed(const Tensor& t) {
  constexpr c10::DispatchKeySet kBatched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return t.key_set().has_any(kBatched) || has_tangent(t);
}

Tensor scaled(Tensor stored, const Tensor& grad_loss, bool zero_stays) {
  const bool shared = stored.use_count() > 1;
  // A trace or a shard: as ATen operations, which compilers fuse and DTensor knows.
  if (stored.key_set().has_any(c10::python_ks))
    return shared || zero_stays ? scaled_by_torch(stored, grad_loss, zero_stays)
                                : stored.mul_(factor_for(stored, grad_loss));
  if (shared) stored = stored.clone();
  static const auto scale = find_operator<decltype(scale_)>("_scale_");
  scale.call(stored, grad_loss, zero_stays);
  return stored;
}

Tensor scaled_by_torch(const Tensor& stored, const Tensor& grad_loss, bool zero_stays) {
  const Tensor scaled = (stored * factor_for(stored, grad_loss)).to(stored.scalar_type());
  return zero_stays ? at::where(stored == 0, stored, scaled) : scaled;
}

}  // namespace fused_bce
