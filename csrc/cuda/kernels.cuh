// The kernels. One block takes a chunk of fixed size and leaves the sum of its losses; the block
// that finishes last, or a kernel after it, adds the sums up in their order. So the bits depend
// neither on the number of blocks nor on the device.
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

// How targets of bool are loaded: 16 at a time, and as many logits, so that the 16 bytes that a
// thread stores are not beside those of its neighbours; or as many as there are in 16 bytes of
// logits. A GPU shall decide: see benchmarks/choices.py.
#if defined(FUSED_BCE_OTHER_BOOL)
constexpr bool kWideBool = true;
#else
constexpr bool kWideBool = false;
#endif

// In the place of a target's type: any, known at run time only. For rare pairs.
struct AnyTarget {};

// What a kernel can do beside the formula.
enum class Variant {
  kPlain,    // nothing: no weights, targets as they are
  kExtras,   // targets that are smoothed or ignored
  kColumns,  // weights: each is one number, or has a vector of floats for a vector of elements
  kRows,     // weights: each is one number, or has one float for a vector of elements
  kGeneral,  // all of it, any layout and dtype of weights, and grad_loss with a number an element
  // All but the first smooth targets.
};

// Every number of the loop that is known when it is compiled.
template <class L, class T, Pass pass, Variant variant>
struct Shape {
  using Logits = L;
  static constexpr Pass kPass = pass;
  static constexpr Variant kVariant = variant;
  static constexpr bool kPlain = variant == Variant::kPlain;
  static constexpr bool kGeneral = variant == Variant::kGeneral;
  static constexpr bool kExtras = variant == Variant::kExtras || kGeneral;
  static constexpr bool kWeighs =
      variant == Variant::kColumns || variant == Variant::kRows || kGeneral;
  // Whether there may be a grad_loss that is part of the arithmetic. Plain, it is part of the
  // scale.
  static constexpr bool kFolds = pass == Pass::kGrad && std::is_same_v<L, __half>;
  static constexpr bool kHasFactor = kWeighs || (kFolds && !kPlain);
  // The arithmetic's type
  using C = std::conditional_t<std::is_same_v<L, double>, double, float>;
  static constexpr bool kAnyTarget = std::is_same_v<T, AnyTarget>;
  // Elements of a vector: 16 bytes of the logits, or of the targets of bool
  static constexpr int kVector = 16 / (kWideBool && std::is_same_v<T, Boolean> ? 1 : sizeof(L));
  // What a vector of targets is loaded as, and what its elements become
  using Target = std::conditional_t<kAnyTarget, C, T>;
  static constexpr bool kHard = kPlain && std::is_same_v<T, Boolean>;
  using Given = std::conditional_t<kHard, HardTarget, C>;
  // Vectors whose loads are under way together, and whose losses are added up in C
  static constexpr int kInFlight = kPlain && kVector <= 8 ? 2 : 1;
  // Steps in one turn of the loop, whose own instructions are few among those for 16 elements.
  static constexpr int kUnrolled = kGeneral ? 1 : 16 / (kVector * kInFlight);
};

// Blocks for which a multiprocessor's registers must suffice; 0: any number. In plain kernels ptxas
// issues loads earlier if it is told, and may take more registers. Other losses need more, and so
// do 16 weights.
template <class Formula, class S>
constexpr int blocks_at_once() {
  if (S::kPlain && std::is_same_v<typename S::C, float>)
    return std::is_same_v<Formula, BinaryCrossEntropy> ? 4 : 3;
  return S::kWeighs && S::kVector > 8 ? 2 : 0;
}

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

