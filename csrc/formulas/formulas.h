// The formulas that the kernels' loops go around. A new one costs a header like bce.h, its name in
// the list below, and itself as ATen operations, in composite/. A formula is made of a Problem,
// whose parameters are those of its table. evaluate<kHasPosWeight>(x, t, p) gives the loss and its
// derivative for a logit, a target and, if there is one, a pos_weight; where a kernel is compiled
// without, p is 1. kTakesPosWeight says whether there ever is one. The operators are called by
// kName.
#pragma once

#include <type_traits>

#include "asymmetric.h"
#include "bce.h"
#include "focal.h"
#include "quality_focal.h"
#include "varifocal.h"

namespace fused_bce {

template <class... Formula>
struct FormulaList {};

using Formulas = FormulaList<BinaryCrossEntropy, SigmoidFocal, QualityFocal, Varifocal, Asymmetric>;

// The place of a formula in the list: how plain data name it.
template <class Formula, class First, class... Rest>
constexpr int find_formula(FormulaList<First, Rest...>) {
  if constexpr (std::is_same_v<Formula, First>)
    return 0;
  else
    return 1 + find_formula<Formula>(FormulaList<Rest...>());
}

template <class Formula>
constexpr int kFormulaId = find_formula<Formula>(Formulas());

// f(std::type_identity<Formula>()) with the one of this place
template <class F, class First, class... Rest>
auto with_formula_at(int place, const F& f, FormulaList<First, Rest...>) {
  if constexpr (sizeof...(Rest) > 0)
    if (place != kFormulaId<First>) return with_formula_at(place, f, FormulaList<Rest...>());
  return f(std::type_identity<First>());
}

template <class F>
auto with_formula_at(int place, const F& f) {
  return with_formula_at(place, f, Formulas());
}

// f(formula) with the one that the problem asks for
template <class F>
auto with_formula(const Problem& p, const F& f) {
  return with_formula_at(p.formula,
                         [&](auto formula) { return f(typename decltype(formula)::type(p)); });
}

}  // namespace fused_bce
