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

// exp(-exponent - error), the error to first order
template <class Real>
FUSED_BCE_INLINE Real exp_minus_corrected(Real exponent, Real error) {
  const Real largest(Precision<typename Real::Scalar>::kLargestExponent);
  const Real rounded = select(Real(0) - largest > exponent, Real(INFINITY), exp_minus(exponent));
  return rounded - rounded * error;
}

// (exp(-minus_log_r) / (1 + e))^g = exp(-g minus_log_r) exp(-g sp). In the tail the first product
// is large, and its rounding error one of the exponent: it is put right to first order. For a
// target outside [0, 1] the base may be above 1, and the power infinite.
template <class Real>
FUSED_BCE_INLINE Real power_of(Real g, Real g_rest, Real minus_log_r, Real sp) {
  const Real exponent = g * minus_log_r;
  const Real error = fma(g_rest, minus_log_r, product_rest(g, minus_log_r, exponent));
  return exp_minus_corrected(exponent, error) * exp_minus(g * sp);
}

// The same of a logarithm that is high + low, so that its own rounding error does not count.
template <class Real>
struct Sum {
  Real high, low;
};

template <class Real>
FUSED_BCE_INLINE Real power_of(Real g, Real g_rest, Sum<Real> minus_log_r, Real sp) {
  const Real exponent = g * minus_log_r.high;
  const Real error =
      fma(g, minus_log_r.low,
          fma(g_rest, minus_log_r.high, product_rest(g, minus_log_r.high, exponent)));
  return exp_minus_corrected(exponent, error) * exp_minus(g * sp);
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
