// The kernels. One block takes a chunk of fixed size and leaves the sum of its losses; the block
// that finishes last adds the sums up in their order. So the bits depend neither on the number of
// blocks nor on the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <limits>
#include <type_traits>

#include "../formulas/formulas.h"
#include "broadcast.cuh"
#include "lane.cuh"
#include "launch.cuh"

namespace fused_bce {

constexpr int kWarp = 32;

// In the place of a target's type: any, known at run time only. For rare pairs.
struct AnyTarget {};

// Every number of the loop that is known when it is compiled.
template <class L, class T, bool kGeneral>
struct Shape {
  // The arithmetic's type
  using C = std::conditional_t<std::is_same_v<L, double>, double, float>;
  static constexpr bool kAnyTarget = std::is_same_v<T, AnyTarget>;
  static constexpr int kSmallest = kAnyTarget || sizeof(L) < sizeof(T) ? sizeof(L) : sizeof(T);
  // Elements of a vector: 16 bytes of the narrower operand
  static constexpr int kVector = 16 / kSmallest;
  // What a vector of targets is loaded as
  using Target = std::conditional_t<kAnyTarget, C, T>;
  // Vectors whose loads are under way together, as far as the registers suffice.
  static constexpr int kInFlight = kGeneral || kVector > 8 ? 1 : 2;
};

// Sum over the block in a fixed order, for thread 0.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double of_warps[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_down_sync(0xffffffffu, x, distance);
  __syncthreads();  // of an earlier sum
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / kWarp; ++w) x += of_warps[w];
  return x;
}

__device__ __forceinline__ double divisor_of(const Problem& p) {
  if (!p.divisor_on_gpu) return p.divisor;
  const double divisor = *p.divisor_on_gpu;
  return divisor == 0 ? 1 : divisor;
}

__device__ __forceinline__ void store_loss(const Problem& p, double sum) {
  store_any(sum / divisor_of(p), p.loss_dtype, 0, p.loss);
}

// Whether this is the block that finishes last; then it sees what the others wrote.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ __forceinline__ void add_up(const Problem& p, const Workspace& workspace) {
  if (!is_last_block(workspace.ticket)) return;
  const int64_t chunks = chunks_of(p.numel);
  constexpr int kInFlight = 8;  // loads: one after the other they would take their whole latency
  double sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads * kInFlight) {
    double sums[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = c + u * kThreads;
      sums[u] = at < chunks ? __ldcg(workspace.sums + at) : 0;
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) sum += sums[u];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) store_loss(p, sum);
}

// A vector of elements starting at i. Without kWhole memory is not aligned, or ends within it; what
// is missing is padded.
template <bool kWhole, class S, int N>
__device__ __forceinline__ Pack<S, N> load(const void* data, int64_t i, int64_t numel, S padding) {
  const S* p = static_cast<const S*>(data) + i;
  if constexpr (kWhole) {
    return load_pack<S, N>(p);
  } else {
    Pack<S, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.v[k] = i + k < numel ? p[k] : padding;
    return pack;
  }
}

template <bool kWhole, class S, int N>
__device__ __forceinline__ void store(const Pack<S, N>& pack, void* data, int64_t i,
                                      int64_t numel) {
  S* p = static_cast<S*>(data) + i;
  if constexpr (kWhole) {
    store_pack<S, N>(pack, p);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (i + k < numel) p[k] = pack.v[k];
  }
}

// A vector of targets: as they are stored, or brought to the arithmetic's type.
template <bool kWhole, class S>
__device__ __forceinline__ Pack<typename S::Target, S::kVector> load_target(const Dense& target,
                                                                            int64_t i,
                                                                            int64_t numel) {
  using T = typename S::Target;
  constexpr int N = S::kVector;
  const T zero{};
  if constexpr (S::kAnyTarget) {
    Pack<T, N> pack;
    with_dtype<CudaHalf>(target.dtype, [&](auto tag) {
      const auto* p = static_cast<const decltype(tag)*>(target.data) + i;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        pack.v[k] = zero;
        if (kWhole || i + k < numel) convert(p[k], pack.v[k]);
      }
    });
    return pack;
  } else {
    return load<kWhole, T, N>(target.data, i, numel, zero);
  }
}

