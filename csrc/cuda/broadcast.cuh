// Broadcast operands, a vector at a time, with one division for each vector.
#pragma once

#include "storage.cuh"

namespace fused_bce {

// Division of n < 2^31 by a fixed divisor, not 1: a multiplication and a shift (Granlund and
// Montgomery, 1994).
struct Divider {
  uint32_t minus_divisor = 0u - 2, magic = 1u << 31, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : minus_divisor(0 - d) {
    while ((uint64_t{2} << shift) < d) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + d - 1) / d);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return __umulhi(n, magic) >> shift;
  }
  // One instruction behind the quotient, which a subtraction would not be
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const {
    return quotient(n) * minus_divisor + n;
  }
};

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A Broadcast, prepared on the host.
struct DeviceBroadcast {
  Broadcast operand;
  bool narrow = false;  // indices fit the dividers
  Divider by_inner, by_channels;

  DeviceBroadcast() = default;
  DeviceBroadcast(const Broadcast& b, int64_t numel)
      : operand(b), narrow(0 < numel && numel < INT32_MAX) {
    if (!narrow) return;
    by_inner = Divider(static_cast<uint32_t>(b.inner));
    by_channels = Divider(static_cast<uint32_t>(b.channels));
  }

  __host__ __device__ __forceinline__ bool varies() const {
    return operand.data && operand.channels > 1;
  }
  // Whether a vector of n elements has its values in a vector of floats, or all in one float
  bool in_columns(int n) const {
    return in_floats() && operand.inner == 1 && operand.channels % n == 0 &&
           is_aligned(operand.data);
  }
  bool in_rows(int n) const { return in_floats() && operand.inner % n == 0; }
  bool in_floats() const {
    return narrow && operand.dtype == DType::kFloat32 && operand.stride == 1;
  }
  // Whether both have the same channel everywhere
  bool goes_with(const DeviceBroadcast& other) const {
    return operand.channels == other.operand.channels && operand.inner == other.operand.inner;
  }

  // The channel of element i, and its place in the channel's run.
  __device__ __forceinline__ void locate(int64_t i, int64_t& channel, int64_t& in_run) const {
    if (narrow) {
      const uint32_t n = static_cast<uint32_t>(i);
      const uint32_t run = operand.inner == 1 ? n : by_inner.quotient(n);
      in_run = n - run * static_cast<uint32_t>(operand.inner);
      channel = by_channels.remainder(run);
    } else {
      const int64_t run = i / operand.inner;
      in_run = i - run * operand.inner;
      channel = run % operand.channels;
    }
  }
};

// For an operand that is one number, or absent
template <class C>
__device__ __forceinline__ C load_number(const DeviceBroadcast& source) {
  const Broadcast& b = source.operand;
  return b.data ? load_any<C>(b.data, b.dtype, 0) : C(1);
}

// The N values of an operand at i, i + 1, ...; 1 where it is absent.
template <class C, int N>
__device__ __forceinline__ void load_broadcast(const DeviceBroadcast& source, int64_t i,
                                               C (&values)[N]) {
  const Broadcast& b = source.operand;
  if (!b.data || b.channels == 1) {
    const C value = load_number<C>(source);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = value;
    return;
  }
  int64_t channel, in_run;
  source.locate(i, channel, in_run);
  with_float<CudaHalf>(b.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* const first = static_cast<const S*>(b.data);
    const S* p = first + channel * b.stride;
    if (b.inner == 1 && b.stride == 1 && channel + N <= b.channels) {
#pragma unroll
      for (int k = 0; k < N; ++k) convert(p[k], values[k]);
      return;
    }
    // What is left of the run and of the channels; more than N is as good as N + 1.
    const auto left = [](int64_t n) { return static_cast<int>(n > N ? N + 1 : n); };
    int of_run = left(b.inner - in_run);
    int of_channels = left(b.channels - channel);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      convert(*p, values[k]);
      if (--of_run > 0) continue;
      of_run = left(b.inner);
      p += b.stride;
      if (--of_channels > 0) continue;
      of_channels = left(b.channels);
      p = first;
    }
  });
}

// For one in_columns(N), or with N = 1 in rows: the values from this channel on.
template <int N>
__device__ __forceinline__ void load_floats(const DeviceBroadcast& source, uint32_t channel,
                                            float (&values)[N]) {
  const float* const p = static_cast<const float*>(source.operand.data) + channel;
  if constexpr (N == 1) {
    values[0] = *p;
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + k);
      values[k] = four.x;
      values[k + 1] = four.y;
      values[k + 2] = four.z;
      values[k + 3] = four.w;
    }
  }
}

}  // namespace fused_bce
