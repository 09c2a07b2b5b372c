// What losses of a sigmoid have in common: the parts that keep their digits in the tails.
#pragma once

#include "elementary.h"

namespace fused_bce {

// With a = |x|: of sigmoid(x) and 1 - sigmoid(x), c is the smaller one and 1 - c the other; of
// softplus(x) and softplus(-x), sp is the smaller one and a + sp the other.
template <class Real>
struct Logistic {
  Real a;
  Real e;   // exp(-a)
  Real c;   // e / (1 + e)
  Real sp;  // log1p(e)
};

// sigmoid, of which a product of three factors has three times the error of e: half of it in
// excess, in both factors that are c, puts it right, in the tail, where all three are nearly e.
template <class Real>
FUSED_BCE_INLINE Real with_excess(Real sigmoid, Real e, Real lost) {
  return sigmoid - lost * fma(e, Real(-1.5), Real(1.5));
}

template <bool kByProducts, class Real>
FUSED_BCE_INLINE Logistic<Real> logistic(Real x) {
  const Real one(1);
  const Real a = abs(x);
  const auto [e, lost] = exp_minus_and_lost(a);
  const Real sigmoid = quotient(e, one + e);
  // From e - e c, as in bce.h, since powers multiply its error.
  const Real c = e - e * (kByProducts ? with_excess(sigmoid, e, lost) : sigmoid);
  return {a, e, c, log1p_beside(e, sigmoid)};
}

// factor * loss, whose limit is 0 where an infinite logit makes the factor 0 and the loss infinite.
template <class Real>
FUSED_BCE_INLINE Real vanishing_product(Real factor, Real loss) {
  return select(factor == Real(0), Real(0), factor * loss);
}

}  // namespace fused_bce