// pos_weight, and the product of weight and of grad_loss where that is folded in.
template <class C, int N>
__device__ __forceinline__ void load_weights(const Arguments& a, int64_t at, C (&positive)[N],
                                             C (&factor)[N]) {
  load_broadcast(a.pos_weight, at, positive);
  load_broadcast(a.weight, at, factor);
  C folded[N];
  load_broadcast(a.folded, at, folded);
#pragma unroll
  for (int k = 0; k < N; ++k) factor[k] *= folded[k];
}

// What label smoothing makes of a target: target * scale + shift.
template <class C>
struct Smoothing {
  C scale, shift;

  __device__ __forceinline__ explicit Smoothing(const Problem& p)
      : scale(static_cast<C>(p.target_scale)), shift(static_cast<C>(p.target_shift)) {
    if (!p.label_smoothing_on_gpu) return;
    scale = static_cast<C>(1 - *p.label_smoothing_on_gpu);
    shift = static_cast<C>(*p.label_smoothing_on_gpu / 2);
  }
};

// The elements of one chunk that belong to this thread; returns the sum of their losses.
template <class S, class L, Pass kPass, bool kGeneral, bool kWhole, class Formula>
__device__ __forceinline__ double run_chunk(const Formula& formula, const Arguments& a,
                                            int64_t chunk, typename S::C grad_scale) {
  using C = typename S::C;
  using T = typename S::Target;
  constexpr int N = S::kVector;
  constexpr int kInFlight = S::kInFlight;
  constexpr int kStep = kThreads * N * kInFlight;
  static_assert(kChunk % kStep == 0);
  const Problem& p = a.problem;
  L outside;  // the loss of (-inf, 0) is 0
  convert(-std::numeric_limits<C>::infinity(), outside);
  const C ignore_index = static_cast<C>(p.ignored.index);
  const Smoothing<C> smoothing(p);

  double sum = 0;
  int64_t i = chunk * kChunk + static_cast<int64_t>(threadIdx.x) * N;
#pragma unroll 1
  for (int step = 0; step < kChunk / kStep; ++step, i += kStep) {
    Pack<L, N> logits[kInFlight];
    Pack<T, N> target[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = i + u * kThreads * N;
      logits[u] = load<kWhole, L, N>(p.logits.data, at, p.numel, outside);
      target[u] = load_target<kWhole, S>(p.target, at, p.numel);
    }
    C step_sum = 0;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = i + u * kThreads * N;
      if (!kWhole && at >= p.numel) break;
      C losses[N], grads[N];
      C positive[N], factor[N];
      if constexpr (kGeneral) load_weights(a, at, positive, factor);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        C x, given;
        convert(logits[u].v[k], x);
        convert(target[u].v[k], given);
        // A padded element must add nothing, whatever its weights are.
        const bool general = kGeneral && (kWhole || at + k < p.numel);
        const C t = general ? ::fma(given, smoothing.scale, smoothing.shift) : given;
        LossAndGrad<Lane<C>> r = formula.template evaluate<kGeneral>(
            Lane<C>(x), Lane<C>(t), Lane<C>(general ? positive[k] : C(1)));
        if (general) {
          const bool ignored = given == ignore_index || (p.ignored.nan && given != given);
          r.loss.v = ignored ? C(0) : r.loss.v * factor[k];
          r.grad.v = ignored ? C(0) : r.grad.v * factor[k];
        }
        if constexpr (has_sum(kPass)) step_sum += r.loss.v;
        losses[k] = r.loss.v;
        grads[k] = r.grad.v * grad_scale;
      }
      if constexpr (has_grad(kPass)) {
        Pack<L, N> stored = narrow(grads, L{});
        if (kPass == Pass::kGrad && a.grad_loss.operand.data) {
          C grad_loss[N];
          load_broadcast(a.grad_loss, at, grad_loss);
          stored = scaled(stored, grad_loss, a.zero_stays);
        }
        store<kWhole, L, N>(stored, p.grad_logits, at, p.numel);
      }
      if constexpr (has_losses(kPass))
        with_float<CudaHalf>(p.loss_dtype, [&](auto tag) {
          store<kWhole, decltype(tag), N>(narrow(losses, tag), p.loss, at, p.numel);
        });
    }
    if constexpr (has_sum(kPass)) sum += step_sum;
  }
  return sum;
}

