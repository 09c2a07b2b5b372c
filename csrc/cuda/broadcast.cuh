// Broadcast operands, a vector at a time, with one division for each vector.
#pragma once

#include "storage.cuh"

namespace fused_bce {

// Division of n < 2^31 by a fixed divisor: a multiplication and a shift (Granlund and Montgomery,
// 1994).
struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, magic) + n) >> shift;
  }
};

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

  // The channel of element i, and its place in the channel's run.
  __device__ __forceinline__ void locate(int64_t i, int64_t& channel, int64_t& in_run) const {
    if (narrow) {
      const uint32_t n = static_cast<uint32_t>(i);
      const uint32_t run = by_inner.quotient(n);
      in_run = n - run * by_inner.divisor;
      channel = run - by_channels.quotient(run) * by_channels.divisor;
    } else {
      const int64_t run = i / operand.inner;
      in_run = i - run * operand.inner;
      channel = run % operand.channels;
    }
  }
};

// The N values of an operand at i, i + 1, ...; 1 where it is absent.
template <class C, int N>
__device__ __forceinline__ void load_broadcast(const DeviceBroadcast& source, int64_t i,
                                               C (&values)[N]) {
  const Broadcast& b = source.operand;
  if (!b.data || b.channels == 1) {
    const C value = b.data ? load_any<C>(b.data, b.dtype, 0) : C(1);
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

}  // namespace fused_bce
