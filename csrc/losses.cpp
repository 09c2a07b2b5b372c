// The pointwise operators: checks, a call as the kernels take it, launch. Once, for all backends.
#include <ATen/ExpandUtils.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <iterator>
#include <span>
#include <tuple>

#include "device.h"
#include "operands.h"
#include "ops.h"
#include "problem.h"
#include "stored_gradients.h"

namespace fused_bce {

using at::Tensor;

namespace {

void check_broadcasts_into(const Tensor& logits, const at::DimVector& broadcast) {
  TORCH_CHECK(logits.sizes() == broadcast, "output with shape ", logits.sizes(),
              " doesn't match the broadcast shape ", at::IntArrayRef(broadcast));
}

// In the order of torch's function, which names the sizes in its own order, too.
void check_operands(const Operands& o) {
  const Tensor &logits = o.logits, &target = o.target;
  TORCH_CHECK_VALUE(target.sizes() == logits.sizes(), "Target size (", target.sizes(),
                    ") must be the same as input size (", logits.sizes(), ")");
  TORCH_CHECK(target.device() == logits.device(), "logits are on ", logits.device(),
              " but target is on ", target.device());
  if (o.pos_weight)
    check_broadcasts_into(logits, at::infer_size_dimvector(o.pos_weight->sizes(), logits.sizes()));
  if (o.weight)
    check_broadcasts_into(logits, at::infer_size_dimvector(logits.sizes(), o.weight->sizes()));
}

void check_parameters(const Operands& o) {
  const auto table = with_formula_at(o.formula, [](auto formula) {
    return std::span<const Parameter>(decltype(formula)::type::kParameters);
  });
  for (size_t i = 0; i < table.size(); ++i) {
    const Parameter& p = table[i];
    TORCH_CHECK_VALUE(p.takes(o.parameters[i]), p.name, " must lie in [", p.least, ", ", p.most,
                      "] or be ", p.other, ", not ", o.parameters[i]);
  }
}

// Compared in float32, which holds all integers up to there.
Ignored ignored_of(OptionalIndex ignore_index, bool ignore_nan) {
  constexpr int64_t kMost = int64_t{1} << 24;
  Ignored ignored;
  ignored.nan = ignore_nan;
  if (ignore_index) {
    TORCH_CHECK_VALUE(-kMost < *ignore_index && *ignore_index < kMost,
                      "ignore_index must lie between -2**24 and 2**24, not ", *ignore_index);
    ignored.index = static_cast<double>(*ignore_index);
  }
  return ignored;
}

// A call with everything that its pointers refer to.
struct Call {
  c10::DeviceGuard device;
  Tensor reference, logits, target, weight, pos_weight, grad_loss, label_smoothing, divisor;
  Problem problem;

  Call(const Tensor& reference_, const Operands& o)
      : device(reference_.device()),
        reference(make_layout_reference(reference_)),
        logits(o.logits),
        target(o.target) {
    TORCH_CHECK_VALUE(o.reduction >= 0 && o.reduction < at::Reduction::END, o.reduction,
                      " is not a valid value for reduction");
    problem.formula = o.formula;
    check_parameters(o);
    std::copy(std::begin(o.parameters), std::end(o.parameters), problem.parameters);
    problem.reduction = static_cast<Reduction>(o.reduction);
    problem.numel = reference.numel();
    problem.logits.dtype = dtype_of("logits", logits.scalar_type());
    problem.target.dtype = target_dtype_of(target.scalar_type());
    const bool in_double = computes_in_double(problem);
    if (in_double && is_on_gpu(reference)) {
      // A float64 target alone is too rare for kernels of its own.
      problem.logits.dtype = DType::kFloat64;
      logits = logits.to(at::kDouble);
    }
    logits = in_layout_of(logits, reference);
    target = in_layout_of(target, reference);
    problem.logits.data = logits.const_data_ptr();
    problem.target.data = target.const_data_ptr();
    if (o.weight) {
      weight = *o.weight;
      problem.weight = broadcast_in_layout_of("weight", weight, reference, in_double);
    }
    if (o.pos_weight) {
      pos_weight = *o.pos_weight;
      problem.pos_weight = broadcast_in_layout_of("pos_weight", pos_weight, reference, in_double);
    }
    set_extras(o);
  }

