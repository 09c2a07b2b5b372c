// Reading and writing the storage types, many elements at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../problem.h"

namespace fused_bce {

struct CudaHalf {
  using Float16 = __half;
  using BFloat16 = __nv_bfloat16;
};

// N elements, in accesses of 16 bytes where they are as many.
template <class S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Pack {
  S v[N];
};

// Whole vectors are streamed (evict first): every operand and every result passes by once. The
// intrinsics also keep the accesses whole; plain assignments are compiled to one for each element.
template <class S, int N>
__device__ __forceinline__ Pack<S, N> load_pack(const S* p) {
  Pack<S, N> pack;
  static_assert(sizeof pack % 16 == 0);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof pack / 16); ++i) {
    const int4 word = __ldcs(reinterpret_cast<const int4*>(p) + i);
    memcpy(static_cast<void*>(pack.v + i * (16 / sizeof(S))), &word, sizeof word);
  }
  return pack;
}

template <class S, int N>
__device__ __forceinline__ void store_pack(const Pack<S, N>& pack, S* p) {
  if constexpr (sizeof pack % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / 16); ++i) {
      int4 word;
      memcpy(&word, pack.v + i * (16 / sizeof(S)), sizeof word);
      __stcs(reinterpret_cast<int4*>(p) + i, word);
    }
  } else {
    *reinterpret_cast<Pack<S, N>*>(p) = pack;
  }
}

// Of targets only
__device__ __forceinline__ void convert(Boolean in, float& out) { out = in.byte != 0; }
__device__ __forceinline__ void convert(Boolean in, double& out) { out = in.byte != 0; }
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
// One instruction an element; the compiler by itself takes two for every other one.
template <int N>
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, N>& in, float (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    uint32_t two;
    memcpy(&two, in.v + k, sizeof two);
    out[k] = __int_as_float(static_cast<int>(two << 16));
    out[k + 1] = __int_as_float(static_cast<int>(two & 0xffff0000u));
  }
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
