#include "operands.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <numeric>

#include "cpu/allocator.h"

namespace fused_bce {

using at::Tensor;

namespace {

// Strides matter only along dimensions of more than one element.
bool has_strides(const Tensor& t, at::IntArrayRef strides) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  return true;
}

Tensor allocate(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const auto bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (options.device().is_cpu() && bytes >= kLargeBlock)
    return at::detail::empty_strided_generic(sizes, strides, large_block_allocator(),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  return at::empty_strided(sizes, strides, options);
}

// The dimensions in the order in which the kernels iterate, outermost first.
c10::SmallVector<int64_t, 6> iteration_order(const Tensor& reference) {
  c10::SmallVector<int64_t, 6> order(reference.dim());
  std::iota(order.begin(), order.end(), 0);
  if (!reference.is_contiguous())
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return reference.stride(a) > reference.stride(b);
    });
  return order;
}

// Sizes and strides of `expanded` in iteration order, merged where dimensions are contiguous.
struct Dim {
  int64_t size, stride;
};
c10::SmallVector<Dim, 6> merged_dims(const Tensor& expanded, const Tensor& reference) {
  c10::SmallVector<Dim, 6> dims;
  for (const int64_t d : iteration_order(reference)) {
    const Dim next{expanded.size(d), expanded.stride(d)};
    if (next.size == 1) continue;
    if (!dims.empty() && dims.back().stride == next.stride * next.size)
      dims.back() = {dims.back().size * next.size, next.stride};
    else
      dims.push_back(next);
  }
  return dims;
}

}  // namespace

std::optional<DType> find_dtype(at::ScalarType type) {
  for (const NamedDType& known : kDTypes)
    if (known.type == type) return known.dtype;
  return {};
}

DType dtype_of(const char* name, at::ScalarType type, bool integers) {
  const auto dtype = find_dtype(type);
  TORCH_CHECK_NOT_IMPLEMENTED(dtype && (integers || is_floating(*dtype)), name,
                              " must be float16, bfloat16, float32 or float64, not ", type);
  return *dtype;
}

at::DimVector dense_strides(const Tensor& t) {
  if (t.is_non_overlapping_and_dense()) return at::DimVector(t.strides());
  return at::DimVector(at::infer_dense_strides(t.sizes(), t.strides()));
}

Tensor in_layout(const Tensor& t, at::IntArrayRef strides) {
  if (t.is_non_overlapping_and_dense() && has_strides(t, strides)) return t;
  return allocate(t.sizes(), strides, t.options()).copy_(t);
}

Tensor make_layout_reference(const Tensor& t) { return in_layout(t, dense_strides(t)); }

Tensor in_layout_of(const Tensor& t, const Tensor& reference) {
  return in_layout(t, reference.strides());
}

Tensor allocate_like(const Tensor& t, at::ScalarType dtype) {
  return allocate(t.sizes(), dense_strides(t), t.options().dtype(dtype));
}

Broadcast broadcast_in_layout_of(const char* name, Tensor& t, const Tensor& reference,
                                 bool in_double) {
  TORCH_CHECK(!t.is_complex(), name, " must be real, not ", t.scalar_type());
  // A number on the CPU goes with any device. Filled in, not copied: a copy would not be safe in a
  // captured graph.
  if (t.is_cpu() && t.dim() == 0 && !reference.is_cpu())
    t = at::full({}, t.item(), reference.options().dtype(in_double ? at::kDouble : at::kFloat));
  TORCH_CHECK(t.device() == reference.device(), "logits are on ", reference.device(), " but ", name,
              " is on ", t.device());
  const bool readable = at::isFloatingType(t.scalar_type()) && !at::isFloat8Type(t.scalar_type());
  if (!readable || (t.scalar_type() == at::kDouble && !in_double))
    t = t.to(in_double ? at::kDouble : at::kFloat);

  const auto view = [&](int64_t channels, int64_t inner, int64_t stride) {
    return Broadcast{t.const_data_ptr(), dtype_of(name, t.scalar_type()), channels, inner, stride};
  };
  if (t.numel() == 1) return view(1, 1, 0);

  const Tensor expanded = t.expand(reference.sizes());
  const auto dims = merged_dims(expanded, reference);
  auto d = dims.rbegin();
  const int64_t inner = d != dims.rend() && d->stride == 0 ? (d++)->size : 1;
  if (d != dims.rend()) {
    const Dim channels = *d++;
    const bool one_outer = d == dims.rend() || (d->stride == 0 && d + 1 == dims.rend());
    if (one_outer) return view(channels.size, inner, channels.stride);
  } else {
    return view(1, 1, 0);
  }
  t = in_layout_of(expanded, reference);
  return view(reference.numel(), 1, 1);
}

}  // namespace fused_bce
