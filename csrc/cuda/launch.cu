#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <atomic>

#include "kernels.cuh"

namespace fused_bce {
namespace {

std::atomic<int64_t> most_blocks{INT32_MAX};

// Whether the block that finishes last adds up the sums of chunks, which costs a memset before the
// kernel, and two fences and an atomic operation in each block; else a second kernel does. Both
// give the same bits. A GPU shall decide: see benchmarks/choices.py.
constexpr bool kAddsUpInLastBlock = true;
std::atomic<bool> adds_up_in_last_block{kAddsUpInLastBlock};

unsigned blocks_for(int64_t wanted) {
  return static_cast<unsigned>(std::min<int64_t>(wanted, most_blocks.load()));
}

Arguments prepare(const Problem& problem) {
  Arguments a;
  a.problem = problem;
  a.weight = DeviceBroadcast(problem.weight, problem.numel);
  a.pos_weight = DeviceBroadcast(problem.pos_weight, problem.numel);
  a.varying = a.weight.varies() ? a.weight : a.pos_weight;
  (folds_grad_loss(problem) ? a.folded : a.grad_loss) =
      DeviceBroadcast(problem.grad_loss, problem.numel);
  a.zero_stays = scaling_of(problem).zero_stays;
  const bool aligned = is_aligned(problem.logits.data) && is_aligned(problem.target.data) &&
                       is_aligned(problem.grad_logits) &&
                       (!has_losses(pass_of(problem)) || is_aligned(problem.loss));
  // 2^32 chunks would be more than any memory holds.
  a.chunks = static_cast<unsigned>(chunks_of(problem.numel));
  a.whole_chunks = aligned ? static_cast<unsigned>(problem.numel / kChunk) : 0;
  a.grad_scale = 1 / problem.divisor;
  return a;
}

__global__ void __launch_bounds__(kThreads)
    add_up_kernel(const __grid_constant__ Problem p, const double* sums, int64_t chunks) {
  add_up(p, sums, chunks);
}

void launch_loss(const Arguments& a, const Workspace& workspace, cudaStream_t stream) {
  const unsigned blocks = blocks_for(chunks_of(a.problem.numel));
  switch (a.problem.logits.dtype) {
    case DType::kFloat16:
      return launch_float16(a, workspace, blocks, stream);
    case DType::kBFloat16:
      return launch_bfloat16(a, workspace, blocks, stream);
    case DType::kFloat32:
      return launch_float32(a, workspace, blocks, stream);
    case DType::kFloat64:
      return launch_float64(a, workspace, blocks, stream);
    default:
      return;  // logits are no integers
  }
}

// If grad_loss is one number, which is read on the device, and that is 1, this is over at once: no
// synchronisation, no traffic.
template <class S>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const Scaling s, const DeviceBroadcast grad_loss, int64_t numel) {
  using C = std::conditional_t<std::is_same_v<S, double>, double, float>;
  constexpr int N = 16 / sizeof(S);
  const bool one_number = s.grad_loss.channels == 1;
  C factors[N];
  if (one_number) load_broadcast(grad_loss, 0, factors);
  if (one_number && factors[0] == C(1)) return;
  S* const grad_logits = static_cast<S*>(s.grad_logits);
  const int64_t vectors = numel / N;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += stride) {
    if (!one_number) load_broadcast(grad_loss, i * N, factors);
    const Pack<S, N> stored = load_pack<S, N>(grad_logits + i * N);
    store_pack<S, N>(scaled(stored, factors, s.zero_stays), grad_logits + i * N);
  }
  for (int64_t i = vectors * N + first; i < numel; i += stride) {
    C factor[1], x;
    load_broadcast(grad_loss, i, factor);
    convert(grad_logits[i], x);
    if (!s.zero_stays || x != 0) convert(x * factor[0], grad_logits[i]);
  }
}

