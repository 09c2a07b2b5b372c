// Reading any storage type into vectors of the arithmetic type, and writing it back, rounded once
// to nearest even. Included like simd.h.
#pragma once

#include "simd.h"

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct SimdHalf {
  using Float16 = FUSED_BCE_ISA::Float16;
  using BFloat16 = FUSED_BCE_ISA::BFloat16;
};

template <class S>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<Float16> = DType::kFloat16;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;

template <class S>
constexpr S kMinusInfinity = -std::numeric_limits<S>::infinity();
template <>
constexpr Float16 kMinusInfinity<Float16> = {0xfc00};
template <>
constexpr BFloat16 kMinusInfinity<BFloat16> = {0xff80};

using FloatVec = Vec<float>;
typedef uint32_t Unsigned32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

// 16 bits of storage to and from the low half of 32. Intrinsics where the generic conversion
// compiles to twice the instructions.
#if FUSED_BCE_VECTOR_BYTES == 64
FUSED_BCE_INLINE Unsigned32 load_bits16(const void* p) {
  return (Unsigned32)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
FUSED_BCE_INLINE void store_bits16(Unsigned32 bits, void* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
}
#elif FUSED_BCE_VECTOR_BYTES == 32
FUSED_BCE_INLINE Unsigned32 load_bits16(const void* p) {
  return (Unsigned32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
FUSED_BCE_INLINE void store_bits16(Unsigned32 bits, void* p) {
  const __m128i low = _mm256_castsi256_si128((__m256i)bits);
  const __m128i high = _mm256_extracti128_si256((__m256i)bits, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}
#else
FUSED_BCE_INLINE Unsigned32 load_bits16(const void* p) {
  Bits16 half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Unsigned32);
}
FUSED_BCE_INLINE void store_bits16(Unsigned32 bits, void* p) {
  const Bits16 half = __builtin_convertvector(bits, Bits16);
  std::memcpy(p, &half, sizeof half);
}
#endif

FUSED_BCE_INLINE FloatVec widen(const BFloat16* p) {
  return (FloatVec::Native)(load_bits16(p) << 16);
}

// Rounded in the high half of each word; nan stays nan.
FUSED_BCE_INLINE Unsigned32 rounded_to_bfloat16(FloatVec x) {
  const Unsigned32 bits = (Unsigned32)x.v;
  const Unsigned32 rounded = bits + 0x7fff + (bits >> 16 & 1);
  return x.v != x.v ? ~Unsigned32{} : rounded;
}

FUSED_BCE_INLINE void narrow(FloatVec x, BFloat16* p) {
  store_bits16(rounded_to_bfloat16(x) >> 16, p);
}

// A register of numbers of half a word, as its even and its odd ones: fewer instructions than one
// after the other, for what does not depend on their order.
struct Halves {
  FloatVec even, odd;
};
template <class L, class S>
constexpr bool kAreHalves = std::is_same_v<L, BFloat16> && std::is_same_v<S, BFloat16>;

constexpr uint32_t kHighHalf = 0xffff0000;

FUSED_BCE_INLINE Halves widen_halves(const BFloat16* p) {
  Unsigned32 words;
  std::memcpy(&words, p, sizeof words);
  return {(FloatVec::Native)(words << 16), (FloatVec::Native)(words & kHighHalf)};
}

FUSED_BCE_INLINE void narrow_halves(Halves x, BFloat16* p) {
  const Unsigned32 words =
      rounded_to_bfloat16(x.even) >> 16 | (rounded_to_bfloat16(x.odd) & kHighHalf);
  std::memcpy(p, &words, sizeof words);
}

#if FUSED_BCE_VECTOR_BYTES == 64
FUSED_BCE_INLINE FloatVec widen(const Float16* p) {
  return (FloatVec::Native)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
FUSED_BCE_INLINE void narrow(FloatVec x, Float16* p) {
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif FUSED_BCE_VECTOR_BYTES == 32
FUSED_BCE_INLINE FloatVec widen(const Float16* p) {
  return (FloatVec::Native)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FUSED_BCE_INLINE void narrow(FloatVec x, Float16* p) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FUSED_BCE_INLINE FloatVec widen(const Float16* p) {
  const Unsigned32 half = load_bits16(p);
  const Unsigned32 magnitude = (half & 0x7fff) << 13;
  // The exponents differ by 112; a multiplication also normalises what is subnormal in half.
  const FloatVec scaled = FloatVec((FloatVec::Native)magnitude) * FloatVec(0x1p112f);
  const Unsigned32 inf_or_nan = magnitude | 0x7f800000;
  const Unsigned32 bits = magnitude >= (0x7c00u << 13) ? inf_or_nan : (Unsigned32)scaled.v;
  return (FloatVec::Native)(bits | (half & 0x8000) << 16);
}

FUSED_BCE_INLINE void narrow(FloatVec x, Float16* p) {
  const Unsigned32 bits = (Unsigned32)x.v;
  const Unsigned32 magnitude = bits & 0x7fffffff;
  // Normal in half: move the exponent, round at bit 13. A carry may run into infinity, rightly.
  const Unsigned32 normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Subnormal in half: one unit is 2^-24, the last bit of a float in [0.5, 1).
  const FloatVec aligned = abs(x) + FloatVec(0.5f);
  const Unsigned32 subnormal = (Unsigned32)aligned.v - (Unsigned32)FloatVec(0.5f).v;
  const Unsigned32 infinity = Unsigned32{} + 0x7c00;
  const Unsigned32 quiet_nan = Unsigned32{} + 0x7e00;
  Unsigned32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? infinity : half;
  half = x.v != x.v ? quiet_nan : half;
  store_bits16(half | (bits >> 16 & 0x8000), p);
}
#endif

template <class T>
FUSED_BCE_INLINE Vec<T> widen(const T* p) {
  return Vec<T>::load(p);
}
template <class T>
FUSED_BCE_INLINE void narrow(Vec<T> x, T* p) {
  x.store(p);
}

// `count` numbers of storage S as numbers of type T. out has room for the last vector, which is
// filled up with `padding`.
template <class S>
void read(const S* p, int count, float padding, float* out) {
  constexpr int kLanes = FloatVec::kLanes;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) widen(p + i).store(out + i);
  if (i == count) return;
  S rest[kLanes] = {};
  std::memcpy(rest, p + i, (count - i) * sizeof(S));
  widen(rest).store(out + i);
  for (int k = count; k < i + kLanes; ++k) out[k] = padding;
}

template <class S>
void write(const float* in, int count, S* p) {
  constexpr int kLanes = FloatVec::kLanes;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(FloatVec::load(in + i), p + i);
  if (i == count) return;
  S rest[kLanes];
  narrow(FloatVec::load(in + i), rest);
  std::memcpy(p + i, rest, (count - i) * sizeof(S));
}

template <>
inline void write(const float* in, int count, double* p) {
  for (int k = 0; k < count; ++k) p[k] = in[k];
}

// In double the half types are rare: they are converted by way of float.
template <class S>
void read(const S* p, int count, double padding, double* out) {
  constexpr int kLanes = FloatVec::kLanes;
  int i = 0;
  for (; i < count; i += kLanes) {
    float lanes[kLanes];
    const int n = std::min(kLanes, count - i);
    read(p + i, n, 0.f, lanes);
    for (int k = 0; k < n; ++k) out[i + k] = lanes[k];
  }
  constexpr int kDoubleLanes = Vec<double>::kLanes;
  for (int k = count; k % kDoubleLanes != 0; ++k) out[k] = padding;
}
template <>
inline void read(const double* p, int count, double padding, double* out) {
  std::copy_n(p, count, out);
  for (int k = count; k % Vec<double>::kLanes != 0; ++k) out[k] = padding;
}

// Rounding to float first would round a half twice; a double keeps all bits that decide by
// rounding to odd: the float's last bit remembers that something was cut off.
inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || x != x || std::isinf(nearest)) return nearest;
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(x);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  bits = (bits - (away ? 1 : 0)) | 1;
  float odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return odd;
}

template <class S>
void write(const double* in, int count, S* p) {
  constexpr int kLanes = FloatVec::kLanes;
  for (int i = 0; i < count; i += kLanes) {
    float lanes[kLanes] = {};
    const int n = std::min(kLanes, count - i);
    for (int k = 0; k < n; ++k) lanes[k] = round_to_odd(in[i + k]);
    write(lanes, n, p + i);
  }
}
template <>
inline void write(const double* in, int count, float* p) {
  for (int k = 0; k < count; ++k) p[k] = static_cast<float>(in[k]);
}
template <>
inline void write(const double* in, int count, double* p) {
  std::memcpy(p, in, count * sizeof(double));
}
