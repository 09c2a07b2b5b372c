// Every operator of this package: its schema, and what runs for which dispatch key.
#include <torch/library.h>

#include <string>

#include "autocast.h"
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

// Never destroyed: nobody unloads an extension module.
torch::Library& library(torch::Library::Kind kind, std::optional<c10::DispatchKey> key) {
  return *new torch::Library(kind, "fused_bce", key, __FILE__, __LINE__);
}

torch::Library& implementations(c10::DispatchKey key) { return library(torch::Library::IMPL, key); }

// What runs for the operators of one loss.
template <class Loss>
void implement() {
  for (const auto key : kBackends) {
    torch::Library& backend = implementations(key);
    backend.impl(Loss::kLoss, &Loss::template loss<forward>);
    backend.impl(Loss::kLossAndGrad, &Loss::template loss_and_grad<forward_with_grad>);
    backend.impl(Loss::kBackward, &Loss::template grad<backward>);
  }
  torch::Library& meta = implementations(c10::DispatchKey::Meta);
  meta.impl(Loss::kLoss, &Loss::template loss<meta::forward>);
  meta.impl(Loss::kLossAndGrad, &Loss::template loss_and_grad<meta::forward_with_grad>);
  meta.impl(Loss::kBackward, &Loss::template grad<meta::backward>);

  implementations(c10::DispatchKey::Autograd).impl(Loss::kLoss, &Loss::template loss<autograd>);
  implementations(c10::DispatchKey::AutocastCPU)
      .impl(Loss::kLoss, &Loss::template loss<autocast<Loss, c10::kCPU>>);
  implementations(c10::DispatchKey::AutocastCUDA)
      .impl(Loss::kLoss, &Loss::template loss<autocast<Loss, c10::kCUDA>>);
  implementations(c10::DispatchKey::CompositeImplicitAutograd)
      .impl(Loss::kDifferentiableBackward, &Loss::template grad<differentiable_backward>);
}

void implement_linear() {
  using Head = LinearOperators;
  for (const auto key : kBackends) {
    torch::Library& backend = implementations(key);
    backend.impl(Head::kLoss, &Head::loss<linear_loss_only>);
    backend.impl(Head::kLossAndGrads, &Head::loss_and_grads<linear_loss>);
  }
  torch::Library& meta = implementations(c10::DispatchKey::Meta);
  meta.impl(Head::kLoss, &Head::loss<meta::linear_loss_only>);
  meta.impl(Head::kLossAndGrads, &Head::loss_and_grads<meta::linear_loss>);

  implementations(c10::DispatchKey::Autograd).impl(Head::kLoss, &Head::loss<linear_autograd>);
  implementations(c10::DispatchKey::AutocastCPU)
      .impl(Head::kLoss, &Head::loss<linear_autocast<c10::kCPU>>);
  implementations(c10::DispatchKey::AutocastCUDA)
      .impl(Head::kLoss, &Head::loss<linear_autocast<c10::kCUDA>>);
  implementations(c10::DispatchKey::CompositeImplicitAutograd)
      .impl(Head::kDifferentiableBackward, &Head::grads<linear_derivatives>);
}

}  // namespace

void register_ops() {
  torch::Library& definitions = library(torch::Library::DEF, std::nullopt);
  definitions.def(
      "binary_cross_entropy_with_logits(Tensor logits, Tensor target, Tensor? weight=None, "
      "Tensor? pos_weight=None, int reduction=1, ScalarType? dtype=None, "
      "Tensor? label_smoothing=None, int? ignore_index=None, bool ignore_nan=False, "
      "Tensor? divisor=None, bool recompute=False) -> Tensor");
  definitions.def(
      "forward_with_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "int reduction, ScalarType? dtype=None, Tensor? label_smoothing=None, "
      "int? ignore_index=None, bool ignore_nan=False, Tensor? divisor=None) "
      "-> (Tensor loss, Tensor grad_logits)");
  definitions.def(
      "backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, int reduction, Tensor? label_smoothing=None, int? ignore_index=None, "
      "bool ignore_nan=False, Tensor? divisor=None) -> Tensor");
  definitions.def(
      "differentiable_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, int reduction, Tensor? label_smoothing=None, int? ignore_index=None, "
      "bool ignore_nan=False, Tensor? divisor=None) -> Tensor");
  definitions.def(
      "sigmoid_focal_loss(Tensor logits, Tensor target, Tensor? weight, float alpha, float gamma, "
      "float gamma_neg, int reduction, ScalarType? dtype=None, Tensor? label_smoothing=None, "
      "int? ignore_index=None, bool ignore_nan=False, Tensor? divisor=None, bool recompute=False) "
      "-> Tensor");
  definitions.def(
      "sigmoid_focal_loss_with_grad(Tensor logits, Tensor target, Tensor? weight, float alpha, "
      "float gamma, float gamma_neg, int reduction, ScalarType? dtype=None, "
      "Tensor? label_smoothing=None, int? ignore_index=None, bool ignore_nan=False, "
      "Tensor? divisor=None) -> (Tensor loss, Tensor grad_logits)");
  definitions.def(
      "sigmoid_focal_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "float alpha, float gamma, float gamma_neg, int reduction, Tensor? label_smoothing=None, "
      "int? ignore_index=None, bool ignore_nan=False, Tensor? divisor=None) -> Tensor");
  definitions.def(
      "sigmoid_focal_loss_differentiable_backward(Tensor grad_loss, Tensor logits, Tensor target, "
      "Tensor? weight, float alpha, float gamma, float gamma_neg, int reduction, "
      "Tensor? label_smoothing=None, int? ignore_index=None, bool ignore_nan=False, "
      "Tensor? divisor=None) -> Tensor");
  const std::string linear =
      "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
      "Tensor? offsets=None, Tensor? values=None, Tensor? weight=None, Tensor? pos_weight=None, "
      "int reduction=1, ScalarType? dtype=None, Tensor? label_smoothing=None, "
      "int? ignore_index=None, bool ignore_nan=False, Tensor? divisor=None, int chunk_bytes=0) -> ";
  const auto def = [&](const std::string& schema) { definitions.def(schema.c_str()); };
  def("linear_binary_cross_entropy_with_logits(" + linear + "Tensor");
  def("linear_binary_cross_entropy_with_grads(bool[3] wanted, Tensor? grad_loss, " + linear +
      "(Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  def("linear_binary_cross_entropy_differentiable_backward(bool[3] wanted, Tensor grad_loss, " +
      linear + "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  definitions.def("count_kept(Tensor target, int? ignore_index, bool ignore_nan=False) -> Tensor");
  definitions.def("scale_(Tensor(a!) grad_logits, Tensor grad_loss, bool zero_stays=False) -> ()");

  implement<BinaryCrossEntropyOperators>();
  implement<SigmoidFocalOperators>();
  implement_linear();
  for (const auto key : kBackends) {
    torch::Library& backend = implementations(key);
    backend.impl("count_kept", &count_kept);
    backend.impl("scale_", &scale_);
  }
  torch::Library& meta = implementations(c10::DispatchKey::Meta);
  meta.impl("count_kept", &meta::count_kept);
  meta.impl("scale_", &meta::scale_);
}

}  // namespace fused_bce
