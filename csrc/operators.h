// Operators from a struct of arguments in the order of their schema: what the dispatcher calls,
// and calls through it, where tracers and subclasses see them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "formulas/formulas.h"
#include "ops.h"

namespace fused_bce {

template <class Signature>
auto find_operator(const std::string& name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("fused_bce::" + name).c_str(), "")
      .template typed<Signature>();
}

template <class T>
constexpr bool kIsTensor = std::is_same_v<T, at::Tensor> || std::is_same_v<T, OptionalTensor>;

// How the dispatcher passes an argument of this type
template <class T>
using Passed = std::conditional_t<kIsTensor<T>, const T&, T>;

// The operators of a loss, which has Arguments, empty() ones, and their order as tie(arguments).
// Other arguments of an operator come before those of the loss.
template <class Loss, class Tied = decltype(Loss::tie(std::declval<typename Loss::Arguments&>()))>
struct Operators;

template <class Loss, class... Fields>
struct Operators<Loss, std::tuple<Fields&...>> {
  using Arguments = typename Loss::Arguments;

  // What the dispatcher calls, around run(arguments, others...)
  template <auto run>
  struct Kernel;

  template <class Result, class... Others, Result (*run)(const Arguments&, Others...)>
  struct Kernel<run> {
    static Result call(Others... others, Passed<Fields>... fields) {
      Arguments arguments = Loss::empty();
      Loss::tie(arguments) = std::tie(fields...);
      return run(arguments, others...);
    }
  };

  template <class Result, class... Others>
  static auto find(const std::string& name) {
    return find_operator<Result(Others..., Passed<Fields>...)>(name);
  }

  template <class Operator, class... Others>
  static auto call(const Operator& op, const Arguments& arguments, const Others&... others) {
    return std::apply([&](const auto&... fields) { return op.call(others..., fields...); },
                      Loss::tie(arguments));
  }
};

template <class Loss, auto run>
constexpr auto* kKernel = &Operators<Loss>::template Kernel<run>::call;

// The loss through the dispatcher
template <class Loss>
at::Tensor call_loss(const typename Loss::Arguments& arguments) {
  static const auto op = Operators<Loss>::template find<at::Tensor>(Loss::kName);
  return Operators<Loss>::call(op, arguments);
}

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// A loss of single elements. Its operators take what its formula takes between the operands and
// what all losses take.
template <class Formula>
struct Pointwise {
  using Arguments = Operands;

  static constexpr const char* kName = Formula::kName;
  static std::string with_grad() { return std::string("_") + kName + "_with_grad"; }
  static std::string backward() { return std::string("_") + kName + "_backward"; }
  static std::string composite() { return std::string("_") + kName + "_composite"; }
  static std::string differentiable_backward() {
    return std::string("_") + kName + "_differentiable_backward";
  }

  // See ParameterTensors.
  static constexpr const char* kParameterTensors =
      "Tensor? first, Tensor? second, Tensor? third, Tensor? fourth, ";

  static std::string schema() {
    std::string own = Formula::kTakesPosWeight ? "Tensor? pos_weight=None, " : "";
    for (const Parameter& parameter : Formula::kParameters)
      own += std::string("float ") + parameter.name + "=" + parameter.preset + ", ";
    return "Tensor logits, Tensor target, Tensor? weight=None, " + own + LossOptions::kSchema +
           ", bool recompute=False";
  }

  template <class O>
  static auto tie(O& o) {
    return std::tuple_cat(
        std::tie(o.logits, o.target, o.weight), tie_pos_weight(o),
        tie_parameters(o, std::make_index_sequence<Formula::kParameters.size()>()),
        LossOptions::tie(o), std::tie(o.recompute));
  }

  static Operands empty() {
    Operands o;
    o.formula = kFormulaId<Formula>;
    return o;
  }

  static TensorPair call_with_grad(const Operands& o) {
    static const auto op = Operators<Pointwise>::template find<TensorPair>(with_grad());
    return Operators<Pointwise>::call(op, o);
  }

  static at::Tensor call_backward(const Operands& o, const at::Tensor& grad_loss) {
    static const auto op =
        Operators<Pointwise>::template find<at::Tensor, const at::Tensor&>(backward());
    return Operators<Pointwise>::call(op, o, grad_loss);
  }

 private:
  template <class O>
  static auto tie_pos_weight(O& o) {
    if constexpr (Formula::kTakesPosWeight)
      return std::tie(o.pos_weight);
    else
      return std::tuple<>();
  }

  template <class O, size_t... i>
  static auto tie_parameters(O& o, std::index_sequence<i...>) {
    return std::tie(o.parameters[i]...);
  }
};

}  // namespace fused_bce