// By one block, in the order of the chunks
__device__ __forceinline__ void add_up(const Problem& p, const double* of_chunks, int64_t chunks) {
  constexpr int kInFlight = 8;  // loads: one after the other they would take their whole latency
  double sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads * kInFlight) {
    double sums[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = c + u * kThreads;
      sums[u] = at < chunks ? __ldcg(of_chunks + at) : 0;
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
template <class S>
class Weights {
  using C = typename S::C;
  static constexpr int N = S::kVariant == Variant::kRows ? 1 : S::kVector;
  C positive_[N], factor_[N];

 public:
  // Those that are one number
  __device__ __forceinline__ explicit Weights(const Arguments& a) {
    if constexpr (S::kWeighs && !S::kGeneral) {
      fill(positive_, a.pos_weight.varies() ? C(1) : load_number<C>(a.pos_weight));
      fill(factor_, a.weight.varies() ? C(1) : load_number<C>(a.weight));
    } else {
      fill(positive_, C(1));
      fill(factor_, C(1));
    }
    fold(a);
  }

  // The others, of the vector at i
  __device__ __forceinline__ void load(const Arguments& a, int64_t i) {
    if constexpr (S::kGeneral) {
      load_broadcast(a.pos_weight, i, positive_);
      load_broadcast(a.weight, i, factor_);
      fold(a, i);
    } else if constexpr (S::kWeighs) {
      const uint32_t n = static_cast<uint32_t>(i);
      const uint32_t run = S::kVariant == Variant::kRows ? a.varying.by_inner.quotient(n) : n;
      const uint32_t channel = a.varying.by_channels.remainder(run);
      if (a.pos_weight.varies()) load_floats(a.pos_weight, channel, positive_);
      if (a.weight.varies()) {
        load_floats(a.weight, channel, factor_);
        fold(a);
      }
    }
  }

  __device__ __forceinline__ C positive(int k) const { return positive_[k % N]; }
  __device__ __forceinline__ C factor(int k) const { return factor_[k % N]; }

 private:
  static __device__ __forceinline__ void fill(C (&values)[N], C value) {
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = value;
  }
  __device__ __forceinline__ void fold(const Arguments& a, int64_t i = 0) {
    if constexpr (S::kFolds) {
      C folded[N];
      if constexpr (S::kGeneral)
        load_broadcast(a.folded, i, folded);
      else
        fill(folded, load_number<C>(a.folded));
#pragma unroll
      for (int k = 0; k < N; ++k) factor_[k] *= folded[k];
    }
  }
};

// What is done to targets: smoothed they are target * scale + shift.
template <class C>
struct Extras {
  C ignore_index, scale, shift;
  bool ignores_nan;

  __device__ __forceinline__ explicit Extras(const Problem& p)
      : ignore_index(static_cast<C>(p.ignored.index)),
        scale(static_cast<C>(p.target_scale)),
        shift(static_cast<C>(p.target_shift)),
        ignores_nan(p.ignored.nan) {
    if (!p.label_smoothing_on_gpu) return;
    scale = static_cast<C>(1 - *p.label_smoothing_on_gpu);
    shift = static_cast<C>(*p.label_smoothing_on_gpu / 2);
  }
  __device__ __forceinline__ bool ignores(C target) const {
    return target == ignore_index || (ignores_nan && target != target);
  }
  __device__ __forceinline__ C smoothed(C target) const { return ::fma(target, scale, shift); }
};

// The elements of one chunk that belong to this thread; returns the sum of their losses.
template <class S, bool kWhole, class Formula>
__device__ __forceinline__ double run_chunk(const Formula& formula, const Arguments& a,
                                            int64_t chunk, typename S::C grad_scale) {
  using C = typename S::C;
  using L = typename S::Logits;
  using T = typename S::Target;
  constexpr int N = S::kVector;
  constexpr int kInFlight = S::kInFlight;
  constexpr int kStep = kThreads * N * kInFlight;
  static_assert(kChunk % kStep == 0);
  const Problem& p = a.problem;
  L outside;  // the loss of (-inf, 0) is 0
  convert(-std::numeric_limits<C>::infinity(), outside);
  const Extras<C> extras(p);
  Weights<S> weights(a);
  // Whichever variant it is, gradients have the bits of the formula without a pos_weight where
  // there are no weights.
  const bool weighs = S::kGeneral ? a.weight.operand.data || a.pos_weight.operand.data : S::kWeighs;

  double sum = 0;
  int64_t i = chunk * kChunk + static_cast<int64_t>(threadIdx.x) * N;
#pragma unroll(kWhole ? S::kUnrolled : 1)
  for (int step = 0; step < kChunk / kStep; ++step, i += kStep) {
    Pack<L, N> logits[kInFlight];
    Pack<T, N> target[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = i + u * kThreads * N;
      logits[u] = load<kWhole, L, N>(p.logits.data, at, p.numel, outside);
      target[u] = load_target<kWhole, S>(p.target, at, p.numel);
    }
    uint32_t zero = 0;
    if constexpr (kWhole && kInFlight > 1) zero = zero_when_loaded(a.zero, logits, target);
    if (kWhole || i < p.numel) weights.load(a, i);
    C step_sum = 0;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = i + u * kThreads * N;
      if (!kWhole && at >= p.numel) break;
      C x[N], losses[N], grads[N];
      typename S::Given given[N];
      widen(logits[u], x, zero);
      widen(target[u], given);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        // A padded element must add nothing, whatever its weights are.
        const bool inside = kWhole || at + k < p.numel;
        bool ignored = false;
        const Lane<C> logit(x[k]), positive(S::kWeighs && inside ? weights.positive(k) : C(1));
        LossAndGrad<Lane<C>> r;
        if constexpr (S::kHard) {
          r = formula.template evaluate<false>(logit, given[k], positive);
        } else {
          ignored = S::kExtras && inside && extras.ignores(given[k]);
          const Lane<C> t(!S::kPlain && inside ? extras.smoothed(given[k]) : given[k]);
          r = weighs ? formula.template evaluate<true>(logit, t, positive)
                     : formula.template evaluate<false>(logit, t, positive);
        }
        if (S::kHasFactor && inside) {
          r.loss.v = product(r.loss.v, weights.factor(k));
          r.grad.v = product(r.grad.v, weights.factor(k));
        }
        if (has_sum(S::kPass) && !ignored) step_sum += r.loss.v;
        losses[k] = ignored ? C(0) : r.loss.v;
        grads[k] = (ignored ? C(0) : r.grad.v) * grad_scale;
      }
      if constexpr (has_grad(S::kPass)) {
        Pack<L, N> stored = narrow(grads, L{});
        if (S::kPass == Pass::kGrad && a.grad_loss.operand.data) {
          C grad_loss[N];
          load_broadcast(a.grad_loss, at, grad_loss);
          stored = scaled(stored, grad_loss, a.zero_stays);
        }
        store<kWhole, L, N>(stored, p.grad_logits, at, p.numel);
      }
      if constexpr (has_losses(S::kPass))
        with_float<CudaHalf>(p.loss_dtype, [&](auto tag) {
          store<kWhole, decltype(tag), N>(narrow(losses, tag), p.loss, at, p.numel);
        });
    }
    if constexpr (has_sum(S::kPass)) sum += step_sum;
  }
  return sum;
}

