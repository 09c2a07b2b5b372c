// Where a tensor's operands are, and so which kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>

#if defined(FUSED_BCE_CUDA) && !defined(FUSED_BCE_EMULATES_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_bce {

#if defined(FUSED_BCE_EMULATES_CUDA)
// In tests/emulator the memory of the CPU is that of the GPU, unless the environment says
// otherwise.
constexpr bool kHasCuda = true;
inline bool is_on_gpu(const at::Tensor&) {
  static const bool emulates = !std::getenv("EMULATOR_OFF");
  return emulates;
}
inline void* current_stream() { return nullptr; }
#elif defined(FUSED_BCE_CUDA)
constexpr bool kHasCuda = true;
inline bool is_on_gpu(const at::Tensor& t) { return t.is_cuda(); }
inline void* current_stream() { return c10::cuda::getCurrentCUDAStream(); }
#else
constexpr bool kHasCuda = false;
inline bool is_on_gpu(const at::Tensor&) { return false; }
inline void* current_stream() { return nullptr; }
#endif

// Whether this build has code that runs on this device, which is the CPU or a GPU.
bool has_kernels_for(c10::Device device);

}  // namespace fused_bce