// kGeneral: with weights, pos_weight, targets that are smoothed or ignored, or any of these, or
// with a grad_loss for each element that is folded in.
template <class Formula, class L, class T, Pass kPass, bool kGeneral>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const __grid_constant__ Arguments a, Workspace workspace) {
  using S = Shape<L, T, kGeneral>;
  using C = typename S::C;
  const Problem& p = a.problem;
  const Formula formula(p);
  C grad_scale = static_cast<C>(1 / divisor_of(p));
  const Broadcast& folded = a.folded.operand;
  if (!kGeneral && folded.data) grad_scale *= load_any<C>(folded.data, folded.dtype, 0);

  const int64_t chunks = chunks_of(p.numel);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const bool whole = a.aligned && (chunk + 1) * kChunk <= p.numel;
    double sum = whole ? run_chunk<S, L, kPass, kGeneral, true>(formula, a, chunk, grad_scale)
                       : run_chunk<S, L, kPass, kGeneral, false>(formula, a, chunk, grad_scale);
    if constexpr (has_sum(kPass)) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) {
        if (chunks == 1)
          store_loss(p, sum);
        else
          workspace.sums[chunk] = sum;
      }
    }
  }
  if constexpr (has_sum(kPass))
    if (chunks > 1) add_up(p, workspace);
}

template <class Formula, class L, class T, Pass kPass>
void launch_pass(const Arguments& a, const Workspace& workspace, unsigned blocks,
                 cudaStream_t stream) {
  auto* kernel = loss_kernel<Formula, L, T, kPass, true>;
  if constexpr (!std::is_same_v<T, AnyTarget>) {
    const Problem& p = a.problem;
    const bool general =
        p.weight.data || p.pos_weight.data || a.folded.operand.channels > 1 || has_extras(p);
    if (!general) kernel = loss_kernel<Formula, L, T, kPass, false>;
  }
  start(kernel, blocks, stream, a, workspace);
}

template <class Formula, class L, class T>
void launch_formula(const Arguments& a, const Workspace& workspace, unsigned blocks,
                    cudaStream_t stream) {
  switch (pass_of(a.problem)) {
    case Pass::kSum:
      return launch_pass<Formula, L, T, Pass::kSum>(a, workspace, blocks, stream);
    case Pass::kSumAndGrad:
      return launch_pass<Formula, L, T, Pass::kSumAndGrad>(a, workspace, blocks, stream);
    case Pass::kLosses:
      return launch_pass<Formula, L, T, Pass::kLosses>(a, workspace, blocks, stream);
    case Pass::kLossesAndGrad:
      return launch_pass<Formula, L, T, Pass::kLossesAndGrad>(a, workspace, blocks, stream);
    case Pass::kGrad:
      return launch_pass<Formula, L, T, Pass::kGrad>(a, workspace, blocks, stream);
  }
}

template <class L, class T>
void launch_pair(const Arguments& a, const Workspace& workspace, unsigned blocks,
                 cudaStream_t stream) {
  with_formula(a.problem, [&](const auto& formula) {
    using Formula = std::decay_t<decltype(formula)>;
    launch_formula<Formula, L, T>(a, workspace, blocks, stream);
  });
}

}  // namespace fused_bce