  void set_extras(const Operands& o) {
    problem.ignored = ignored_of(o.ignore_index, o.ignore_nan);
    if (o.label_smoothing) set_label_smoothing(*o.label_smoothing);
    if (problem.reduction != Reduction::kMean) return;
    problem.divisor = static_cast<double>(problem.numel);
    if (o.divisor)
      set_divisor(*o.divisor);
    else if (problem.ignored.any())
      set_divisor(count_unignored(target, o.ignore_index, o.ignore_nan));
  }

  void set_label_smoothing(const Tensor& given) {
    problem.label_smoothing_on_gpu = find_scalar_on_gpu("label_smoothing", given, label_smoothing);
    if (problem.label_smoothing_on_gpu) return;
    const double value = given.item<double>();
    TORCH_CHECK_VALUE(0 <= value && value < 1, "label_smoothing must lie in [0, 1), not be ",
                      value);
    problem.target_scale = 1 - value;
    problem.target_shift = value / 2;
  }

  void set_divisor(const Tensor& given) {
    problem.divisor_on_gpu = find_scalar_on_gpu("divisor", given, divisor);
    if (problem.divisor_on_gpu) return;
    const double value = given.item<double>();
    problem.divisor = value == 0 ? 1 : value;
  }

  // The address of a scalar on the GPU, which `owner` keeps alive; null for one that the host
  // reads.
  const double* find_scalar_on_gpu(const char* name, const Tensor& given, Tensor& owner) const {
    TORCH_CHECK(given.dim() == 0, name, " has shape ", given.sizes(), ", but must be a number");
    if (!is_on_gpu(given)) return nullptr;
    TORCH_CHECK(given.device() == reference.device(), "logits are on ", reference.device(), " but ",
                name, " is on ", given.device());
    owner = given.to(at::kDouble);
    return owner.const_data_ptr<double>();
  }

  Tensor new_loss(at::ScalarType dtype) {
    const Tensor loss = problem.reduction == Reduction::kNone
                            ? allocate_like(reference, dtype)
                            : at::empty({}, reference.options().dtype(dtype));
    problem.loss = loss.mutable_data_ptr();
    problem.loss_dtype = dtype_of("loss", dtype);
    return loss;
  }

  void set_grad_loss(const Tensor& given) {
    grad_loss = given;
    const bool in_double = folds_grad_loss(problem) ? computes_in_double(problem)
                                                    : problem.logits.dtype == DType::kFloat64;
    problem.grad_loss = broadcast_in_layout_of("grad_loss", grad_loss, reference, in_double);
  }

  Tensor new_grad_logits() {
    const Tensor grad_logits = allocate_like(reference, logits.scalar_type());
    problem.grad_logits = grad_logits.mutable_data_ptr();
    return grad_logits;
  }

  // Each element is read before it is written.
  void overwrite_logits() { problem.grad_logits = logits.mutable_data_ptr(); }

  // In the dtype of the caller's logits, and in their layout, which the reference may not have had.
  static Tensor finished(const Tensor& grad_logits, const Tensor& logits) {
    return in_layout(grad_logits.to(logits.scalar_type()), dense_strides(logits));
  }