// The sums are of integers, and so exact in any order.
template <class S, class C>
__global__ void __launch_bounds__(kThreads)
    count_unignored_kernel(const S* target, int64_t numel, bool aligned, Ignored ignored,
                           double* count) {
  const C index = static_cast<C>(ignored.index);
  const auto is_unignored = [&](S stored) {
    C value;
    convert(stored, value);
    return value != index && !(ignored.nan && value != value);
  };
  constexpr int N = 16 / sizeof(S);
  const int64_t vectors = aligned ? numel / N : 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int unignored = 0;
  for (int64_t i = first; i < vectors; i += stride) {
    const Pack<S, N> pack = load_pack<S, N>(target + i * N);
#pragma unroll
    for (int k = 0; k < N; ++k) unignored += is_unignored(pack.v[k]);
  }
  for (int64_t i = vectors * N + first; i < numel; i += stride)
    unignored += is_unignored(target[i]);
  const double unignored_in_block = block_sum(unignored);
  if (threadIdx.x == 0) atomicAdd(count, unignored_in_block);
}

// Blocks for a pass of 16 bytes a thread: enough to keep any GPU busy, few enough to be over
// quickly when there is nothing to do.
unsigned blocks_of_vectors(int64_t bytes) {
  constexpr int64_t kMostBlocks = 2048;
  return blocks_for(std::min(bytes / 16 / kThreads + 1, kMostBlocks));
}

template <class S>
void launch_count_unignored(const Dense& target, int64_t numel, const Ignored& ignored,
                            double* count, cudaStream_t stream) {
  using C = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const unsigned blocks = blocks_of_vectors(numel * static_cast<int64_t>(sizeof(S)));
  start(count_unignored_kernel<S, C>, blocks, stream, static_cast<const S*>(target.data), numel,
        is_aligned(target.data), ignored, count);
}

template <class S>
void launch_scale(const Scaling& scaling, int64_t numel, cudaStream_t stream) {
  const unsigned blocks = blocks_of_vectors(numel * static_cast<int64_t>(sizeof(S)));
  start(scale_kernel<S>, blocks, stream, scaling, DeviceBroadcast(scaling.grad_loss, numel), numel);
}

}  // namespace

void limit_cuda_blocks(int64_t most) { most_blocks.store(std::max<int64_t>(most, 1)); }
void add_up_in_last_cuda_block(bool choice) { adds_up_in_last_block.store(choice); }

bool cuda_covers_current_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&scale_kernel<float>));
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
    C10_CUDA_CHECK(error);  // of another call before, or of the driver: not an answer
    return true;
  }
  cudaGetLastError();  // an answer, not an error to report later
  return false;
}

int64_t cuda_workspace_bytes(const Problem& problem) {
  const int64_t chunks = chunks_of(problem.numel);
  return has_sum(pass_of(problem)) && chunks > 1
             ? 16 + chunks * static_cast<int64_t>(sizeof(double))
             : 0;
}

void launch_cuda(const Problem& problem, void* workspace_bytes, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Workspace workspace;
  if (workspace_bytes) {
    workspace.sums = reinterpret_cast<double*>(static_cast<char*>(workspace_bytes) + 16);
    if (adds_up_in_last_block) {
      workspace.ticket = static_cast<unsigned*>(workspace_bytes);
      C10_CUDA_CHECK(cudaMemsetAsync(workspace.ticket, 0, sizeof(unsigned), stream));
    }
  }
  launch_loss(prepare(problem), workspace, stream);
  if (workspace.sums && !workspace.ticket)
    start(add_up_kernel, 1, stream, problem, workspace.sums, chunks_of(problem.numel));
}

void launch_cuda_count_unignored(const Dense& target, int64_t numel, const Ignored& ignored,
                                 double* count, void* stream_handle) {
  if (numel == 0) return;
  with_dtype<CudaHalf>(target.dtype, [&](auto tag) {
    launch_count_unignored<decltype(tag)>(target, numel, ignored, count,
                                          static_cast<cudaStream_t>(stream_handle));
  });
}

void launch_cuda_scale(const Scaling& scaling, int64_t numel, void* stream_handle) {
  if (numel == 0) return;
  with_float<CudaHalf>(scaling.dtype, [&](auto tag) {
    launch_scale<decltype(tag)>(scaling, numel, static_cast<cudaStream_t>(stream_handle));
  });
}

}  // namespace fused_bce
