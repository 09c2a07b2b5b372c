// Vectors as wide as the instruction set's registers, with the operations that
// formulas/elementary.h needs.
//
// Included inside the namespace and under the target of one instruction set: kernel_for_isa.h. The
// vector extensions of GCC and Clang give the operators on every architecture; only the width must
// be right, for a vector wider than the registers is split badly.
#pragma once

template <class T>
struct Register;
template <>
struct Register<float> {
  using Int = int32_t;
  typedef float Native __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Register<double> {
  using Int = int64_t;
  typedef double Native __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

#if FUSED_BCE_VECTOR_BYTES == 64
FUSED_BCE_INLINE __m512 minimum(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xffff, a, b); }
FUSED_BCE_INLINE __m512d minimum(__m512d a, __m512d b) { return _mm512_maskz_min_pd(0xff, a, b); }
#elif FUSED_BCE_VECTOR_BYTES == 32
FUSED_BCE_INLINE __m256 minimum(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
FUSED_BCE_INLINE __m256d minimum(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }
#elif defined(__x86_64__)
FUSED_BCE_INLINE __m128 minimum(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
FUSED_BCE_INLINE __m128d minimum(__m128d a, __m128d b) { return _mm_min_pd(a, b); }
#endif

template <class T>
struct Vec {
  using Scalar = T;
  using Int = typename Register<T>::Int;
  using Native = typename Register<T>::Native;
  using Mask = typename Register<T>::Mask;
  static constexpr int kLanes = kVectorBytes / sizeof(T);

  Native v;

  Vec() = default;
  FUSED_BCE_INLINE Vec(Native native) : v(native) {}
  // x - 0 is x for every x, a zero's sign included, so this is a mere broadcast.
  FUSED_BCE_INLINE explicit Vec(T scalar) : v(scalar - Native{}) {}

  static FUSED_BCE_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  FUSED_BCE_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof v); }

  friend FUSED_BCE_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSED_BCE_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSED_BCE_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSED_BCE_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FUSED_BCE_INLINE Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend FUSED_BCE_INLINE Mask operator==(Vec a, Vec b) { return a.v == b.v; }
  friend FUSED_BCE_INLINE Mask operator!=(Vec a, Vec b) { return a.v != b.v; }

  friend FUSED_BCE_INLINE Vec select(Mask m, Vec a, Vec b) { return m ? a.v : b.v; }
  // Contracted to one instruction where the target has it; the formula does not rely on that.
  friend FUSED_BCE_INLINE Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
  friend FUSED_BCE_INLINE Vec abs(Vec a) {
    return (Native)((Mask)a.v & std::numeric_limits<Int>::max());
  }
#if defined(__x86_64__)
  // One instruction, which gives its second operand where one of them is nan.
  friend FUSED_BCE_INLINE Vec at_most(Vec a, Vec bound) { return minimum(bound.v, a.v); }
#endif
  friend FUSED_BCE_INLINE Mask sign_bit(Vec a) { return (Mask)a.v < 0; }
  // y, with its sign changed where x is negative
  friend FUSED_BCE_INLINE Vec flip_sign(Vec y, Vec x) {
    return (Native)((Mask)y.v ^ ((Mask)x.v & std::numeric_limits<Int>::min()));
  }
  static constexpr int kMantissaBits = std::numeric_limits<T>::digits - 1;
  static constexpr Int kBias = std::numeric_limits<T>::max_exponent - 1;
  // y * 2^-n, n being the integer in the low bits of a number shifted by kRoundShift. The other
  // bits of the shift leave the word at the top.
  friend FUSED_BCE_INLINE Vec scale_exp2_minus(Vec y, Vec shifted) {
    return y.v * (Native)((kBias - (Mask)shifted.v) << kMantissaBits);
  }
  // x = mantissa(x) 2^-minus_exponent(x), the mantissa in [1, 2), for a positive normal number
  friend FUSED_BCE_INLINE Vec mantissa(Vec x) {
    constexpr Int kField = (Int{1} << kMantissaBits) - 1;
    return (Native)(((Mask)x.v & kField) | kBias << kMantissaBits);
  }
  // An integer becomes a number in the low bits of the shift.
  friend FUSED_BCE_INLINE Vec minus_exponent(Vec x) {
    const Vec shift(Precision<T>::kRoundShift);
    const Mask n = kBias - ((Mask)x.v >> kMantissaBits);
    return (Native)((Mask)shift.v + n) - shift.v;
  }
};
