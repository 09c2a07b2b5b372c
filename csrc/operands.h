// Operands as the kernels take them: dtypes, iteration order, broadcasts, allocation.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "problem.h"

namespace fused_bce {

// The dtypes that the kernels read: floats, and those of targets only.
struct NamedDType {
  const char* name;
  at::ScalarType type;
  DType dtype;
};
inline constexpr NamedDType kDTypes[] = {
    {"float16", at::kHalf, DType::kFloat16},  {"bfloat16", at::kBFloat16, DType::kBFloat16},
    {"float32", at::kFloat, DType::kFloat32}, {"float64", at::kDouble, DType::kFloat64},
    {"bool", at::kBool, DType::kBool},        {"uint8", at::kByte, DType::kUInt8},
    {"int8", at::kChar, DType::kInt8},        {"int16", at::kShort, DType::kInt16},
    {"int32", at::kInt, DType::kInt32},       {"int64", at::kLong, DType::kInt64},
};
std::optional<DType> find_dtype(at::ScalarType type);

// NotImplementedError for what neither is a float nor, if they are allowed, an integer.
DType dtype_of(const char* name, at::ScalarType type, bool integers = false);
inline DType target_dtype_of(at::ScalarType type) {
  return dtype_of("target", type, /*integers=*/true);
}

// The strides of what torch computes from `t`: without its gaps, the dimensions in their order.
at::DimVector dense_strides(const at::Tensor& t);

// `t` with these strides, itself if it has them.
at::Tensor in_layout(const at::Tensor& t, at::IntArrayRef strides);

// The kernels iterate in the memory order of this tensor, which is `t` or a dense copy.
at::Tensor make_layout_reference(const at::Tensor& t);
at::Tensor in_layout_of(const at::Tensor& t, const at::Tensor& reference);
// With these strides, the dense ones
at::Tensor allocate_like(const at::Tensor& t, at::ScalarType dtype);

// `t` broadcast to the sizes of the reference, not materialised if it varies along one (merged)
// dimension only. What it refers to is kept alive in `t`.
Broadcast broadcast_in_layout_of(const char* name, at::Tensor& t, const at::Tensor& reference,
                                 bool in_double);

}  // namespace fused_bce
