// The gradient wiring: what runs in forward, what in backward.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "ops.h"

namespace fused_bce {

using at::Tensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators are called through the dispatcher, where tracers and subclasses see them.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class... Arguments>
Tensor call_loss(const Arguments&... arguments) {
  static const auto loss = op<LossSignature>(kLossName);
  return loss.call(arguments...);
}

// What a backward starts from.
struct Saved {
  Tensor logits, target;
  OptionalTensor weight, pos_weight, label_smoothing, divisor;
  int64_t reduction;
  OptionalIndex ignore_index;
  bool ignore_nan;

  // In the dtype of the arithmetic: half types would lose digits, and a float64 number times a
  // float32 array is float32.
  Tensor widened(const Tensor& t) const {
    return t.to(
        at_least_float(target.scalar_type() == at::kDouble ? at::kDouble : logits.scalar_type()));
  }

  // grad_loss * weight, over N for mean
  Tensor factor(const Tensor& grad_loss) const {
    Tensor factor = widened(grad_loss);
    if (reduction == at::Reduction::Mean)
      factor = divisor ? factor / divisor->masked_fill(*divisor == 0, 1)
                       : factor / at::Scalar(logits.sym_numel());
    return weight ? factor * widened(*weight) : factor;
  }

  bool ignores() const { return ignore_index || ignore_nan; }

  Tensor zero_where_ignored(Tensor t) const {
    if (ignore_index) t = t.masked_fill(target == *ignore_index, 0);
    if (ignore_nan) t = t.masked_fill(target.isnan(), 0);
    return t;
  }

  // In torch's own operations, none of them in place, hence differentiable, batchable and
  // traceable. Written so that hard targets cancel nothing: (1 - t) sigmoid(x) - p t sigmoid(-x).
  // What is ignored is taken out of both as well, for 0 times the derivative at nan is nan.
  Tensor differentiable_grad_logits(const Tensor& grad_loss) const {
    const Tensor x = zero_where_ignored(widened(logits));
    const Tensor given = zero_where_ignored(widened(target));
    const Tensor t =
        label_smoothing ? given * at::rsub(*label_smoothing, 1) + *label_smoothing / 2 : given;
    const Tensor positive = pos_weight ? widened(*pos_weight) * t : t;
    const Tensor slope = at::rsub(t, 1) * at::sigmoid(x) - positive * at::sigmoid(-x);
    return zero_where_ignored(slope * factor(grad_loss)).to(logits.scalar_type());
  }

  // p softplus(-x) - softplus(x), which is -x without pos_weight; times what smoothing leaves of t
  Tensor grad_target(const Tensor& grad_loss) const {
    const Tensor x = zero_where_ignored(widened(logits));
    const Tensor slope =
        pos_weight ? at::log_sigmoid(-x) - widened(*pos_weight) * at::log_sigmoid(x) : -x;
    Tensor grad = slope * factor(grad_loss);
    if (label_smoothing) grad = grad * at::rsub(*label_smoothing, 1);
    return zero_where_ignored(grad).to(target.scalar_type());
  }
};

// What is not ignored is counted once, for forward and backward.
OptionalTensor divisor_for(const Tensor& target, int64_t reduction, OptionalIndex ignore_index,
                           bool ignore_nan, const OptionalTensor& given) {
  const bool counts = (ignore_index || ignore_nan) && reduction == at::Reduction::Mean;
  if (given || !counts) return given;
  static const auto count_kept = op<CountSignature>("fused_bce::count_kept");
  return count_kept.call(target, ignore_index, ignore_nan);
}

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

// Under vmap and forward-mode differentiation a number is more than the numbers in memory.
bool is_transformed(const Tensor& t) {
  constexpr c10::DispatchKeySet kBatched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return t.key_set().has_any(kBatched) || has_tangent(t);
}

// A float64 grad_loss is rounded first, as scale_ does: it would widen the product.
Tensor factor_for(const Tensor& stored, const Tensor& grad_loss) {
  return grad_loss.scalar_type() == at::kDouble ? grad_loss.to(at_least_float(stored.scalar_type()))
                                                : grad_loss;
}

// stored * grad_loss, in place if nobody else holds it; compiled autograd does.
Tensor scaled(Tensor stored, const Tensor& grad_loss, bool zero_stays) {
  const bool shared = stored.use_count() > 1;
  // A trace or a shard: in torch's own words, which compilers fuse and DTensor knows.
  if (stored.key_set().has_any(c10::python_ks))
    return shared || zero_stays ? scaled_by_torch(stored, grad_loss, zero_stays)
                                : stored.mul_(factor_for(stored, grad_loss));
  if (shared) stored = stored.clone();
  static const auto scale = op<ScaleSignature>("fused_bce::scale_");
  scale.call(stored, grad_loss, zero_stays);
  return stored;
}

// Whether the gradient is computed in the forward pass and kept for backward. Not in float16, where
// it would underflow before the loss scale arrives in backward; nor under saved-tensor hooks, which
// do not see it: whoever drops or moves what is saved (checkpoint, save_on_cpu) wants it nowhere.
bool stores_grad(const Tensor& logits, bool recompute) {
  return logits.requires_grad() && logits.scalar_type() != at::kHalf && !recompute &&
         !at::SavedTensorDefaultHooks::get_hooks();
}

constexpr const char* kGradLogits = "grad_logits";

struct BCEWithLogitsFunction : torch::autograd::Function<BCEWithLogitsFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                        int64_t reduction, OptionalDtype dtype,
                        const OptionalTensor& label_smoothing, OptionalIndex ignore_index,
                        bool ignore_nan, OptionalTensor divisor, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    divisor = divisor_for(target, reduction, ignore_index, ignore_nan, divisor);
    // Unpacked in every backward, so that in-place edits are noticed.
    ctx->save_for_backward({logits, target, weight.value_or(Tensor()),
                            pos_weight.value_or(Tensor()), label_smoothing.value_or(Tensor()),
                            divisor.value_or(Tensor())});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["ignore_nan"] = ignore_nan;
    if (!stores_grad(logits, recompute))
      return call_loss(logits, target, weight, pos_weight, reduction, dtype, label_smoothing,
                       ignore_index, ignore_nan, divisor, recompute);

