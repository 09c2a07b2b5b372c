// The arguments of a loss, from its forward pass to its backward pass.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "operators.h"

namespace fused_bce {

// The mean of targets some of which are ignored: they are counted once, for forward and
// backward.
inline bool needs_divisor(const LossOptions& o) {
  return !o.divisor && o.ignores() && o.reduction == at::Reduction::Mean;
}

template <class Arguments>
Arguments with_divisor(Arguments o) {
  static const auto count = find_operator<decltype(count_unignored)>("_count_unignored");
  if (needs_divisor(o)) o.divisor = count.call(o.target, o.ignore_index, o.ignore_nan);
  return o;
}

inline void restore(OptionalTensor& field, const at::Tensor& saved) {
  field = saved.defined() ? OptionalTensor(saved) : std::nullopt;
}
inline void restore(at::Tensor& field, const at::Tensor& saved) { field = saved; }
template <class T>
void restore(T& field, const at::IValue& saved) {
  field = saved.to<T>();
}
template <class T>
void restore(std::optional<T>& field, const at::IValue& saved) {
  field = saved.toOptional<T>();
}

// Tensors are unpacked in every backward, so that in-place edits are noticed.
template <class Loss>
void save_arguments(torch::autograd::AutogradContext* ctx, const typename Loss::Arguments& given) {
  constexpr size_t kMost = std::tuple_size_v<decltype(Loss::tie(given))>;
  torch::autograd::variable_list tensors;
  tensors.reserve(kMost);
  std::vector<at::IValue> values;
  values.reserve(kMost);
  const auto save = [&](const auto& field) {
    using T = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<T, OptionalTensor>)
      tensors.push_back(field.value_or(at::Tensor()));
    else if constexpr (kIsTensor<T>)
      tensors.push_back(field);
    else
      values.emplace_back(field);
  };
  std::apply([&](const auto&... fields) { (save(fields), ...); }, Loss::tie(given));
  ctx->save_for_backward(std::move(tensors));
  // In a tuple, whose numbers compiled autograd takes for constants
  ctx->saved_data["arguments"] = c10::ivalue::Tuple::create(std::move(values));
}

template <class Loss>
typename Loss::Arguments restore_arguments(const torch::autograd::AutogradContext& ctx,
                                           const torch::autograd::variable_list& tensors) {
  typename Loss::Arguments arguments = Loss::empty();
  const auto values = ctx.saved_data.at("arguments").toTuple();
  auto tensor = tensors.begin();
  auto value = values->elements().begin();
  const auto restore_next = [&](auto& field) {
    if constexpr (kIsTensor<std::decay_t<decltype(field)>>)
      restore(field, *tensor++);
    else
      restore(field, *value++);
  };
  std::apply([&](auto&... fields) { (restore_next(fields), ...); }, Loss::tie(arguments));
  return arguments;
}

}  // namespace fused_bce
