// Reading and writing the storage types, many elements at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../problem.h"
#include "lane.cuh"

namespace fused_bce {

struct CudaHalf {
  using Float16 = __half;
  using BFloat16 = __nv_bfloat16;
};

// N elements, in accesses of 16 bytes where they are as many.
template <class S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Pack {
  // What is accessed at once
  using Word = std::conditional_t<sizeof(S) * N == 4, int,
                                  std::conditional_t<sizeof(S) * N == 8, int2, int4>>;
  static_assert(sizeof(S) * N % sizeof(Word) == 0);
  S v[N];
};

// Whole vectors are streamed (evict first): every operand and every result passes by once. The
// intrinsics also keep the accesses whole; plain assignments are compiled to one for each element.
template <class S, int N>
__device__ __forceinline__ Pack<S, N> load_pack(const S* p) {
  using Word = typename Pack<S, N>::Word;
  Pack<S, N> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(Word)); ++i) {
    const Word word = __ldcs(reinterpret_cast<const Word*>(p) + i);
    memcpy(static_cast<void*>(pack.v + i * (sizeof word / sizeof(S))), &word, sizeof word);
  }
  return pack;
}

template <class S, int N>
__device__ __forceinline__ void store_pack(const Pack<S, N>& pack, S* p) {
  using Word = typename Pack<S, N>::Word;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(Word)); ++i) {
    Word word;
    memcpy(&word, pack.v + i * (sizeof word / sizeof(S)), sizeof word);
    __stcs(reinterpret_cast<Word*>(p) + i, word);
  }
}

// Of targets only
__device__ __forceinline__ void convert(Boolean in, float& out) { out = in.byte != 0; }
__device__ __forceinline__ void convert(Boolean in, double& out) { out = in.byte != 0; }
__device__ __forceinline__ void convert(Boolean in, HardTarget& out) { out = {in.byte != 0}; }
template <class Integer, class C>
__device__ __forceinline__ std::enable_if_t<std::is_integral_v<Integer>> convert(Integer in,
                                                                                 C& out) {
  out = static_cast<C>(in);
}

__device__ __forceinline__ void convert(__half in, float& out) { out = __half2float(in); }
__device__ __forceinline__ void convert(__nv_bfloat16 in, float& out) {
  out = __bfloat162float(in);
}
__device__ __forceinline__ void convert(float in, float& out) { out = in; }
__device__ __forceinline__ void convert(float in, double& out) { out = in; }
__device__ __forceinline__ void convert(double in, float& out) { out = static_cast<float>(in); }
__device__ __forceinline__ void convert(double in, double& out) { out = in; }
__device__ __forceinline__ void convert(__half in, double& out) { out = __half2float(in); }
__device__ __forceinline__ void convert(__nv_bfloat16 in, double& out) {
  out = __bfloat162float(in);
}
__device__ __forceinline__ void convert(float in, __half& out) { out = __float2half_rn(in); }
__device__ __forceinline__ void convert(float in, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(in);
}
__device__ __forceinline__ void convert(double in, __half& out) { out = __double2half(in); }
__device__ __forceinline__ void convert(double in, __nv_bfloat16& out) {
  out = __double2bfloat16(in);
}

template <class S, int N, class C>
__device__ __forceinline__ void widen(const Pack<S, N>& in, C (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) convert(in.v[k], out[k]);
}
// One instruction an element; the compiler by itself takes two for every other one. zero is 0: see
// below.
template <int N>
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, N>& in, float (&out)[N],
                                      uint32_t zero = 0) {
  const uint32_t shift = 0x10000u + zero, mask = 0xffff0000u | zero;
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    uint32_t two;
    memcpy(&two, in.v + k, sizeof two);
    out[k] = __int_as_float(static_cast<int>(two * shift));
    out[k + 1] = __int_as_float(static_cast<int>(two & mask));
  }
}
template <class S, int N, class C>
__device__ __forceinline__ void widen(const Pack<S, N>& in, C (&out)[N], uint32_t /*zero*/) {
  widen(in, out);
}

// `zero` must be 0, and the compiler must not know: then so is the result, and what is computed
// with it waits for all of these vectors. To save registers ptxas would issue the last loads after
// the first vectors have been used up, in bfloat16; in float by itself it does not.
template <class L, class T, int N, int kVectors>
__device__ __forceinline__ uint32_t zero_when_loaded(uint32_t zero,
                                                     const Pack<L, N> (&logits)[kVectors],
                                                     const Pack<T, N> (&target)[kVectors]) {
  uint32_t any = 0;
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    // No more than an element: the compiler would put words of bytes together again.
    uint32_t of_logits = 0, of_target = 0;
    memcpy(&of_logits, logits[u].v, sizeof(L) < 4 ? sizeof(L) : 4);
    memcpy(&of_target, target[u].v, sizeof(T) < 4 ? sizeof(T) : 4);
    any |= of_logits | of_target;
  }
  return any & zero;
}

// Two elements in one instruction.
template <int N>
__device__ __forceinline__ Pack<__half, N> narrow(const float (&in)[N], __half) {
  Pack<__half, N> out;
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const __half2 two = __floats2half2_rn(in[i], in[i + 1]);
    out.v[i] = two.x;
    out.v[i + 1] = two.y;
  }
  return out;
}
template <int N>
__device__ __forceinline__ Pack<__nv_bfloat16, N> narrow(const float (&in)[N], __nv_bfloat16) {
  Pack<__nv_bfloat16, N> out;
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(in[i], in[i + 1]);
    out.v[i] = two.x;
    out.v[i + 1] = two.y;
  }
  return out;
}
template <class C, class S, int N>
__device__ __forceinline__ Pack<S, N> narrow(const C (&in)[N], S) {
  Pack<S, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) convert(in[i], out.v[i]);
  return out;
}

// Stored gradients, each times its factor: see Scaling.
template <class S, int N, class C>
__device__ __forceinline__ Pack<S, N> scaled(const Pack<S, N>& stored, const C (&factors)[N],
                                             bool zero_stays) {
  C out[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    convert(stored.v[k], out[k]);
    if (!zero_stays || out[k] != 0) out[k] *= factors[k];
  }
  return narrow(out, S{});
}

// For a dtype known at run time only: one branch, the same for all threads.
template <class C>
__device__ __forceinline__ C load_any(const void* data, DType dtype, int64_t i) {
  C value{};
  with_float<CudaHalf>(
      dtype, [&](auto tag) { convert(static_cast<const decltype(tag)*>(data)[i], value); });
  return value;
}

template <class C>
__device__ __forceinline__ void store_any(C value, DType dtype, int64_t i, void* data) {
  with_float<CudaHalf>(dtype,
                       [&](auto tag) { convert(value, static_cast<decltype(tag)*>(data)[i]); });
}

}  // namespace fused_bce
