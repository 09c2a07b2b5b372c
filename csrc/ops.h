// The operators fused_bce::* and what they are made of. operators.h has their argument lists,
// schemas.cpp their names and schemas.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "formulas/formulas.h"
#include "problem.h"

namespace torch {
class Library;
}

namespace fused_bce {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;
using OptionalIndex = std::optional<int64_t>;

// What every loss takes beside its operands.
struct LossOptions {
  static constexpr const char* kSchema =
      "int reduction=1, ScalarType? dtype=None, Tensor? label_smoothing=None, "
      "int? ignore_index=None, bool ignore_nan=False, Tensor? divisor=None";

  int64_t reduction = at::Reduction::Mean;
  // Of the loss: see dtype_of_loss. Of a linear layer's logits.
  OptionalDtype dtype = {};
  // A number, in a tensor because a float would become a constant of a compiled graph.
  OptionalTensor label_smoothing = {};
  OptionalIndex ignore_index = {};
  bool ignore_nan = false;
  // Of mean: the number of targets that are not ignored if absent.
  OptionalTensor divisor = {};

  bool ignores() const { return ignore_index || ignore_nan; }
  LossOptions& options() { return *this; }
  const LossOptions& options() const { return *this; }

  template <class O>
  static auto tie(O& o) {
    return std::tie(o.reduction, o.dtype, o.label_smoothing, o.ignore_index, o.ignore_nan,
                    o.divisor);
  }
};

// What a pointwise loss is called with.
struct Operands : LossOptions {
  int formula = 0;  // see kFormulaId
  at::Tensor logits, target;
  OptionalTensor weight;
  OptionalTensor pos_weight;
  Parameters parameters = {};
  // For autograd: whether the gradient waits for backward.
  bool recompute = false;
};

// losses.cpp: on dense operands of the CPU and, with CUDA, of a GPU. The loss; with it the gradient
// of the logits for grad_loss = 1; and that gradient alone, for any grad_loss.
at::Tensor forward(const Operands& operands);
std::tuple<at::Tensor, at::Tensor> forward_with_grad(const Operands& operands);
at::Tensor backward(const Operands& operands, const at::Tensor& grad_loss);
// The loss; its gradient takes the place of the logits.
at::Tensor forward_over_logits(const Operands& operands);
// How many targets are not ignored, a float64 number.
at::Tensor count_unignored(const at::Tensor& target, OptionalIndex ignore_index, bool ignore_nan);
// grad_logits *= grad_loss, one number or one for each element; whether a 0 stays 0 whatever that
// is.
void scale_(at::Tensor& grad_logits, const at::Tensor& grad_loss, bool zero_stays);

// autograd.cpp. Backward as ATen operations, hence differentiable.
at::Tensor differentiable_backward(const Operands& operands, const at::Tensor& grad_loss);
// The pointwise losses with their gradients
void register_autograd(torch::Library& library);

inline bool is_integer(at::ScalarType type) {
  return at::isIntegralType(type, /*includeBool=*/true);
}

// Unless another is asked for, that of the target for cross entropy, as torch's loss has it; for
// other losses the wider one of both, as torchvision's focal loss does. Integers have no say.
inline at::ScalarType dtype_of_loss(const Operands& o) {
  if (o.dtype) return *o.dtype;
  if (o.formula != kFormulaId<BinaryCrossEntropy>)
    return at::promoteTypes(o.logits.scalar_type(), o.target.scalar_type());
  return is_integer(o.target.scalar_type()) ? o.logits.scalar_type() : o.target.scalar_type();
}

inline at::ScalarType at_least_float(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Importing the module does this; it is no static initialiser, so that the version of torch is
// compared before torch is called.
void register_ops();

}  // namespace fused_bce
