// One number in the words that formulas/elementary.h asks for: a vector of width one.
#pragma once

#include <climits>
#include <cstdint>

#include "../formulas/elementary.h"

namespace fused_bce {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  static constexpr Int kSign = INT32_MIN, kBias = 127;
  static constexpr int kMantissaBits = 23;
  static __device__ __forceinline__ Int of(float x) { return __float_as_int(x); }
  static __device__ __forceinline__ float number(Int bits) { return __int_as_float(bits); }
};
template <>
struct Bits<double> {
  using Int = long long;
  static constexpr Int kSign = LLONG_MIN, kBias = 1023;
  static constexpr int kMantissaBits = 52;
  static __device__ __forceinline__ Int of(double x) { return __double_as_longlong(x); }
  static __device__ __forceinline__ double number(Int bits) { return __longlong_as_double(bits); }
};

template <class T>
struct Lane {
  using Scalar = T;
  T v;

  Lane() = default;
  FUSED_BCE_INLINE explicit Lane(T scalar) : v(scalar) {}

  friend FUSED_BCE_INLINE Lane operator+(Lane a, Lane b) { return Lane(a.v + b.v); }
  friend FUSED_BCE_INLINE Lane operator-(Lane a, Lane b) { return Lane(a.v - b.v); }
  friend FUSED_BCE_INLINE Lane operator*(Lane a, Lane b) { return Lane(a.v * b.v); }
  friend FUSED_BCE_INLINE Lane operator/(Lane a, Lane b) { return Lane(a.v / b.v); }
  friend FUSED_BCE_INLINE bool operator>(Lane a, Lane b) { return a.v > b.v; }
  friend FUSED_BCE_INLINE bool operator==(Lane a, Lane b) { return a.v == b.v; }

  friend FUSED_BCE_INLINE Lane select(bool m, Lane a, Lane b) { return m ? a : b; }
  friend FUSED_BCE_INLINE Lane fma(Lane a, Lane b, Lane c) { return Lane(::fma(a.v, b.v, c.v)); }
  friend FUSED_BCE_INLINE Lane abs(Lane a) { return Lane(::fabs(a.v)); }
  friend FUSED_BCE_INLINE bool sign_bit(Lane a) { return Bits<T>::of(a.v) < 0; }
  friend FUSED_BCE_INLINE Lane flip_sign(Lane y, Lane x) {
    return Lane(Bits<T>::number(Bits<T>::of(y.v) ^ (Bits<T>::of(x.v) & Bits<T>::kSign)));
  }
  // See simd.h.
  friend FUSED_BCE_INLINE Lane mantissa(Lane x) {
    constexpr auto kOne = Bits<T>::kBias << Bits<T>::kMantissaBits;
    constexpr auto kField = (typename Bits<T>::Int{1} << Bits<T>::kMantissaBits) - 1;
    return Lane(Bits<T>::number((Bits<T>::of(x.v) & kField) | kOne));
  }
  friend FUSED_BCE_INLINE Lane minus_exponent(Lane x) {
    return Lane(static_cast<T>(Bits<T>::kBias - (Bits<T>::of(x.v) >> Bits<T>::kMantissaBits)));
  }
  friend FUSED_BCE_INLINE Lane product_rest(Lane a, Lane b, Lane y) {
    return Lane(::fma(a.v, b.v, -y.v));
  }
};

// a * b, rounded before anything is added to it
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// y * 2^-n, n being the integer in the low bits of a number shifted by kRoundShift
FUSED_BCE_INLINE Lane<double> scale_exp2_minus(Lane<double> y, Lane<double> shifted) {
  return Lane<double>(y.v * __longlong_as_double((1023 - __double_as_longlong(shifted.v)) << 52));
}

// Two instructions, with the bounds that PTX gives for their errors. nvcc knows them; the emulator
// in tests/emulator errs on purpose.

// 2^t, to 2 ULP
FUSED_BCE_INLINE float exp2_approximately(float t) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return emulator::exp2(t);
#endif
}

