// Powers of probabilities, to an exponent that is a parameter of the formula.
#pragma once

#include <cmath>

#include "elementary.h"

namespace fused_bce {

// A parameter in the precision of the arithmetic
template <class Real>
FUSED_BCE_INLINE Real number(double value) {
  return Real(static_cast<typename Real::Scalar>(value));
}

// What that rounds off
template <class Real>
FUSED_BCE_INLINE Real rest(double value) {
  return number<Real>(value - static_cast<typename Real::Scalar>(value));
}

// An exponent, and what rounding took from it
template <class Real>
struct Exponent {
  Real value, rest;
};

template <class Real>
FUSED_BCE_INLINE Exponent<Real> exponent(double g) {
  return {number<Real>(g), rest<Real>(g)};
}

// of_positives t + of_negatives (1 - t), as the larger one less a part of the difference. Of that
// even the first digits that are lost count, since a logarithm may multiply them by 100.
template <class Real>
FUSED_BCE_INLINE Exponent<Real> mixed_exponent(double of_positives, double of_negatives, Real t) {
  const bool negatives = of_negatives >= of_positives;
  const auto most = exponent<Real>(negatives ? of_negatives : of_positives);
  const auto less =
      exponent<Real>(negatives ? of_negatives - of_positives : of_positives - of_negatives);
  const Real u = Real(1) - t;
  const Real share = negatives ? t : u;
  const Real share_rest = negatives ? Real(0) : (Real(1) - u) - t;
  const Real g = most.value - less.value * share;
  const Real lost = product_rest(less.value, share, most.value - g);
  return {g, most.rest - fma(less.rest, share, fma(less.value, share_rest, lost))};
}

// exp(-product - error), the error to first order
template <class Real>
FUSED_BCE_INLINE Real exp_minus_corrected(Real product, Real error) {
  const Real largest(Precision<typename Real::Scalar>::kLargestExponent);
  const Real rounded = select(Real(0) - largest > product, Real(INFINITY), exp_minus(product));
  return rounded - rounded * error;
}

// (exp(-minus_log_r) / (1 + e))^g = exp(-g minus_log_r) exp(-g sp). In the tail the first product
// is large, and its rounding error one of the exponent: it is put right to first order. For a
// target outside [0, 1] the base may be above 1, and the power infinite.
template <class Real>
FUSED_BCE_INLINE Real power_of(Exponent<Real> g, Real minus_log_r, Real sp) {
  const Real product = g.value * minus_log_r;
  const Real error = fma(g.rest, minus_log_r, product_rest(g.value, minus_log_r, product));
  return exp_minus_corrected(product, error) * exp_minus(g.value * sp);
}

// The same of a logarithm that is high + low, so that its own rounding error does not count.
template <class Real>
struct Sum {
  Real high, low;
};

template <class Real>
FUSED_BCE_INLINE Real power_of(Exponent<Real> g, Sum<Real> minus_log_r, Real sp) {
  const Real product = g.value * minus_log_r.high;
  const Real lost = product_rest(g.value, minus_log_r.high, product);
  const Real error = fma(g.value, minus_log_r.low, fma(g.rest, minus_log_r.high, lost));
  return exp_minus_corrected(product, error) * exp_minus(g.value * sp);
}

// minus_log(r) for r in (0, 1]. The product of n and ln 2's first part is exact, and at least as
// large as what is added to it, or r is 1.
template <class Real>
FUSED_BCE_INLINE Sum<Real> minus_log_as_sum(Real r) {
  using P = Precision<typename Real::Scalar>;
  const Real n = minus_exponent(r);
  const Real log1p = P::log1p(mantissa(r) - Real(1));
  const Real whole = n * Real(P::kLn2High);
  const Real part = fma(n, Real(P::kLn2Low), Real(0) - log1p);
  const Real high = whole + part;
  return {high, (whole - high) + part};
}

}  // namespace fused_bce
