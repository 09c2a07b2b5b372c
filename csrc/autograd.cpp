// The gradient wiring: what runs in forward, what in backward.
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/sigmoid.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops.h"

namespace fused_bce {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators are called through the dispatcher, where tracers and subclasses see them.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor call_loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype dtype,
                 double label_smoothing, OptionalIndex ignore_index,
                 const OptionalTensor& divisor) {
  static const auto loss = op<LossSignature>("fused_bce::binary_cross_entropy_with_logits");
  return loss.call(logits, target, weight, pos_weight, reduction, dtype, label_smoothing,
                   ignore_index, divisor);
}

// What a backward starts from.
struct Saved {
  Tensor logits, target;
  OptionalTensor weight, pos_weight, divisor;
  int64_t reduction;
  double label_smoothing;
  OptionalIndex ignore_index;

  // In the dtype of the arithmetic: half types would lose digits, and a float64 number times a
  // float32 array is float32.
  Tensor widened(const Tensor& t) const {
    const bool in_double =
        logits.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble;
    return t.to(in_double ? at::kDouble : at::kFloat);
  }

  // grad_loss * weight, over N for mean
  Tensor factor(const Tensor& grad_loss) const {
    Tensor factor = widened(grad_loss);
    if (reduction == at::Reduction::Mean)
      factor = divisor ? factor / divisor->masked_fill(*divisor == 0, 1)
                       : factor / at::Scalar(logits.sym_numel());
    return weight ? factor * widened(*weight) : factor;
  }

  Tensor zero_where_ignored(const Tensor& t) const {
    return ignore_index ? t.masked_fill(target == *ignore_index, 0) : t;
  }

  // In torch's own operations, hence differentiable and batchable; written so that hard targets
  // cancel nothing: (1 - t) sigmoid(x) - p t sigmoid(-x). What is ignored is taken out of x as
  // well, for 0 times the derivative at nan is nan.
  Tensor differentiable_grad_logits(const Tensor& grad_loss) const {
    const Tensor x = zero_where_ignored(widened(logits));
    const Tensor given = widened(target);
    const Tensor t =
        label_smoothing == 0 ? given : given * (1 - label_smoothing) + label_smoothing / 2;
    const Tensor positive = pos_weight ? widened(*pos_weight) * t : t;
    const Tensor slope = (1 - t) * at::sigmoid(x) - positive * at::sigmoid(-x);
    return zero_where_ignored(slope * factor(grad_loss)).to(logits.scalar_type());
  }

  // p softplus(-x) - softplus(x), which is -x without pos_weight; times what smoothing leaves of t
  Tensor grad_target(const Tensor& grad_loss) const {
    const Tensor x = zero_where_ignored(widened(logits));
    const Tensor slope =
        pos_weight ? at::log_sigmoid(-x) - widened(*pos_weight) * at::log_sigmoid(x) : -x;
    const Tensor grad = slope * factor(grad_loss) * (1 - label_smoothing);
    return zero_where_ignored(grad).to(target.scalar_type());
  }
};

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

// Under vmap and forward-mode differentiation a number is more than the numbers in memory.
bool is_transformed(const Tensor& t) {
  constexpr c10::DispatchKeySet kBatched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return t.key_set().has_any(kBatched) || has_tangent(t);
}

// stored * grad_loss, in place if nobody else holds it; compiled autograd does.
Tensor scaled(Tensor stored, const Tensor& grad_loss) {
  const bool shared = stored.use_count() > 1;
  // A trace or a shard: in torch's own words, which compilers fuse and DTensor knows.
  if (stored.key_set().has_any(c10::python_ks))
    return shared ? (stored * grad_loss).to(stored.scalar_type()) : stored.mul_(grad_loss);
  if (shared) stored = stored.clone();
  static const auto scale = op<ScaleSignature>("fused_bce::scale_");
  scale.call(stored, grad_loss);
  return stored;
}

constexpr const char* kGradLogits = "grad_logits";

