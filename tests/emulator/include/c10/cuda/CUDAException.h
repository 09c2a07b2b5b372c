// In the place of torch's header, which a torch without CUDA lacks.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

// As torch does, it forgets the error that it reports.
#define C10_CUDA_CHECK(call)                                       \
  do {                                                             \
    const cudaError_t error_of_call = call;                        \
    if (error_of_call != cudaSuccess) {                            \
      cudaGetLastError();                                          \
      throw std::runtime_error(cudaGetErrorString(error_of_call)); \
    }                                                              \
  } while (false)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
