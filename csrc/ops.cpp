// The operators: schemas, checks, layouts, allocation. Once, for all backends.
#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "cpu/allocator.h"
#include "problem.h"

#if defined(FUSED_BCE_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_bce {
namespace {

using at::Tensor;

bool is_integer(at::ScalarType type) { return at::isIntegralType(type, /*includeBool=*/true); }

// NotImplementedError for what neither is a float nor, if they are allowed, an integer.
DType dtype_of(const char* name, at::ScalarType type, bool integers = false) {
  switch (type) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    default:
      break;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(integers && is_integer(type), name,
                              " must be float16, bfloat16, float32 or float64, not ", type);
  switch (type) {
    case at::kBool:
      return DType::kBool;
    case at::kByte:
      return DType::kUInt8;
    case at::kChar:
      return DType::kInt8;
    case at::kShort:
      return DType::kInt16;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, name, " must not be ", type);
  }
}

DType target_dtype_of(at::ScalarType type) { return dtype_of("target", type, /*integers=*/true); }

void check_broadcasts_into(const Tensor& logits, const at::DimVector& broadcast) {
  TORCH_CHECK(logits.sizes() == broadcast, "output with shape ", logits.sizes(),
              " doesn't match the broadcast shape ", at::IntArrayRef(broadcast));
}

// In the order of torch's function, which names the sizes in its own order, too.
void check_operands(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                    const OptionalTensor& pos_weight) {
  TORCH_CHECK_VALUE(target.sizes() == logits.sizes(), "Target size (", target.sizes(),
                    ") must be the same as input size (", logits.sizes(), ")");
  TORCH_CHECK(target.device() == logits.device(), "logits are on ", logits.device(),
              " but target is on ", target.device());
  if (pos_weight)
    check_broadcasts_into(logits, at::infer_size_dimvector(pos_weight->sizes(), logits.sizes()));
  if (weight)
    check_broadcasts_into(logits, at::infer_size_dimvector(logits.sizes(), weight->sizes()));
}

// Strides matter only along dimensions of more than one element.
bool has_strides(const Tensor& t, at::IntArrayRef strides) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  return true;
}

// Those of what torch computes from `t`: without its gaps, the dimensions in their order.
at::DimVector dense_strides(const Tensor& t) {
  if (t.is_non_overlapping_and_dense()) return at::DimVector(t.strides());
  return at::DimVector(at::infer_dense_strides(t.sizes(), t.strides()));
}

Tensor allocate(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const auto bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (options.device().is_cpu() && bytes >= kLargeBlock)
    return at::detail::empty_strided_generic(sizes, strides, large_block_allocator(),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  return at::empty_strided(sizes, strides, options);
}

// Itself if it is there already.
Tensor in_layout(const Tensor& t, at::IntArrayRef strides) {
  if (t.is_non_overlapping_and_dense() && has_strides(t, strides)) return t;
  return allocate(t.sizes(), strides, t.options()).copy_(t);
}

// The walk goes through memory in the order of this tensor.
Tensor anchor_of(const Tensor& t) { return in_layout(t, dense_strides(t)); }

// A new tensor along the walk.
Tensor allocate_like(const Tensor& anchor, at::ScalarType dtype) {
  return allocate(anchor.sizes(), anchor.strides(), anchor.options().dtype(dtype));
}

Tensor along_walk(const Tensor& t, const Tensor& anchor) { return in_layout(t, anchor.strides()); }

// The dimensions of the walk, outermost first.
c10::SmallVector<int64_t, 6> walk_order(const Tensor& anchor) {
  c10::SmallVector<int64_t, 6> order(anchor.dim());
  std::iota(order.begin(), order.end(), 0);
  if (!anchor.is_contiguous())
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return anchor.stride(a) > anchor.stride(b); });
  return order;
}

// Sizes and strides of `expanded` along the walk, merged where one step leads on to the next.
struct Dim {
  int64_t size, stride;
};
c10::SmallVector<Dim, 6> merged_dims(const Tensor& expanded, const Tensor& anchor) {
  c10::SmallVector<Dim, 6> dims;
  for (const int64_t d : walk_order(anchor)) {
    const Dim next{expanded.size(d), expanded.stride(d)};
    if (next.size == 1) continue;
    if (!dims.empty() && dims.back().stride == next.stride * next.size)
      dims.back() = {dims.back().size * next.size, next.stride};
    else
      dims.push_back(next);
  }
  return dims;
}