// The chunks of this block, each of which leaves its sum
template <class S, class Formula>
__device__ __forceinline__ void run_chunks(const Formula& formula, const Arguments& a,
                                           const Workspace& workspace) {
  // Where the formula has one that takes its place for the usual numbers. Before the loop: what the
  // other needs is not computed.
  if constexpr (S::kPlain && requires { formula.is_usual(); })
    if (formula.is_usual()) return run_chunks<S>(typename Formula::Usual{formula}, a, workspace);

  using C = typename S::C;
  const Problem& p = a.problem;
  C grad_scale = static_cast<C>(p.divisor_on_gpu ? 1 / divisor_of(p) : a.grad_scale);
  if (S::kPlain && S::kFolds) grad_scale *= load_number<C>(a.folded);

  for (unsigned chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
    double sum = chunk < a.whole_chunks ? run_chunk<S, true>(formula, a, chunk, grad_scale)
                                        : run_chunk<S, false>(formula, a, chunk, grad_scale);
    if constexpr (has_sum(S::kPass)) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) {
        if (a.chunks == 1)
          store_loss(p, sum);
        else
          workspace.sums[chunk] = sum;
      }
    }
  }
}

template <class Formula, class L, class T, Pass kPass, Variant kVariant>
__global__ void __launch_bounds__(kThreads,
                                  (blocks_at_once<Formula, Shape<L, T, kPass, kVariant>>()))
    loss_kernel(const __grid_constant__ Arguments a, Workspace workspace) {
  using S = Shape<L, T, kPass, kVariant>;
  run_chunks<S>(Formula(a.problem), a, workspace);
  if constexpr (has_sum(kPass))
    if (workspace.ticket && is_last_block(workspace.ticket))
      add_up(a.problem, workspace.sums, a.chunks);
}

