// What runs in the head's forward pass, what in backward.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>

#include "../derivatives.h"
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
  return TargetBlocks(o, rows, labels).block({0, rows}, {0, labels});
}

LinearOperands counted(const LinearOperands& given) {
  LinearOperands o = given;
  if (!o.divisor && !o.offsets && o.ignores() && o.reduction == at::Reduction::Mean) {
    static const auto count = find_operator<decltype(count_kept)>("count_kept");
    o.divisor = count.call(o.target, o.ignore_index, o.ignore_nan);
  }
  return o;
}

struct LinearBCEWithLogitsFunction : torch::autograd::Function<LinearBCEWithLogitsFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                        const OptionalTensor& linear_bias, const LinearOperands& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LinearOperands o = counted(given);
    // Unpacked in every backward, so that in-place edits are noticed.
    const auto saved = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward({input, linear_weight, saved(linear_bias), o.target, saved(o.offsets),
                            saved(o.values), saved(o.weight), saved(o.pos_weight),
                            saved(o.label_smoothing), saved(o.divisor)});
    ctx->saved_data["reduction"] = o.reduction;
    ctx->saved_data["dtype"] = o.dtype;
    ctx->saved_data["ignore_index"] = o.ignore_index;
    ctx->saved_data["ignore_nan"] = o.ignore_nan;
    ctx->saved_data["chunk_bytes"] = o.chunk_bytes;
    const Wanted wanted{input.requires_grad(), linear_weight.requires_grad(),
                        linear_bias && linear_bias->requires_grad()};
    if (!stores_grads(o, wanted)) return LinearOperators::call_loss(o);
    auto [loss, grad_input, grad_weight, grad_bias] =
        LinearOperators::call_loss_and_grads(o, wanted, {});
    ctx->saved_data[kGrads[0]] = std::move(grad_input);
    ctx->saved_data[kGrads[1]] = std::move(grad_weight);
    ctx->saved_data[kGrads[2]] = std::move(grad_bias);
    return loss;
  }

  // Under saved-tensor hooks, which do not see it, nothing of gradient size is held; nor a gradient
  // that would underflow in float16 before the loss scale arrives.
  static bool stores_grads(const LinearOperands& o, const Wanted& wanted) {
    const bool in_half = wanted[1] && o.linear_weight.scalar_type() == at::kHalf;
    return !in_half && !at::SavedTensorDefaultHooks::get_hooks();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_losses) {
    const Tensor& grad_loss = grad_losses[0];
    const variable_list tensors = ctx->get_saved_variables();
    const LinearOperands o = saved(*ctx, tensors);
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
      auto derivatives = linear_derivatives(grad_loss, o, wanted);
      std::move(derivatives.begin(), derivatives.end(), grads.begin());
      return grads;
    }
    const bool scaled_already = stored.empty() && o.linear_weight.scalar_type() == at::kHalf;
    if (stored.empty()) {
      auto [loss, grad_input, grad_weight, grad_bias] = LinearOperators::call_loss_and_grads(
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

  static LinearOperands saved(AutogradContext& ctx, const variable_list& tensors) {
    const auto optional = [&](size_t i) {
      return tensors[i].defined() ? OptionalTensor(tensors[i]) : std::nullopt;
    };
    return {.input = tensors[0],
            .linear_weight = tensors[1],
            .linear_bias = optional(2),
            .target = tensors[3],
            .offsets = optional(4),
            .values = optional(5),
            .weight = optional(6),
            .pos_weight = optional(7),
            .reduction = ctx.saved_data["reduction"].toInt(),
            .dtype = ctx.saved_data["dtype"].toOptional<at::ScalarType>(),
            .label_smoothing = optional(8),
            .ignore_index = ctx.saved_data["ignore_index"].toOptional<int64_t>(),
            .ignore_nan = ctx.saved_data["ignore_nan"].toBool(),
            .divisor = optional(9),
            .chunk_bytes = ctx.saved_data["chunk_bytes"].toInt()};
  }
};

}  // namespace

Tensor linear_autograd(const LinearOperands& o) {
  const auto differentiates = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  const OptionalTensor constants[] = {o.target,     o.values,          o.weight,
                                      o.pos_weight, o.label_smoothing, o.divisor};
  const auto check_tangent = [](const OptionalTensor& t) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !t || !has_tangent(*t),
        "fused_bce has no forward-mode derivative; fused_bce.functional leaves it to torch");
  };
  for (const OptionalTensor& t :
       {OptionalTensor(o.input), OptionalTensor(o.linear_weight), o.linear_bias})
    check_tangent(t);
  for (const OptionalTensor& t : constants) check_tangent(t);
  if (at::GradMode::is_enabled()) {
    for (const OptionalTensor& t : constants)
      TORCH_CHECK(!differentiates(t), "The function '", LinearOperators::kLoss,
                  "' is differentiable with respect to input, linear_weight and linear_bias only.");
    if (o.input.requires_grad() || o.linear_weight.requires_grad() || differentiates(o.linear_bias))
      return LinearBCEWithLogitsFunction::apply(o.input, o.linear_weight, o.linear_bias, o);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return LinearOperators::call_loss(o);
}

// On whole logits
std::array<Tensor, 3> linear_derivatives(const Tensor& grad_loss, const LinearOperands& given,
                                         Wanted wanted) {
  const LinearOperands o = counted(given);
  const at::ScalarType type = o.logits_dtype();
  const Tensor input = o.input.to(type), weight = o.linear_weight.to(type);
  const Tensor bias = o.linear_bias ? o.linear_bias->to(type) : Tensor();
  const Tensor grad = grad_of_logits(grad_loss, {.logits = at::linear(input, weight, bias),
                                                 .target = target_matrix(o),
                                                 .weight = o.weight,
                                                 .pos_weight = o.pos_weight,
                                                 .reduction = o.reduction,
                                                 .label_smoothing = o.label_smoothing,
                                                 .ignore_index = o.ignore_index,
                                                 .ignore_nan = o.ignore_nan,
                                                 .divisor = o.divisor});
  std::array<Tensor, 3> grads;
  if (wanted[0]) grads[0] = at::matmul(grad, weight).to(o.input.scalar_type());
  if (wanted[1]) grads[1] = at::matmul(grad.t(), input).to(o.linear_weight.scalar_type());
  if (wanted[2] && o.linear_bias) grads[2] = grad.sum(0).to(o.linear_bias->scalar_type());
  return grads;
}

}  // namespace fused_bce
