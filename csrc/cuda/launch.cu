#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <atomic>

#include "launch.cuh"

namespace fused_bce {
namespace {

std::atomic<int64_t> most_blocks{INT32_MAX};

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

unsigned blocks_for(int64_t wanted) {
  return static_cast<unsigned>(std::min<int64_t>(wanted, most_blocks.load()));
}

Arguments prepare(const Problem& problem) {
  Arguments a;
  a.problem = problem;
  a.weight = DeviceBroadcast(problem.weight, problem.numel);
  a.pos_weight = DeviceBroadcast(problem.pos_weight, problem.numel);
  if (problem.grad_loss.channels == 1)
    a.grad_loss_number = problem.grad_loss;
  else
    a.grad_loss = DeviceBroadcast(problem.grad_loss, problem.numel);
  a.aligned = is_aligned(problem.logits.data) && is_aligned(problem.target.data) &&
              is_aligned(problem.grad_logits) &&
              (!has_losses(pass_of(problem)) || is_aligned(problem.loss));
  return a;
}

// Reads grad_loss on the device, and is over at once if it is 1: no synchronisation, no traffic.
template <class S, class C>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(S* grad_logits, int64_t numel, const void* grad_loss, DType grad_loss_dtype) {
  const C scale = load_any<C>(grad_loss, grad_loss_dtype, 0);
  if (scale == C(1)) return;
  constexpr int N = 16 / sizeof(S);
  const int64_t vectors = numel / N;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += stride) {
    const Pack<S, N> pack = load_pack<S, N>(grad_logits + i * N);
    C scaled[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      convert(pack.v[k], scaled[k]);
      scaled[k] *= scale;
    }
    store_pack<S, N>(narrow(scaled, S{}), grad_logits + i * N);
  }
  for (int64_t i = vectors * N + first; i < numel; i += stride) {
    C x;
    convert(grad_logits[i], x);
    convert(x * scale, grad_logits[i]);
  }
}

template <class S, class C>
void launch_scale(void* grad_logits, int64_t numel, const void* grad_loss, DType grad_loss_dtype,
                  cudaStream_t stream) {
  // Enough to keep any GPU busy, few enough to be over quickly when there is nothing to do.
  constexpr int64_t kMostBlocks = 2048;
  const int64_t wanted = (numel * static_cast<int64_t>(sizeof(S)) / 16 + kThreads) / kThreads;
  scale_kernel<S, C><<<blocks_for(std::min(wanted, kMostBlocks)), kThreads, 0, stream>>>(
      static_cast<S*>(grad_logits), numel, grad_loss, grad_loss_dtype);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void limit_cuda_blocks(int64_t most) { most_blocks.store(std::max<int64_t>(most, 1)); }

bool cuda_covers_current_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, scale_kernel<float, float>);
  if (error == cudaSuccess) return true;
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
    workspace.ticket = static_cast<unsigned*>(workspace_bytes);
    workspace.sums = reinterpret_cast<double*>(static_cast<char*>(workspace_bytes) + 16);
    C10_CUDA_CHECK(cudaMemsetAsync(workspace.ticket, 0, sizeof(unsigned), stream));
  }
  const Arguments a = prepare(problem);
  const unsigned blocks = blocks_for(chunks_of(problem.numel));
  switch (problem.logits.dtype) {
    case DType::kFloat16:
      return launch_float16(a, workspace, blocks, stream);
    case DType::kBFloat16:
      return launch_bfloat16(a, workspace, blocks, stream);
    case DType::kFloat32:
      return launch_float32(a, workspace, blocks, stream);
    case DType::kFloat64:
      return launch_float64(a, workspace, blocks, stream);
  }
}

void launch_cuda_scale(void* grad_logits, DType dtype, int64_t numel, const void* grad_loss,
                       DType grad_loss_dtype, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (numel == 0) return;
  switch (dtype) {
    case DType::kFloat16:
      return launch_scale<__half, float>(grad_logits, numel, grad_loss, grad_loss_dtype, stream);
    case DType::kBFloat16:
      return launch_scale<__nv_bfloat16, float>(grad_logits, numel, grad_loss, grad_loss_dtype,
                                                stream);
    case DType::kFloat32:
      return launch_scale<float, float>(grad_logits, numel, grad_loss, grad_loss_dtype, stream);
    case DType::kFloat64:
      return launch_scale<double, double>(grad_logits, numel, grad_loss, grad_loss_dtype, stream);
  }
}

}  // namespace fused_bce
