// The gradient wiring: what runs in forward, what in backward.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "derivatives.h"
#include "operators.h"
#include "stored_gradients.h"

namespace fused_bce {

using at::Tensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What is not ignored is counted once, for forward and backward.
bool needs_count(const Operands& o) {
  return !o.divisor && o.ignores() && o.reduction == at::Reduction::Mean;
}

Operands counted(const Operands& given) {
  static const auto count = find_operator<decltype(count_kept)>("count_kept");
  Operands o = given;
  o.divisor = count.call(o.target, o.ignore_index, o.ignore_nan);
  return o;
}

// Whether the gradient is computed in the forward pass and kept for backward. Not in float16, where
// it would underflow before the loss scale arrives in backward; nor under saved-tensor hooks, which
// do not see it: whoever drops or moves what is saved (checkpoint, save_on_cpu) wants it nowhere.
bool stores_grad(const Tensor& logits, bool recompute) {
  return logits.requires_grad() && logits.scalar_type() != at::kHalf && !recompute &&
         !at::SavedTensorDefaultHooks::get_hooks();
}

constexpr const char* kGradLogits = "grad_logits";

// The autograd function of the loss with these operators
template <class Function, class Operators>
struct LossFunction : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                        const Operands& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (needs_count(given)) return record(ctx, logits, target, counted(given));
    return record(ctx, logits, target, given);
  }

  static Tensor record(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                       const Operands& o) {
    // Unpacked in every backward, so that in-place edits are noticed.
    ctx->save_for_backward({logits, target, o.weight.value_or(Tensor()),
                            o.pos_weight.value_or(Tensor()), o.label_smoothing.value_or(Tensor()),
                            o.divisor.value_or(Tensor())});
    ctx->saved_data["reduction"] = o.reduction;
    ctx->saved_data["ignore_index"] = o.ignore_index;
    ctx->saved_data["ignore_nan"] = o.ignore_nan;
    if (o.formula == FormulaId::kSigmoidFocal)
      ctx->saved_data["focal"] =
          c10::List<double>({o.focal.alpha, o.focal.gamma, o.focal.gamma_neg});
    if (!stores_grad(logits, o.recompute)) return Operators::call_loss(o);

    auto [loss, grad_logits] = Operators::call_loss_and_grad(o);
    ctx->saved_data[kGradLogits] = std::move(grad_logits);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_losses) {
    const Tensor& grad_loss = grad_losses[0];
    const variable_list saved_tensors = ctx->get_saved_variables();
    const Operands o = saved(*ctx, saved_tensors);
    variable_list grads(3);
    if (ctx->needs_input_grad(1)) grads[1] = grad_of_target(grad_loss, o);
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
      grads[0] = grad_of_logits(grad_loss, o);
    } else if (stored.defined()) {
      grads[0] = scaled(std::move(stored), grad_loss, o.ignores());
    } else {
      grads[0] = Operators::call_backward(grad_loss, o);
    }
    return grads;
  }

  static Operands saved(AutogradContext& ctx, const variable_list& tensors) {
    const auto optional = [&](size_t i) {
      const Tensor& t = tensors[i];
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    Focal focal;
    if (Operators::kFormula == FormulaId::kSigmoidFocal) {
      const auto numbers = ctx.saved_data["focal"].toDoubleVector();
      focal = {numbers[0], numbers[1], numbers[2]};
    }
    return {.formula = Operators::kFormula,
            .logits = tensors[0],
            .target = tensors[1],
            .weight = optional(2),
            .pos_weight = optional(3),
            .focal = focal,
            .reduction = ctx.saved_data["reduction"].toInt(),
            .label_smoothing = optional(4),
            .ignore_index = ctx.saved_data["ignore_index"].toOptional<int64_t>(),
            .ignore_nan = ctx.saved_data["ignore_nan"].toBool(),
            .divisor = optional(5)};
  }

 private:
  LossFunction() = default;
  friend Function;
};

// Types of their own, for their names are those of the nodes in a graph.
struct BCEWithLogitsFunction : LossFunction<BCEWithLogitsFunction, BinaryCrossEntropyOperators> {};
struct SigmoidFocalFunction : LossFunction<SigmoidFocalFunction, SigmoidFocalOperators> {};

void check_not_differentiated(const char* function, const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!t || !t->requires_grad(), "The function '", function,
              "' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

template <class Function, class Operators>
Tensor differentiable(const Operands& o) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(o.logits) && !has_tangent(o.target),
      "fused_bce has no forward-mode derivative; fused_bce.functional leaves it to torch");
  if (at::GradMode::is_enabled()) {
    check_not_differentiated(Operators::kLoss, "weight", o.weight);
    check_not_differentiated(Operators::kLoss, "pos_weight", o.pos_weight);
    check_not_differentiated(Operators::kLoss, "label_smoothing", o.label_smoothing);
    if (o.logits.requires_grad() || o.target.requires_grad())
      return Function::apply(o.logits, o.target, o);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return Operators::call_loss(o);
}

}  // namespace

Tensor autograd(const Operands& operands) {
  switch (operands.formula) {
    case FormulaId::kSigmoidFocal:
      return differentiable<SigmoidFocalFunction, SigmoidFocalOperators>(operands);
    case FormulaId::kBinaryCrossEntropy:
      break;
  }
  return differentiable<BCEWithLogitsFunction, BinaryCrossEntropyOperators>(operands);
}

Tensor differentiable_backward(const Tensor& grad_loss, const Operands& operands) {
  return grad_of_logits(grad_loss, needs_count(operands) ? counted(operands) : operands);
}

}  // namespace fused_bce