// `t` as an operand of the walk, not materialised if it varies along one (merged) dimension only.
// What it refers to is kept alive in `t`.
Broadcast broadcast_along(const char* name, Tensor& t, const Tensor& anchor, bool in_double) {
  TORCH_CHECK(!t.is_complex(), name, " must be real, not ", t.scalar_type());
  // A number on the CPU goes with any device. Filled in, not copied: a copy would not be safe in a
  // captured graph.
  if (t.is_cpu() && t.dim() == 0 && !anchor.is_cpu())
    t = at::full({}, t.item(), anchor.options().dtype(in_double ? at::kDouble : at::kFloat));
  TORCH_CHECK(t.device() == anchor.device(), "logits are on ", anchor.device(), " but ", name,
              " is on ", t.device());
  const bool readable = at::isFloatingType(t.scalar_type()) && !at::isFloat8Type(t.scalar_type());
  if (!readable || (t.scalar_type() == at::kDouble && !in_double))
    t = t.to(in_double ? at::kDouble : at::kFloat);

  const auto view = [&](int64_t channels, int64_t inner, int64_t stride) {
    return Broadcast{t.const_data_ptr(), dtype_of(name, t.scalar_type()), channels, inner, stride};
  };
  if (t.numel() == 1) return view(1, 1, 0);

  const Tensor expanded = t.expand(anchor.sizes());
  const auto dims = merged_dims(expanded, anchor);
  auto d = dims.rbegin();
  const int64_t inner = d != dims.rend() && d->stride == 0 ? (d++)->size : 1;
  if (d != dims.rend()) {
    const Dim channels = *d++;
    const bool one_outer = d == dims.rend() || (d->stride == 0 && d + 1 == dims.rend());
    if (one_outer) return view(channels.size, inner, channels.stride);
  } else {
    return view(1, 1, 0);
  }
  t = along_walk(expanded, anchor);
  return view(anchor.numel(), 1, 1);
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

Tensor count_kept(const Tensor& target, OptionalIndex ignore_index, bool ignore_nan) {
  const Ignored ignored = ignored_of(ignore_index, ignore_nan);
  const c10::DeviceGuard device(target.device());
  const Tensor dense = anchor_of(target);
  const Dense operand{dense.const_data_ptr(), target_dtype_of(dense.scalar_type())};
  Tensor count = at::zeros({}, target.options().dtype(at::kDouble));
#if defined(FUSED_BCE_CUDA)
  if (target.is_cuda()) {
    launch_cuda_count_kept(operand, dense.numel(), ignored, count.mutable_data_ptr<double>(),
                           c10::cuda::getCurrentCUDAStream());
    return count;
  }
#endif
  *count.mutable_data_ptr<double>() = count_kept_cpu(operand, dense.numel(), ignored);
  return count;
}

// What a call may have beyond torch's own.
struct Extras {
  const OptionalTensor& label_smoothing;
  OptionalIndex ignore_index;
  bool ignore_nan;
  const OptionalTensor& divisor;
};

// A call with everything that its pointers refer to.
struct Call {
  c10::DeviceGuard device;
  Tensor anchor, logits, target, weight, pos_weight, grad_loss, label_smoothing, divisor;
  Problem problem;

  Call(const Tensor& anchor_, const Tensor& logits_, const Tensor& target_,
       const OptionalTensor& weight_, const OptionalTensor& pos_weight_, int64_t reduction,
       const Extras& extras)
      : device(anchor_.device()), anchor(anchor_of(anchor_)), logits(logits_), target(target_) {
    TORCH_CHECK_VALUE(reduction >= 0 && reduction < at::Reduction::END, reduction,
                      " is not a valid value for reduction");
    problem.reduction = static_cast<Reduction>(reduction);
    problem.numel = anchor.numel();
    problem.logits.dtype = dtype_of("logits", logits.scalar_type());
    problem.target.dtype = target_dtype_of(target.scalar_type());
    const bool in_double = computes_in_double(problem);
    if (in_double && anchor.is_cuda()) {
      // A float64 target alone is too rare for kernels of its own.
      problem.logits.dtype = DType::kFloat64;
      logits = logits.to(at::kDouble);
    }
    logits = along_walk(logits, anchor);
    target = along_walk(target, anchor);
    problem.logits.data = logits.const_data_ptr();
    problem.target.data = target.const_data_ptr();
    if (weight_) {
      weight = *weight_;
      problem.weight = broadcast_along("weight", weight, anchor, in_double);
    }
    if (pos_weight_) {
      pos_weight = *pos_weight_;
      problem.pos_weight = broadcast_along("pos_weight", pos_weight, anchor, in_double);
    }
    set_extras(extras);
  }

  void set_extras(const Extras& extras) {
    problem.ignored = ignored_of(extras.ignore_index, extras.ignore_nan);
    if (extras.label_smoothing) set_label_smoothing(*extras.label_smoothing);
    if (problem.reduction != Reduction::kMean) return;
    problem.divisor = static_cast<double>(problem.numel);
    if (extras.divisor)
      set_divisor(*extras.divisor);
    else if (problem.ignored.any())
      set_divisor(count_kept(target, extras.ignore_index, extras.ignore_nan));
  }

  void set_label_smoothing(const Tensor& given) {
    problem.label_smoothing_on_gpu = number_on_gpu("label_smoothing", given, label_smoothing);
    if (problem.label_smoothing_on_gpu) return;
    const double value = given.item<double>();
    TORCH_CHECK_VALUE(0 <= value && value < 1, "label_smoothing must lie in [0, 1), not be ",
                      value);
    problem.target_scale = 1 - value;
    problem.target_shift = value / 2;
  }

  void set_divisor(const Tensor& given) {
    problem.divisor_on_gpu = number_on_gpu("divisor", given, divisor);
    if (problem.divisor_on_gpu) return;
    const double value = given.item<double>();
    problem.divisor = value == 0 ? 1 : value;
  }

  // Where the GPU finds a number, which `kept` keeps alive; null if it is one that the host reads.
  const double* number_on_gpu(const char* name, const Tensor& given, Tensor& kept) const {
    TORCH_CHECK(given.dim() == 0, name, " has shape ", given.sizes(), ", but must be a number");
    if (given.is_cpu()) return nullptr;
    TORCH_CHECK(given.device() == anchor.device(), "logits are on ", anchor.device(), " but ", name,
                " is on ", given.device());
    kept = given.to(at::kDouble);
    return kept.const_data_ptr<double>();
  }

  Tensor new_loss(at::ScalarType dtype) {
    const Tensor loss = problem.reduction == Reduction::kNone
                            ? allocate_like(anchor, dtype)
                            : at::empty({}, anchor.options().dtype(dtype));
    problem.loss = loss.mutable_data_ptr();
    problem.loss_dtype = dtype_of("loss", dtype);
    return loss;
  }

  void set_grad_loss(const Tensor& given) {
    grad_loss = given;
    const bool in_double = folds_grad_loss(problem) ? computes_in_double(problem)
                                                    : problem.logits.dtype == DType::kFloat64;
    problem.grad_loss = broadcast_along("grad_loss", grad_loss, anchor, in_double);
  }

  Tensor new_grad_logits() {
    const Tensor grad_logits = allocate_like(anchor, logits.scalar_type());
    problem.grad_logits = grad_logits.mutable_data_ptr();
    return grad_logits;
  }

  // In the dtype of the caller's logits, and in their layout, which the walk may not have had.
  static Tensor finished(const Tensor& grad_logits, const Tensor& logits) {
    return in_layout(grad_logits.to(logits.scalar_type()), dense_strides(logits));
  }

  void launch() {
#if defined(FUSED_BCE_CUDA)
    if (anchor.is_cuda()) {
      const Tensor workspace =
          at::empty({cuda_workspace_bytes(problem)}, anchor.options().dtype(at::kByte));
      return launch_cuda(problem, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    }
#endif
    launch_cpu(problem);
  }
};

at::ScalarType dtype_of_loss(const Tensor& logits, const Tensor& target) {
  return is_integer(target.scalar_type()) ? logits.scalar_type() : target.scalar_type();
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& logits, const Tensor& target,
                                       const OptionalTensor& weight,
                                       const OptionalTensor& pos_weight, int64_t reduction,
                                       OptionalDtype dtype, const Extras& extras, bool with_grad) {
  check_operands(logits, target, weight, pos_weight);
  const Tensor& anchor = reduction == at::Reduction::None ? target : logits;
  Call call(anchor, logits, target, weight, pos_weight, reduction, extras);
  Tensor loss = call.new_loss(dtype.value_or(dtype_of_loss(logits, target)));
  const Tensor grad_logits = with_grad ? call.new_grad_logits() : Tensor();
  call.launch();
  return {std::move(loss), with_grad ? Call::finished(grad_logits, logits) : Tensor()};
}

Tensor forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
               const OptionalTensor& pos_weight, int64_t reduction, OptionalDtype dtype,
               const OptionalTensor& label_smoothing, OptionalIndex ignore_index, bool ignore_nan,
               const OptionalTensor& divisor, bool /*recompute*/) {
  return std::get<0>(run_forward(logits, target, weight, pos_weight, reduction, dtype,
                                 {label_smoothing, ignore_index, ignore_nan, divisor},
                                 /*with_grad=*/false));
}

std::tuple<Tensor, Tensor> forward_with_grad(const Tensor& logits, const Tensor& target,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& pos_weight, int64_t reduction,
                                             OptionalDtype dtype,
                                             const OptionalTensor& label_smoothing,
                                             OptionalIndex ignore_index, bool ignore_nan,
                                             const OptionalTensor& divisor) {
  return run_forward(logits, target, weight, pos_weight, reduction, dtype,
                     {label_smoothing, ignore_index, ignore_nan, divisor}, /*with_grad=*/true);
}

void scale_(Tensor& grad_logits, const Tensor& grad_loss, bool zero_stays) {
  const c10::DeviceGuard device(grad_logits.device());
  const bool on_gpu = !grad_logits.is_cpu();
  const bool aligned =
      !on_gpu || reinterpret_cast<uintptr_t>(grad_logits.const_data_ptr()) % 16 == 0;
  if (!aligned || !grad_logits.is_non_overlapping_and_dense()) {
    grad_logits.copy_(scaled_by_torch(grad_logits, grad_loss, zero_stays));
    return;
  }
  Scaling scaling;
  scaling.grad_logits = grad_logits.mutable_data_ptr();
  scaling.dtype = dtype_of("grad_logits", grad_logits.scalar_type());
  Tensor kept = grad_loss;
  scaling.grad_loss =
      broadcast_along("grad_loss", kept, grad_logits, scaling.dtype == DType::kFloat64);
  scaling.zero_stays = zero_stays;
#if defined(FUSED_BCE_CUDA)
  if (on_gpu)
    return launch_cuda_scale(scaling, grad_logits.numel(), c10::cuda::getCurrentCUDAStream());
#endif
  scale_cpu(scaling, grad_logits.numel());
}

Tensor backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                const OptionalTensor& weight, const OptionalTensor& pos_weight, int64_t reduction,
                const OptionalTensor& label_smoothing, OptionalIndex ignore_index, bool ignore_nan,
                const OptionalTensor& divisor) {
  check_operands(logits, target, weight, pos_weight);
  const bool none = reduction == at::Reduction::None;
  TORCH_CHECK(none ? grad_loss.sizes() == logits.sizes() : grad_loss.numel() == 1,
              "grad_loss has shape ", grad_loss.sizes(), ", which is not that of the loss");
  Call call(logits, logits, target, weight, pos_weight, reduction,
            {label_smoothing, ignore_index, ignore_nan, divisor});
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

constexpr c10::DispatchKey kBackends[] = {
    c10::DispatchKey::CPU,
#if defined(FUSED_BCE_CUDA)
    c10::DispatchKey::CUDA,
#endif
};

}  // namespace

void register_ops() {
  // Never destroyed: nobody unloads an extension module.
  static auto& definitions =
      *new torch::Library(torch::Library::DEF, "fused_bce", std::nullopt, __FILE__, __LINE__);
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
  // What backward is in torch's operations, hence differentiable.
  definitions.def(
      "differentiable_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, int reduction, Tensor? label_smoothing=None, int? ignore_index=None, "
      "bool ignore_nan=False, Tensor? divisor=None) -> Tensor");
  definitions.def("count_kept(Tensor target, int? ignore_index, bool ignore_nan=False) -> Tensor");
  definitions.def("scale_(Tensor(a!) grad_logits, Tensor grad_loss, bool zero_stays=False) -> ()");

  for (const auto key : kBackends) {
    auto* const library =
        new torch::Library(torch::Library::IMPL, "fused_bce", key, __FILE__, __LINE__);
    library->impl("binary_cross_entropy_with_logits", &forward);
    library->impl("forward_with_grad", &forward_with_grad);
    library->impl("backward", &backward);
    library->impl("scale_", &scale_);
    library->impl("count_kept", &count_kept);
  }
}

}  // namespace fused_bce
