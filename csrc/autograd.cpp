// The gradient wiring: what runs in forward, what in backward.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "composite.h"
#include "saved_arguments.h"
#include "stored_gradients.h"

namespace fused_bce {

using at::Tensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether the gradient is computed in the forward pass and kept for backward. Not in float16, where
// it would underflow before the loss scale arrives in backward; nor under saved-tensor hooks,
// which do not see it: checkpoint and save_on_cpu are there to drop or move what is saved.
bool stores_grad(const Tensor& logits, bool recompute) {
  return logits.requires_grad() && logits.scalar_type() != at::kHalf && !recompute &&
         !at::SavedTensorDefaultHooks::get_hooks();
}

constexpr const char* kGradLogits = "grad_logits";

// The autograd function of a loss. The name of the type Function is that of the node in a graph.
template <class Function, class Formula>
struct LossFunction : torch::autograd::Function<Function> {
  using Loss = Pointwise<Formula>;

  // Its inputs are those that can be differentiated; they are among the operands, too.
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor&, const Operands& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return needs_divisor(given) ? record(ctx, with_divisor(given)) : record(ctx, given);
  }

  static Tensor record(AutogradContext* ctx, const Operands& o) {
    save_arguments<Loss>(ctx, o);
    if (!stores_grad(o.logits, o.recompute)) return call_loss<Loss>(o);

    auto [loss, grad_logits] = Loss::call_with_grad(o);
    ctx->saved_data[kGradLogits] = std::move(grad_logits);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_losses) {
    const Tensor& grad_loss = grad_losses[0];
    const variable_list saved_tensors = ctx->get_saved_variables();
    const Operands o = restore_arguments<Loss>(*ctx, saved_tensors);
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
      grads[0] = Loss::call_backward(o, grad_loss);
    }
    return grads;
  }

 private:
  LossFunction() = default;
  friend Function;
};

template <class Formula>
struct PointwiseFunction : LossFunction<PointwiseFunction<Formula>, Formula> {};
struct BCEWithLogitsFunction : LossFunction<BCEWithLogitsFunction, BinaryCrossEntropy> {};
struct SigmoidFocalFunction : LossFunction<SigmoidFocalFunction, SigmoidFocal> {};

template <class Formula>
struct FunctionOf {
  using type = PointwiseFunction<Formula>;
};
// Their nodes have had these names since they were documented.
template <>
struct FunctionOf<BinaryCrossEntropy> {
  using type = BCEWithLogitsFunction;
};
template <>
struct FunctionOf<SigmoidFocal> {
  using type = SigmoidFocalFunction;
};

void check_not_differentiated(const char* function, const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!t || !t->requires_grad(), "The function '", function,
              "' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

template <class Formula>
Tensor autograd(const Operands& o) {
  using Loss = Pointwise<Formula>;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(o.logits) && !has_tangent(o.target),
      "fused_bce has no forward-mode derivative; fused_bce.functional leaves it to torch");
  if (at::GradMode::is_enabled()) {
    check_not_differentiated(Loss::kName, "weight", o.weight);
    check_not_differentiated(Loss::kName, "pos_weight", o.pos_weight);
    check_not_differentiated(Loss::kName, "label_smoothing", o.label_smoothing);
    if (o.logits.requires_grad() || o.target.requires_grad())
      return FunctionOf<Formula>::type::apply(o.logits, o.target, o);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_loss<Loss>(o);
}

template <class... Formula>
void implement(torch::Library& library, FormulaList<Formula...>) {
  (library.impl(Formula::kName, kKernel<Pointwise<Formula>, autograd<Formula>>), ...);
}

}  // namespace

void register_autograd(torch::Library& library) { implement(library, Formulas()); }

Tensor differentiable_backward(const Operands& operands, const Tensor& grad_loss) {
  return grad_of_logits(grad_loss, with_divisor(operands));
}

}  // namespace fused_bce