// The one with the fewest instructions that can do it
template <int kVector>
Variant variant_of(const Arguments& a) {
  const bool weighs = a.problem.weight.data || a.problem.pos_weight.data;
  if (a.folded.varies() || (weighs && a.problem.ignored.any())) return Variant::kGeneral;
  if (!weighs) return has_extras(a.problem) ? Variant::kExtras : Variant::kPlain;
  const auto both = [&](bool (DeviceBroadcast::*are)(int) const) {
    const auto fits = [&](const DeviceBroadcast& b) {
      return !b.varies() || (b.goes_with(a.varying) && (b.*are)(kVector));
    };
    return fits(a.weight) && fits(a.pos_weight);
  };
  if (both(&DeviceBroadcast::in_rows)) return Variant::kRows;
  return both(&DeviceBroadcast::in_columns) ? Variant::kColumns : Variant::kGeneral;
}

// The kernel of a variant if it is one of these, else the general one.
template <class Formula, class L, class T, Pass kPass, Variant... kVariants>
auto kernel_of(Variant variant) {
  // Integers do not have one to themselves.
  using General = std::conditional_t<std::is_integral_v<T>, AnyTarget, T>;
  auto* kernel = loss_kernel<Formula, L, General, kPass, Variant::kGeneral>;
  ((variant == kVariants ? void(kernel = loss_kernel<Formula, L, T, kPass, kVariants>) : void()),
   ...);
  return kernel;
}

// Mean and sum of cross entropy in float have all variants. Without weights integers go with
// kExtras.
template <class Formula, class L, class T, Pass kPass>
auto choose_kernel(const Arguments& a) {
  using S = Shape<L, T, kPass, Variant::kGeneral>;
  const Variant variant = variant_of<S::kVector>(a);
  constexpr bool kFew = has_losses(kPass) || std::is_same_v<typename S::C, double> ||
                        !std::is_same_v<Formula, BinaryCrossEntropy>;
  if constexpr (S::kAnyTarget || (kFew && std::is_integral_v<T>))
    return kernel_of<Formula, L, T, kPass>(variant);
  else if constexpr (std::is_integral_v<T>)
    return kernel_of<Formula, L, T, kPass, Variant::kExtras, Variant::kColumns, Variant::kRows>(
        variant == Variant::kPlain ? Variant::kExtras : variant);
  else if constexpr (kFew)
    return kernel_of<Formula, L, T, kPass, Variant::kPlain>(variant);
  else
    return kernel_of<Formula, L, T, kPass, Variant::kPlain, Variant::kExtras, Variant::kColumns,
                     Variant::kRows>(variant);
}

template <class Formula, class L, class T, Pass kPass>
void launch_pass(const Arguments& a, const Workspace& workspace, unsigned blocks,
                 cudaStream_t stream) {
  start(choose_kernel<Formula, L, T, kPass>(a), blocks, stream, a, workspace);
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
  // By its type: a formula is made on the device only.
  with_formula_at(a.problem.formula, [&](auto type) {
    using Formula = typename decltype(type)::type;
    // Each pair costs ten kernels: other losses have those with targets like the logits, and one
    // for all others.
    constexpr bool kOwn = std::is_same_v<Formula, BinaryCrossEntropy> || std::is_same_v<L, T>;
    launch_formula<Formula, L, std::conditional_t<kOwn, T, AnyTarget>>(a, workspace, blocks,
                                                                       stream);
  });
}

}  // namespace fused_bce