// 1 / b, to 1 ULP
FUSED_BCE_INLINE float reciprocal_approximately(float b) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(b));
  return result;
#else
  return emulator::reciprocal(b);
#endif
}

// In float the special-function unit takes the place of the polynomial: exp(-a) = 2^t, t = -a log2
// e, and the rounding error of t, which would cost 15 ULP, is put right to first order.
FUSED_BCE_INLINE Lane<float> exp_minus(Lane<float> a) {
  constexpr float kLog2e = 1.44269502f;
  // ln 2 in two parts
  constexpr float kLn2 = 0.693147182f;
  constexpr float kLn2Rest = -1.90465430e-9f;
  float bounded;
#if __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %1, %2;"
      : "=f"(bounded)
      : "f"(a.v), "f"(Precision<float>::kLargestExponent));
#else
  bounded = a.v > Precision<float>::kLargestExponent ? Precision<float>::kLargestExponent : a.v;
#endif
  // A plain product the compiler would compute twice, with both signs.
  const float minus_t = product(bounded, kLog2e);
  const float error = fmaf(minus_t, kLn2Rest, fmaf(minus_t, kLn2, -bounded));
  const float exp2 = exp2_approximately(-minus_t);
  return Lane<float>(fmaf(exp2, error, exp2));
}

// What is lost is the estimate's error, which is not known.
FUSED_BCE_INLINE Rounded<Lane<float>> exp_minus_and_lost(Lane<float> a) {
  return {exp_minus(a), Lane<float>(0)};
}
FUSED_BCE_INLINE Lane<float> with_excess(Lane<float> sigmoid, Lane<float>, Lane<float>) {
  return sigmoid;
}

// With y = e share = e - share, the mean of e and share is the hyperbolic sine of log1p(e), and the
// quotient of the two is 1 - y G(y): a polynomial with half the coefficients of one in e, to
// 2^-25.7 of the result (Remez, weighted).
FUSED_BCE_INLINE Lane<float> log1p_beside(Lane<float> e, Lane<float> share) {
  const float y = product(e.v, share.v);
  const float sinh = fmaf(-0.5f, y, e.v);
  const Lane<float> g =
      polynomial(Lane<float>(y), 0.1666654753f, -0.03330982595f, 0.006996763263f, -0.001218154299f);
  return Lane<float>(fmaf(-y, fmaf(sinh, g.v, 0.5f), e.v));
}

// See elementary.h: one instruction under a condition takes the place of a select before it.
template <class T>
FUSED_BCE_INLINE Lane<T> add_vanishing_product(Lane<T> a, Lane<T> factor, Lane<T> y) {
  return Lane<T>(factor.v == 0 ? y.v : ::fma(a.v, factor.v, y.v));
}

// A target that is known to be 0 or 1, in the place of a number, and its complement. Nothing is
// computed from the two but what becomes one select.
struct HardTarget {
  bool is_one;

  friend FUSED_BCE_INLINE HardTarget complement(HardTarget t) { return {!t.is_one}; }
  friend FUSED_BCE_INLINE HardTarget select(bool m, HardTarget a, HardTarget b) {
    return {m ? a.is_one : b.is_one};
  }
  template <class T>
  friend FUSED_BCE_INLINE Lane<T> operator-(HardTarget t, Lane<T> c) {
    return Lane<T>(t.is_one ? T(1) : T(0)) - c;
  }
};
template <class T>
FUSED_BCE_INLINE Lane<T> add_vanishing_product(Lane<T> a, HardTarget factor, Lane<T> y) {
  return Lane<T>(factor.is_one ? a.v + y.v : y.v);
}

// a / b for b in [1, 2]: the hardware's estimate and one step of Newton.
FUSED_BCE_INLINE Lane<float> quotient(Lane<float> a, Lane<float> b) {
  const float estimate = reciprocal_approximately(b.v);
  return Lane<float>(product(a.v, fmaf(estimate, fmaf(-b.v, estimate, 1.f), estimate)));
}

}  // namespace fused_bce
