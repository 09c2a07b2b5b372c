// What runs in the head's forward pass, what in backward.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <array>
#include <iterator>

#include "../composite.h"
#include "../saved_arguments.h"
#include "../stored_gradients.h"
#include "linear_operands.h"
#include "target_blocks.h"

namespace fused_bce {

using at::Tensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One by one: compiled autograd knows no lists of them.
constexpr std::array kGrads = {"grad_input", "grad_weight", "grad_bias"};

Tensor target_matrix(const LinearOperands& o) {
  const int64_t rows = o.input.size(0), labels = o.linear_weight.size(0);
  const TargetBlocks targets(o, rows, labels);
  TargetBlocks::Buffer buffer = targets.make_buffer();
  return targets.block(buffer, {0, rows}, {0, labels});
}

struct LinearBCEWithLogitsFunction : torch::autograd::Function<LinearBCEWithLogitsFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                        const OptionalTensor& linear_bias, const LinearOperands& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LinearOperands o = given.offsets ? given : with_divisor(given);
    save_arguments<Linear>(ctx, o);
    const Wanted wanted{input.requires_grad(), linear_weight.requires_grad(),
                        linear_bias && linear_bias->requires_grad()};
    if (!stores_grads(o, wanted)) return call_loss<Linear>(o);
    auto [loss, grad_input, grad_weight, grad_bias] = Linear::call_with_grads(o, wanted, {});
    ctx->saved_data[kGrads[0]] = std::move(grad_input);
    ctx->saved_data[kGrads[1]] = std::move(grad_weight);
    ctx->saved_data[kGrads[2]] = std::move(grad_bias);
    return loss;
  }

  // Under saved-tensor hooks, which do not see it, nothing of gradient size is held; nor a gradient
  // that would underflow in float16 before the loss scale arrives.
  static bool stores_grads(const LinearOperands& o, const Wanted& wanted) {
    if (o.recompute) return false;
    const bool in_half = wanted[1] && o.linear_weight.scalar_type() == at::kHalf;
    return !in_half && !at::SavedTensorDefaultHooks::get_hooks();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_losses) {
    const Tensor& grad_loss = grad_losses[0];
    const variable_list tensors = ctx->get_saved_variables();
    const auto o = restore_arguments<Linear>(*ctx, tensors);
    const Wanted wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                        o.linear_bias && ctx->needs_input_grad(2)};
    // Taken out: a second backward must not find them scaled.
    variable_list stored;
    for (const char* const name : kGrads) {
      const auto entry = ctx->saved_data.find(name);
      if (entry == ctx->saved_data.end()) break;
      stored.push_back(std::move(entry->second).toTensor());
      ctx->saved_data.erase(entry);
    }
    variable_list grads(4);
    if (at::GradMode::is_enabled() || is_transformed(grad_loss) ||
        std::any_of(tensors.begin(), tensors.end(), has_tangent)) {
      std::tie(grads[0], grads[1], grads[2]) = linear_derivatives(o, wanted, grad_loss);
      return grads;
    }
    const bool scaled_already = stored.empty() && o.linear_weight.scalar_type() == at::kHalf;
    if (stored.empty()) {
      auto [loss, grad_input, grad_weight, grad_bias] = Linear::call_with_grads(
          o, wanted, scaled_already ? OptionalTensor(grad_loss) : std::nullopt);
      stored = {grad_input, grad_weight, grad_bias};
    }
    const Tensor operands[] = {o.input, o.linear_weight, o.linear_bias.value_or(Tensor())};
    for (size_t i = 0; i < 3; ++i) {
      if (!wanted[i]) continue;
      Tensor grad = std::move(stored[i]);
      if (!(i == 1 && scaled_already)) grad = scaled(std::move(grad), grad_loss, false);
      grads[i] = grad.to(operands[i].scalar_type());
    }
    return grads;
  }
};

}  // namespace

Tensor linear_autograd(const LinearOperands& o) {
  const OptionalTensor layer[] = {o.input, o.linear_weight, o.linear_bias};
  const OptionalTensor constants[] = {o.target,     o.values,          o.weight,
                                      o.pos_weight, o.label_smoothing, o.divisor};
  const auto any = [](const auto& tensors, const auto& is) {
    return std::any_of(std::begin(tensors), std::end(tensors),
                       [&](const OptionalTensor& t) { return t && is(*t); });
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any(layer, has_tangent) && !any(constants, has_tangent),
      "fused_bce has no forward-mode derivative; fused_bce.functional leaves it to torch");
  if (at::GradMode::is_enabled()) {
    const auto requires_grad = [](const Tensor& t) { return t.requires_grad(); };
    TORCH_CHECK(!any(constants, requires_grad), "The function '", Linear::kName,
                "' is differentiable with respect to input, linear_weight and linear_bias only.");
    if (any(layer, requires_grad))
      return LinearBCEWithLogitsFunction::apply(o.input, o.linear_weight, o.linear_bias, o);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_loss<Linear>(o);
}

// On whole logits
LinearGrads linear_derivatives(const LinearOperands& given, Wanted wanted,
                               const Tensor& grad_loss) {
  const LinearOperands o = given.offsets ? given : with_divisor(given);
  const at::ScalarType type = o.logits_dtype();
  const Tensor input = o.input.to(type), weight = o.linear_weight.to(type);
  const Tensor bias = o.linear_bias ? o.linear_bias->to(type) : Tensor();
  Operands of_logits;
  of_logits.options() = o.options();
  of_logits.logits = at::linear(input, weight, bias);
  of_logits.target = target_matrix(o);
  of_logits.weight = o.weight;
  of_logits.pos_weight = o.pos_weight;
  const Tensor grad = grad_of_logits(grad_loss, of_logits);
  Tensor grad_input, grad_weight, grad_bias;
  if (wanted[0]) grad_input = at::matmul(grad, weight).to(o.input.scalar_type());
  if (wanted[1]) grad_weight = at::matmul(grad.t(), input).to(o.linear_weight.scalar_type());
  if (wanted[2] && o.linear_bias) grad_bias = grad.sum(0).to(o.linear_bias->scalar_type());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fused_bce