struct BCEWithLogitsFunction : torch::autograd::Function<BCEWithLogitsFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                        int64_t reduction, OptionalDtype dtype, double label_smoothing,
                        OptionalIndex ignore_index, OptionalTensor divisor) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    // Counted once, for backward too.
    if (ignore_index && reduction == at::Reduction::Mean && !divisor) {
      static const auto count_kept = op<CountSignature>("fused_bce::count_kept");
      divisor = count_kept.call(target, *ignore_index);
    }
    // Unpacked in every backward, so that in-place edits are noticed.
    ctx->save_for_backward({logits, target, weight.value_or(Tensor()),
                            pos_weight.value_or(Tensor()), divisor.value_or(Tensor())});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["ignore_index"] = ignore_index;

    // A float16 gradient would underflow before the loss scale arrives in backward: it is computed
    // there.
    if (!logits.requires_grad() || logits.scalar_type() == at::kHalf)
      return call_loss(logits, target, weight, pos_weight, reduction, dtype, label_smoothing,
                       ignore_index, divisor);

    static const auto with_grad = op<LossAndGradSignature>("fused_bce::forward_with_grad");
    auto [loss, grad_logits] = with_grad.call(logits, target, weight, pos_weight, reduction, dtype,
                                              label_smoothing, ignore_index, divisor);
    ctx->saved_data[kGradLogits] = std::move(grad_logits);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_losses) {
    const Tensor& grad_loss = grad_losses[0];
    const variable_list saved_tensors = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const Saved saved{saved_tensors[0],
                      saved_tensors[1],
                      optional(saved_tensors[2]),
                      optional(saved_tensors[3]),
                      optional(saved_tensors[4]),
                      ctx->saved_data["reduction"].toInt(),
                      ctx->saved_data["label_smoothing"].toDouble(),
                      ctx->saved_data["ignore_index"].toOptional<int64_t>()};
    variable_list grads(9);
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
      grads[0] = scaled(std::move(stored), grad_loss);
    } else {
      static const auto recompute = op<GradSignature>("fused_bce::backward");
      grads[0] =
          recompute.call(grad_loss, saved.logits, saved.target, saved.weight, saved.pos_weight,
                         saved.reduction, saved.label_smoothing, saved.ignore_index, saved.divisor);
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

Tensor autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype dtype,
                double label_smoothing, OptionalIndex ignore_index, const OptionalTensor& divisor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(logits) && !has_tangent(target),
      "fused_bce has no forward-mode derivative; fused_bce.functional leaves it to torch");
  if (at::GradMode::is_enabled()) {
    check_not_differentiated("weight", weight);
    check_not_differentiated("pos_weight", pos_weight);
    if (logits.requires_grad() || target.requires_grad())
      return BCEWithLogitsFunction::apply(logits, target, weight, pos_weight, reduction, dtype,
                                          label_smoothing, ignore_index, divisor);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_loss(logits, target, weight, pos_weight, reduction, dtype, label_smoothing,
                   ignore_index, divisor);
}

// Autocast runs this loss in float32. The kernel widens as it reads, so that only the dtype of the
// result is set, and no operand is cast in memory.
template <c10::DeviceType device>
Tensor autocast(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype,
                double label_smoothing, OptionalIndex ignore_index, const OptionalTensor& divisor) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const Tensor& decides =
      at::isIntegralType(target.scalar_type(), /*includeBool=*/true) ? logits : target;
  const auto dtype = decides.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return call_loss(logits, target, weight, pos_weight, reduction, dtype, label_smoothing,
                   ignore_index, divisor);
}

}  // namespace

void register_autograd() {
  static torch::Library library(torch::Library::IMPL, "fused_bce", std::nullopt, __FILE__,
                                __LINE__);
  constexpr const char* kName = "binary_cross_entropy_with_logits";
  library.impl(kName, c10::DispatchKey::Autograd, &autograd);
  library.impl(kName, c10::DispatchKey::AutocastCPU, &autocast<c10::kCPU>);
  library.impl(kName, c10::DispatchKey::AutocastCUDA, &autocast<c10::kCUDA>);
}

}  // namespace fused_bce