  void launch() {
    if constexpr (kHasCuda) {
      if (is_on_gpu(reference)) {
        const Tensor workspace =
            at::empty({cuda_workspace_bytes(problem)}, reference.options().dtype(at::kByte));
        return launch_cuda(problem, workspace.mutable_data_ptr(), current_stream());
      }
    }
    launch_cpu(problem);
  }
};

std::tuple<Tensor, Tensor> run_forward(const Operands& o, bool with_grad) {
  check_operands(o);
  const Tensor& reference = o.reduction == at::Reduction::None ? o.target : o.logits;
  Call call(reference, o);
  Tensor loss = call.new_loss(dtype_of_loss(o));
  const Tensor grad_logits = with_grad ? call.new_grad_logits() : Tensor();
  call.launch();
  return {std::move(loss), with_grad ? Call::finished(grad_logits, o.logits) : Tensor()};
}

}  // namespace

Tensor count_unignored(const Tensor& target, OptionalIndex ignore_index, bool ignore_nan) {
  const Ignored ignored = ignored_of(ignore_index, ignore_nan);
  const c10::DeviceGuard device(target.device());
  const Tensor dense = make_layout_reference(target);
  const Dense operand{dense.const_data_ptr(), target_dtype_of(dense.scalar_type())};
  Tensor count = at::zeros({}, target.options().dtype(at::kDouble));
  if constexpr (kHasCuda) {
    if (is_on_gpu(target)) {
      launch_cuda_count_unignored(operand, dense.numel(), ignored, count.mutable_data_ptr<double>(),
                                  current_stream());
      return count;
    }
  }
  *count.mutable_data_ptr<double>() = count_unignored_cpu(operand, dense.numel(), ignored);
  return count;
}

Tensor forward(const Operands& operands) {
  return std::get<0>(run_forward(operands, /*with_grad=*/false));
}

std::tuple<Tensor, Tensor> forward_with_grad(const Operands& operands) {
  return run_forward(operands, /*with_grad=*/true);
}

Tensor forward_over_logits(const Operands& o) {
  check_operands(o);
  Call call(o.logits, o);
  Tensor loss = call.new_loss(dtype_of_loss(o));
  call.overwrite_logits();
  call.launch();
  if (!call.logits.is_same(o.logits)) o.logits.copy_(call.logits);
  return loss;
}

void scale_(Tensor& grad_logits, const Tensor& grad_loss, bool zero_stays) {
  const c10::DeviceGuard device(grad_logits.device());
  const bool on_gpu = is_on_gpu(grad_logits);
  const bool aligned =
      !on_gpu || reinterpret_cast<uintptr_t>(grad_logits.const_data_ptr()) % 16 == 0;
  if (!aligned || !grad_logits.is_non_overlapping_and_dense()) {
    grad_logits.copy_(scaled_by_torch(grad_logits, grad_loss, zero_stays));
    return;
  }
  Scaling scaling;
  scaling.grad_logits = grad_logits.mutable_data_ptr();
  scaling.dtype = dtype_of("grad_logits", grad_logits.scalar_type());
  Tensor owner = grad_loss;
  scaling.grad_loss =
      broadcast_in_layout_of("grad_loss", owner, grad_logits, scaling.dtype == DType::kFloat64);
  scaling.zero_stays = zero_stays;
  if constexpr (kHasCuda) {
    if (on_gpu) return launch_cuda_scale(scaling, grad_logits.numel(), current_stream());
  }
  scale_cpu(scaling, grad_logits.numel());
}

Tensor backward(const Operands& o, const Tensor& grad_loss) {
  check_operands(o);
  const Tensor& logits = o.logits;
  const bool none = o.reduction == at::Reduction::None;
  TORCH_CHECK(none ? grad_loss.sizes() == logits.sizes() : grad_loss.numel() == 1,
              "grad_loss has shape ", grad_loss.sizes(), ", which is not that of the loss");
  Call call(logits, o);
  // Where logits were widened their gradient is rounded to their dtype first, as one is that was
  // stored in forward.
  const bool widened = call.logits.scalar_type() != logits.scalar_type();
  const bool scaled_last = widened && logits.scalar_type() != at::kHalf;
  if (!scaled_last) call.set_grad_loss(grad_loss);
  const Tensor grad_logits = call.new_grad_logits();
  call.launch();
  Tensor finished = Call::finished(grad_logits, logits);
  if (scaled_last) scale_(finished, grad_loss, call.problem.ignored.any());
  return finished;
}

}  // namespace fused_bce
