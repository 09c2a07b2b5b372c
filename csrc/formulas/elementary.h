// The elementary functions that losses are made of, in operations that scalars and vectors share.
//
// Every backend instantiates this text. `Real` is a vector of numbers, one of them on a GPU; it
// brings operators, its element type Real::Scalar, and the operations
//   abs(x)  fma(a, b, c)  select(mask, if_true, if_false)
//   sign_bit(x)  flip_sign(y, x)  scale_exp2_minus(y, shifted)  mantissa(x)  minus_exponent(x)
// found by argument-dependent lookup. It may bring functions of its own in the place of those
// below, where the hardware has better ones. Nothing here knows of torch.
#pragma once

#if defined(__CUDACC__)
#define FUSED_BCE_INLINE __device__ __forceinline__
#else
#define FUSED_BCE_INLINE inline __attribute__((always_inline))
#endif

namespace fused_bce {

// c0 + x c1 + x^2 c2 + ...
template <class Real, class Scalar>
FUSED_BCE_INLINE Real polynomial(Real, Scalar c0) {
  return Real(c0);
}
template <class Real, class Scalar, class... Scalars>
FUSED_BCE_INLINE Real polynomial(Real x, Scalar c0, Scalars... rest) {
  return fma(polynomial(x, rest...), x, Real(c0));
}

// The numbers that depend on the precision. The coefficients are Chebyshev fits made with
// mpmath.chebyfit at 60 digits, except log1p in float, a minimax fit; the bounds beside them are
// relative errors of the exact polynomial.
template <class Scalar>
struct Precision;

template <>
struct Precision<float> {
  static constexpr float kLog2e = 1.44269504088896341f;
  // ln 2 in two parts; the first has 9 significant bits, so its product with n <= 127 is exact.
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  static constexpr float kRoundShift = 12582912.f;
  // exp(-a) has no normal result beyond; here it is 0.
  static constexpr float kLargestExponent = 88.02969187150841f;  // 127 ln 2

  // Halves the digits of a number.
  static constexpr float kSplit = 4097.f;

  // (exp(-r) - 1 + r) / r^2 for |r| <= ln 2 / 2, to 2^-26.9 of exp(-r)
  template <class Real>
  static FUSED_BCE_INLINE Real exp_remainder(Real r) {
    return polynomial(r, 0.5f, -0.16666576666119928f, 0.041666554212984150f,
                      -0.0083632328836826822f, 0.0013926250831497612f);
  }
  // log1p(e) on (0, 1] as e + e^2 Q(e): no division, and no digit lost for small e.
  template <class Real>
  static FUSED_BCE_INLINE Real log1p(Real e) {
    const Real q = polynomial(e, -0.499996479f, 0.33321322f, -0.248571582f, 0.191536332f,
                              -0.137537556f, 0.0792039822f, -0.0300654513f, 0.00536473906f);
    return fma(e * e, q, e);
  }
};

template <>
struct Precision<double> {
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01;  // 32 significant bits
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRoundShift = 6755399441055744.0;       // 1.5 * 2^52
  static constexpr double kLargestExponent = 709.08956571282405;  // 1023 ln 2

  static constexpr double kSplit = 134217729.0;

  // as above, to 2^-56.1
  template <class Real>
  static FUSED_BCE_INLINE Real exp_remainder(Real r) {
    return polynomial(r, 0.50000000000000010314, -0.1666666666666666746, 0.041666666666623820532,
                      -0.0083333333333300381973, 0.0013888888917367080562,
                      -0.00019841269863171556026, 2.4801521057868205199e-5,
                      -2.7557268276905696187e-6, 2.7620201591031548792e-7,
                      -2.5100472505694996003e-8);
  }
  // log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3. Written as e - s (e - R), where the rounding
  // error of s counts for a third. R / s^2 to 2^-62.
  template <class Real>
  static FUSED_BCE_INLINE Real log1p(Real e) {
    const Real s = e / (Real(2) + e);
    const Real z = s * s;
    const Real r =
        z * polynomial(z, 0.66666666666666666886, 0.39999999999999522505, 0.28571428571600099292,
                       0.22222222198236770557, 0.18181819897962714383, 0.15384543964860549287,
                       0.13335178631449255837, 0.1173427906130319746, 0.10845178394880014822,
                       0.074921437955507673008, 0.15630577800922850446);
    return e - s * (e - r);
  }
};

// The smaller one; nan if a is.
template <class Real>
FUSED_BCE_INLINE Real at_most(Real a, Real bound) {
  return select(a > bound, bound, a);
}

// A result y, and what rounding took from it: it is y (1 + lost), roughly.
template <class Real>
struct Rounded {
  Real y, lost;
};

// exp(-a) for a >= 0: a = n ln 2 + r, exp(-a) = 2^-n exp(-r). NaN stays NaN: it fails the
// comparison, and its polynomial is NaN whatever the scale.
template <class Real>
FUSED_BCE_INLINE Rounded<Real> exp_minus_and_lost(Real a) {
  using P = Precision<typename Real::Scalar>;
  const Real one(1);
  const Real bounded = at_most(a, Real(P::kLargestExponent));
  const Real shifted = fma(bounded, Real(P::kLog2e), Real(P::kRoundShift));
  const Real n = shifted - Real(P::kRoundShift);
  const Real r = fma(n, Real(-P::kLn2Low), fma(n, Real(-P::kLn2High), bounded));
  const Real slope = fma(P::exp_remainder(r), r, Real(-1));
  const Real y = fma(slope, r, one);
  return {scale_exp2_minus(y, shifted), fma(slope, r, one - y)};
}

template <class Real>
FUSED_BCE_INLINE Real exp_minus(Real a) {
  return exp_minus_and_lost(a).y;
}

// -log(r) for r > 0: r = 2^-n (1 + f), -log(r) = n ln 2 - log1p(f). Near 1 the difference
// cancels: this is right to units of the last place of ln 2, as the exponent of a power.
template <class Real>
FUSED_BCE_INLINE Real minus_log(Real r) {
  using P = Precision<typename Real::Scalar>;
  const Real n = minus_exponent(r);
  const Real log1p = P::log1p(mantissa(r) - Real(1));
  return fma(n, Real(P::kLn2High), fma(n, Real(P::kLn2Low), Real(0) - log1p));
}

// What rounding took from y = a b, by Dekker's halves: not every target has an fma that rounds
// once.
template <class Real>
FUSED_BCE_INLINE Real product_rest(Real a, Real b, Real y) {
  const Real split(Precision<typename Real::Scalar>::kSplit);
  const Real a_high = a * split - (a * split - a), a_low = a - a_high;
  const Real b_high = b * split - (b * split - b), b_low = b - b_high;
  return fma(a_low, b_low,
             fma(a_low, b_high, fma(a_high, b_low, fma(a_high, b_high, Real(0) - y))));
}

// log1p(e), where share = e / (1 + e) is there already
template <class Real>
FUSED_BCE_INLINE Real log1p_beside(Real e, Real /*share*/) {
  return Precision<typename Real::Scalar>::log1p(e);
}

// a factor + y, and y where the factor is 0, even if a is infinite
template <class Real>
FUSED_BCE_INLINE Real add_vanishing_product(Real a, Real factor, Real y) {
  return fma(select(factor == Real(0), Real(0), a), factor, y);
}

// 1 - t
template <class Real>
FUSED_BCE_INLINE Real complement(Real t) {
  return Real(1) - t;
}

// a / b for b in [1, 2]
template <class Real>
FUSED_BCE_INLINE Real quotient(Real a, Real b) {
  return a / b;
}

}  // namespace fused_bce