    static const auto with_grad = op<LossAndGradSignature>("fused_bce::forward_with_grad");
    auto [loss, grad_logits] = with_grad.call(logits, target, weight, pos_weight, reduction, dtype,
                                              label_smoothing, ignore_index, ignore_nan, divisor);
    ctx->saved_data[kGradLogits] = std::move(grad_logits);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_losses) {
    const Tensor& grad_loss = grad_losses[0];
    const variable_list saved_tensors = ctx->get_saved_variables();
    const auto optional = [&](size_t i) {
      const Tensor& t = saved_tensors[i];
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const Saved saved{saved_tensors[0],
                      saved_tensors[1],
                      optional(2),
                      optional(3),
                      optional(4),
                      optional(5),
                      ctx->saved_data["reduction"].toInt(),
                      ctx->saved_data["ignore_index"].toOptional<int64_t>(),
                      ctx->saved_data["ignore_nan"].toBool()};
    variable_list grads(11);
    if (ctx->needs_input_grad(1)) grads[1] = saved.grad_target(grad_loss);
    if (!ctx->needs_input_grad(0)) return grads;

    // Taken out: a second backward must not find it scaled, and who gets it now is its only owner
    // and need not copy it.
    const auto entry = ctx->saved_data.find(kGradLogits);
    Tensor stored;
    if (entry != ctx->saved_data.end()) {
      stored = std::move(entry->second).toTensor();
      ctx->saved_data.erase(entry);
    }
    if (at::GradMode::is_enabled() || is_transformed(grad_loss) ||
        std::any_of(saved_tensors.begin(), saved_tensors.end(), has_tangent)) {
      grads[0] = saved.differentiable_grad_logits(grad_loss);
    } else if (stored.defined()) {
      grads[0] = scaled(std::move(stored), grad_loss, saved.ignores());
    } else {
      static const auto recompute = op<GradSignature>("fused_bce::backward");
      grads[0] = recompute.call(grad_loss, saved.logits, saved.target, saved.weight,
                                saved.pos_weight, saved.reduction, saved.label_smoothing,
                                saved.ignore_index, saved.ignore_nan, saved.divisor);
    }
    return grads;
  }
};

void check_not_differentiated(const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!t || !t->requires_grad(),
              "The function 'binary_cross_entropy_with_logits' is not differentiable with respect "
              "to argument '",
              name, "'. This input cannot have requires_grad True.");
}

}  // namespace

Tensor autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype dtype,
                const OptionalTensor& label_smoothing, OptionalIndex ignore_index, bool ignore_nan,
                const OptionalTensor& divisor, bool recompute) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(logits) && !has_tangent(target),
      "fused_bce has no forward-mode derivative; fused_bce.functional leaves it to torch");
  if (at::GradMode::is_enabled()) {
    check_not_differentiated("weight", weight);
    check_not_differentiated("pos_weight", pos_weight);
    check_not_differentiated("label_smoothing", label_smoothing);
    if (logits.requires_grad() || target.requires_grad())
      return BCEWithLogitsFunction::apply(logits, target, weight, pos_weight, reduction, dtype,
                                          label_smoothing, ignore_index, ignore_nan, divisor,
                                          recompute);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_loss(logits, target, weight, pos_weight, reduction, dtype, label_smoothing,
                   ignore_index, ignore_nan, divisor, recompute);
}

Tensor differentiable_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& weight, const OptionalTensor& pos_weight,
                               int64_t reduction, const OptionalTensor& label_smoothing,
                               OptionalIndex ignore_index, bool ignore_nan,
                               const OptionalTensor& divisor) {
  const Saved saved{
      logits,          target,
      weight,          pos_weight,
      label_smoothing, divisor_for(target, reduction, ignore_index, ignore_nan, divisor),
      reduction,       ignore_index,
      ignore_nan};
  return saved.differentiable_grad_logits(grad_loss);
}

Tensor scaled_by_torch(const Tensor& stored, const Tensor& grad_loss, bool zero_stays) {
  const Tensor scaled = (stored * factor_for(stored, grad_loss)).to(stored.scalar_type());
  return zero_stays ? at::where(stored == 0, stored, scaled) : scaled;
}

}  // namespace fused_bce
