// The dtypes of operands, and the one dispatch over them, for host, SIMD and CUDA.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_BCE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_BCE_HOST_DEVICE inline
#endif

namespace fused_bce {

enum class DType : uint8_t {
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
  // Of targets only
  kBool,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
};

constexpr bool is_floating(DType dtype) { return dtype <= DType::kFloat64; }

// A byte that is not 0 is true.
struct Boolean {
  uint8_t byte;
};

// f(value) with a value of the type in which numbers of this dtype are stored. Half is a backend's
// types for those that C++ lacks: Half::Float16, Half::BFloat16. Integers are no floats: with
// with_float nothing is called for them, and nothing compiled.
template <class Half, class F>
FUSED_BCE_HOST_DEVICE void with_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(typename Half::Float16{});
    case DType::kBFloat16:
      return f(typename Half::BFloat16{});
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    default:
      return;
  }
}

template <class Half, class F>
FUSED_BCE_HOST_DEVICE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBool:
      return f(Boolean{});
    case DType::kUInt8:
      return f(uint8_t{});
    case DType::kInt8:
      return f(int8_t{});
    case DType::kInt16:
      return f(int16_t{});
    case DType::kInt32:
      return f(int32_t{});
    case DType::kInt64:
      return f(int64_t{});
    default:
      return with_float<Half>(dtype, f);
  }
}

}  // namespace fused_bce
