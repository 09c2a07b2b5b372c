// The words of CUDA for g++, so that csrc/cuda runs on the host: included before a .cu file. The
// types are those of the real headers. What a GPU does with the words is in emulator.cpp, what the
// runtime does with launches in streams.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __launch_bounds__(...)
// A block has an operating system's thread to itself.
#undef __shared__
#define __shared__ static thread_local

// What the thread sanitizer must not see: it is the GPU's.
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))

namespace emulator {

// The thread of the kernel that is running.
struct Place {
  uint3 thread, block;
  dim3 grid;
};
const Place& here();

// Puts a kernel into a stream: see streams.cpp.
void launch(unsigned blocks, unsigned threads, cudaStream_t stream, std::function<void()> kernel);

// Until all threads of the block are there
void wait_for_block();
// What the lane `distance` further on in the warp gives, for which all lanes wait
double from_lane(double given, unsigned distance);
void fence();
// Around an atomic operation
void begin_atomic(void* address);
void end_atomic(void* address);

// The right values, off by up to what PTX allows: how much depends on the operand and the seed,
// which is 0 for right values.
float exp2(float t);
float reciprocal(float b);

[[noreturn]] void stop(const char* why);

template <class T>
const T& aligned(const T& at) {
  if (reinterpret_cast<uintptr_t>(&at) % sizeof(T)) stop("an access is not aligned");
  return at;
}

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace emulator

#define threadIdx (emulator::here().thread)
#define blockIdx (emulator::here().block)
#define gridDim (emulator::here().grid)

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __threadfence() { emulator::fence(); }

inline double __shfl_down_sync(unsigned mask, double value, unsigned distance) {
  if (mask != 0xffffffffu) emulator::stop("a shuffle without all lanes");
  return emulator::from_lane(value, distance);
}

template <class T>
EMULATOR_UNSEEN T atomicAdd(T* address, T value) {
  emulator::begin_atomic(address);
  const T before = *address;
  *address = before + value;
  emulator::end_atomic(address);
  return before;
}

template <class T>
T __ldcg(const T* p) {
  return emulator::aligned(*p);
}
template <class T>
T __ldcs(const T* p) {
  return emulator::aligned(*p);
}
template <class T>
void __stcs(T* p, T value) {
  *p = (emulator::aligned(*p), value);
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }
