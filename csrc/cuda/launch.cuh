// What the host hands to the kernels.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#include "broadcast.cuh"

namespace fused_bce {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;

// One even for no element: the mean of nothing is nan.
inline int64_t chunks_of(int64_t numel) { return numel > 0 ? (numel + kChunk - 1) / kChunk : 1; }

struct Arguments {
  Problem problem;
  DeviceBroadcast weight, pos_weight;
  DeviceBroadcast varying;    // the weight, or pos_weight, that is no number, if there is one
  DeviceBroadcast folded;     // grad_loss where it is part of the arithmetic,
  DeviceBroadcast grad_loss;  // or where it scales what was rounded: see Scaling
  bool zero_stays = false;
  uint32_t zero = 0;  // see zero_when_loaded
  unsigned chunks = 0;
  unsigned whole_chunks = 0;  // those that may be accessed in whole vectors
  double grad_scale = 1;      // unless the divisor is on the GPU
};

// Null for a single chunk, whose sum is the result.
struct Workspace {
  unsigned* ticket = nullptr;  // counts the blocks that have finished; null: none adds up
  double* sums = nullptr;      // [chunks]
};

template <class Kernel, class... Parameters>
void start(Kernel* kernel, unsigned blocks, cudaStream_t stream, const Parameters&... arguments) {
#if defined(__CUDACC__)
  kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
#else  // tests/emulator
  emulator::launch(blocks, kThreads, stream, [=] { kernel(arguments...); });
#endif
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// One translation unit for each dtype of the logits.
void launch_float16(const Arguments&, const Workspace&, unsigned blocks, cudaStream_t);
void launch_bfloat16(const Arguments&, const Workspace&, unsigned blocks, cudaStream_t);
void launch_float32(const Arguments&, const Workspace&, unsigned blocks, cudaStream_t);
void launch_float64(const Arguments&, const Workspace&, unsigned blocks, cudaStream_t);

}  // namespace fused_bce
