// The loss of ordinary tensors, called from Python. On a small loss the checks of coverage.py and
// the argument parsing of torch.ops take a fifth of the time; here they are a few comparisons. What
// is out of the ordinary in any way is left to Python, which is the authority: None is returned,
// never an error for what Python would take.
#include "eager_loss.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "device.h"
#include "operands.h"
#include "operators.h"

namespace fused_bce {
namespace {

using at::Tensor;
using c10::DispatchKey;

// In the order of fused_bce.functional.binary_cross_entropy_with_logits, whose own keywords are a
// tuple, and beside it one of their defaults
enum Argument {
  kInput,
  kTarget,
  kWeight,
  kSizeAverage,
  kReduce,
  kReduction,
  kPosWeight,
  kExtras,
  kNoExtras,
  kArguments
};

// The dispatch keys of tensors that are nothing but numbers in memory
constexpr c10::DispatchKeySet kOrdinaryKeys({
    DispatchKey::CPU,
    DispatchKey::AutogradCPU,
    DispatchKey::AutocastCPU,
    DispatchKey::ADInplaceOrView,
#if defined(FUSED_BCE_CUDA)
    DispatchKey::CUDA,
    DispatchKey::AutogradCUDA,
    DispatchKey::AutocastCUDA,
#endif
});

// A float is another object in each call.
bool is_same(PyObject* a, PyObject* b) {
  return a == b || (PyFloat_CheckExact(a) && PyFloat_CheckExact(b) &&
                    PyFloat_AS_DOUBLE(a) == PyFloat_AS_DOUBLE(b));
}

bool extras_are_absent(PyObject* const* arguments) {
  PyObject *const extras = arguments[kExtras], *const defaults = arguments[kNoExtras];
  TORCH_CHECK_TYPE(PyTuple_Check(extras) && PyTuple_Check(defaults) &&
                       PyTuple_GET_SIZE(extras) == PyTuple_GET_SIZE(defaults),
                   "eager_loss takes two tuples of the same length");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(extras); ++i)
    if (!is_same(PyTuple_GET_ITEM(extras, i), PyTuple_GET_ITEM(defaults, i))) return false;
  return arguments[kSizeAverage] == Py_None && arguments[kReduce] == Py_None;
}

// No mode of torch functions, no torch.func, forward-mode differentiation or torch.jit.trace.
bool surroundings_are_ordinary() {
  return !at::impl::torch_function_mode_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
         !at::tracer::impl::is_dispatch_enabled();
}

bool is_ordinary(PyObject* object) {
  return THPVariable_CheckExact(object) &&
         (THPVariable_Unpack(object).key_set().raw_repr() & ~kOrdinaryKeys.raw_repr()) == 0;
}

bool has_floats(const Tensor& t) {
  const auto dtype = find_dtype(t.scalar_type());
  return dtype && is_floating(*dtype);
}

bool are_covered(const Tensor& input, const Tensor& target) {
  return has_floats(input) && find_dtype(target.scalar_type()) && input.sizes() == target.sizes() &&
         input.device() == target.device() && has_kernels_for(input.device());
}

// The weight if it is an ordinary one; `left` to Python if there is another.
OptionalTensor weight_in(PyObject* object, const Tensor& input, bool& left) {
  if (object == Py_None) return {};
  if (is_ordinary(object)) {
    const Tensor& weight = THPVariable_Unpack(object);
    if (has_floats(weight) && weight.device() == input.device() &&
        !(weight.requires_grad() && at::GradMode::is_enabled()))
      return weight;
  }
  left = true;
  return {};
}

std::optional<int64_t> reduction_in(PyObject* name) {
  if (!PyUnicode_CheckExact(name)) return {};
  if (PyUnicode_CompareWithASCIIString(name, "mean") == 0) return at::Reduction::Mean;
  if (PyUnicode_CompareWithASCIIString(name, "sum") == 0) return at::Reduction::Sum;
  if (PyUnicode_CompareWithASCIIString(name, "none") == 0) return at::Reduction::None;
  return {};
}

std::optional<Operands> ordinary_operands(PyObject* const* arguments) {
  if (!extras_are_absent(arguments) || !surroundings_are_ordinary() ||
      !is_ordinary(arguments[kInput]) || !is_ordinary(arguments[kTarget]))
    return {};
  const Tensor& input = THPVariable_Unpack(arguments[kInput]);
  const Tensor& target = THPVariable_Unpack(arguments[kTarget]);
  const auto reduction = reduction_in(arguments[kReduction]);
  if (!reduction || !are_covered(input, target)) return {};
  bool left = false;
  Operands operands;
  operands.logits = input;
  operands.target = target;
  operands.weight = weight_in(arguments[kWeight], input, left);
  operands.pos_weight = weight_in(arguments[kPosWeight], input, left);
  operands.reduction = *reduction;
  if (left) return {};
  return operands;
}

PyObject* eager_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kArguments, "eager_loss takes ", int{kArguments}, " arguments");
  const auto operands = ordinary_operands(arguments);
  if (!operands) Py_RETURN_NONE;
  Tensor loss;
  {
    const pybind11::gil_scoped_release no_gil;
    // Through the dispatcher: autograd, autocast, profilers and modes see the operator.
    loss = call_loss<Pointwise<BinaryCrossEntropy>>(*operands);
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef kEagerLoss[] = {
    {"eager_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&eager_loss)),
     METH_FASTCALL, "The loss, or None where Python has to decide how it is computed."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace fused_bce
