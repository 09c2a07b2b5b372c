// The formulas that the kernels' loops go around. A new one costs a header like bce.h, its name in
// problem.h, and a line below.
//
// A formula is made of a Problem, from which it may take parameters. evaluate<kHasPosWeight>(x, t,
// p) gives the loss and its derivative for a logit, a target and, if there is one, a pos_weight;
// where a kernel is compiled without, p is 1. kTakesPosWeight says whether there ever is one.
#pragma once

#include "bce.h"
#include "focal.h"

namespace fused_bce {

// f(formula) with the one that the problem asks for
template <class F>
auto with_formula(const Problem& p, const F& f) {
  switch (p.formula) {
    case FormulaId::kSigmoidFocal:
      return f(SigmoidFocal(p));
    case FormulaId::kBinaryCrossEntropy:
      break;
  }
  return f(BinaryCrossEntropy(p));
}

}  // namespace fused_bce
