// Every operator of this package: its schema, and what runs for which dispatch key.
#include <torch/library.h>

#include <string>

#include "autocast.h"
#include "composite.h"
#include "head/linear_operands.h"
#include "meta.h"
#include "operators.h"

namespace fused_bce {
namespace {

constexpr c10::DispatchKey kBackends[] = {
    c10::DispatchKey::CPU,
#if defined(FUSED_BCE_CUDA)
    c10::DispatchKey::CUDA,
#endif
};

// Never destroyed: an extension module is never unloaded.
torch::Library& library(torch::Library::Kind kind, std::optional<c10::DispatchKey> key) {
  return *new torch::Library(kind, "fused_bce", key, __FILE__, __LINE__);
}

torch::Library& implementations(c10::DispatchKey key) { return library(torch::Library::IMPL, key); }

// The operators of a pointwise loss
template <class Loss>
void define(torch::Library& definitions) {
  const auto def = [&](const std::string& name, const std::string& others,
                       const std::string& results) {
    definitions.def((name + "(" + others + Loss::schema() + ") -> " + results).c_str());
  };
  def(Loss::kName, "", "Tensor");
  def(Loss::with_grad(), "", "(Tensor loss, Tensor grad_logits)");
  def(Loss::backward(), "Tensor grad_loss, ", "Tensor");
  def(Loss::differentiable_backward(), "Tensor grad_loss, ", "Tensor");
  def(Loss::composite(), Loss::kParameterTensors, "Tensor");
}

template <class Loss>
void implement() {
  for (const auto key : kBackends) {
    torch::Library& backend = implementations(key);
    backend.impl(Loss::kName, kKernel<Loss, forward>);
    backend.impl(Loss::with_grad().c_str(), kKernel<Loss, forward_with_grad>);
    backend.impl(Loss::backward().c_str(), kKernel<Loss, backward>);
  }
  torch::Library& meta = implementations(c10::DispatchKey::Meta);
  meta.impl(Loss::kName, kKernel<Loss, meta::forward>);
  meta.impl(Loss::with_grad().c_str(), kKernel<Loss, meta::forward_with_grad>);
  meta.impl(Loss::backward().c_str(), kKernel<Loss, meta::backward>);

  implementations(c10::DispatchKey::AutocastCPU)
      .impl(Loss::kName, kKernel<Loss, autocast<Loss, c10::kCPU>>);
  implementations(c10::DispatchKey::AutocastCUDA)
      .impl(Loss::kName, kKernel<Loss, autocast<Loss, c10::kCUDA>>);
  torch::Library& composite = implementations(c10::DispatchKey::CompositeImplicitAutograd);
  composite.impl(Loss::differentiable_backward().c_str(), kKernel<Loss, differentiable_backward>);
  composite.impl(Loss::composite().c_str(), kKernel<Loss, composite_loss>);
}

template <class... Formula>
void define_and_implement(torch::Library& definitions, FormulaList<Formula...>) {
  (define<Pointwise<Formula>>(definitions), ...);
  (implement<Pointwise<Formula>>(), ...);
}

void define_and_implement_linear(torch::Library& definitions) {
  const auto def = [&](const std::string& name, const std::string& others,
                       const std::string& results) {
    definitions.def((name + "(" + others + Linear::schema() + ") -> " + results).c_str());
  };
  def(Linear::kName, "", "Tensor");
  def(Linear::kWithGrads, "bool[3] wanted, Tensor? grad_loss, ",
      "(Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  def(Linear::kDifferentiableBackward, "bool[3] wanted, Tensor grad_loss, ",
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  definitions.def(kTopkSchema);

  for (const auto key : kBackends) {
    torch::Library& backend = implementations(key);
    backend.impl(Linear::kName, kKernel<Linear, loss_only<linear_loss>>);
    backend.impl(Linear::kWithGrads, kKernel<Linear, linear_loss>);
  }
  torch::Library& meta = implementations(c10::DispatchKey::Meta);
  meta.impl(Linear::kName, kKernel<Linear, loss_only<meta::linear_loss>>);
  meta.impl(Linear::kWithGrads, kKernel<Linear, meta::linear_loss>);

  implementations(c10::DispatchKey::Autograd).impl(Linear::kName, kKernel<Linear, linear_autograd>);
  implementations(c10::DispatchKey::AutocastCPU)
      .impl(Linear::kName, kKernel<Linear, linear_autocast<c10::kCPU>>);
  implementations(c10::DispatchKey::AutocastCUDA)
      .impl(Linear::kName, kKernel<Linear, linear_autocast<c10::kCUDA>>);
  implementations(c10::DispatchKey::CompositeImplicitAutograd)
      .impl(Linear::kDifferentiableBackward, kKernel<Linear, linear_derivatives>);

  implementations(c10::DispatchKey::CPU).impl("_linear_topk", &linear_topk);
  implementations(c10::DispatchKey::CompositeExplicitAutograd)
      .impl("_linear_topk", &linear_topk_composite);
  meta.impl("_linear_topk", &linear_topk_meta);
}

}  // namespace

void register_ops() {
  torch::Library& definitions = library(torch::Library::DEF, std::nullopt);
  define_and_implement(definitions, Formulas());
  define_and_implement_linear(definitions);
  register_autograd(implementations(c10::DispatchKey::Autograd));

  definitions.def(
      "_count_unignored(Tensor target, int? ignore_index, bool ignore_nan=False) -> Tensor");
  definitions.def("_scale_(Tensor(a!) grad_logits, Tensor grad_loss, bool zero_stays=False) -> ()");
  for (const auto key : kBackends) {
    torch::Library& backend = implementations(key);
    backend.impl("_count_unignored", &count_unignored);
    backend.impl("_scale_", &scale_);
  }
  torch::Library& meta = implementations(c10::DispatchKey::Meta);
  meta.impl("_count_unignored", &meta::count_unignored);
  meta.impl("_scale_", &meta::scale_);
}

}  // namespace fused_bce
