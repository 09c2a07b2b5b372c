#include "target_blocks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace fused_bce {

using at::Tensor;

TargetBlocks::TargetBlocks(const LinearOperands& o, int64_t most_elements) {
  if (!o.offsets) {
    dense_ = o.target;
    return;
  }
  labels_ = o.target.to(at::kLong);
  const Tensor places = at::arange(labels_.numel(), o.offsets->options().dtype(at::kLong));
  rows_ = at::searchsorted(*o.offsets, places, /*out_int32=*/false, /*right=*/true) - 1;
  // Of bool there is no maximum.
  if (o.values) values_ = o.values->to(at::promoteTypes(o.values->scalar_type(), at::kByte));
  if (labels_.is_cpu()) {
    Tensor order;
    std::tie(labels_, order) = labels_.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
    rows_ = rows_.index_select(0, order);
    if (o.values) values_ = values_.index_select(0, order);
  }
  const auto dtype = o.values ? values_.scalar_type() : at::kBool;
  buffer_ = at::zeros({most_elements + 1}, labels_.options().dtype(dtype));
}

Tensor TargetBlocks::block(Range rows, Range labels) {
  if (dense_.defined())
    return dense_.narrow(0, rows.begin, rows.size).narrow(1, labels.begin, labels.size);
  return sparse_block(rows, labels);
}

Range TargetBlocks::candidates(Range labels) const {
  if (!labels_.is_cpu()) return {0, labels_.numel()};
  const int64_t* const first = labels_.const_data_ptr<int64_t>();
  const int64_t* const last = first + labels_.numel();
  const auto begin = std::lower_bound(first, last, labels.begin);
  const auto end = std::lower_bound(begin, last, labels.begin + labels.size);
  return {begin - first, end - begin};
}

// Positives outside the block, and places that belong to no row, go to the last element: with a
// mask the host would have to wait for their number.
Tensor TargetBlocks::sparse_block(Range rows, Range labels) {
  if (written_.defined()) buffer_.index_fill_(0, written_, 0);
  const Range near = candidates(labels);
  const Tensor row = rows_.narrow(0, near.begin, near.size) - rows.begin;
  const Tensor label = labels_.narrow(0, near.begin, near.size) - labels.begin;
  const Tensor inside = (row >= 0)
                            .logical_and_(row < rows.size)
                            .logical_and_(label >= 0)
                            .logical_and_(label < labels.size);
  const int64_t nobodys = buffer_.numel() - 1;
  written_ = (row * labels.size + label).masked_fill_(inside.logical_not(), nobodys);
  if (values_.defined())
    // The largest where a label occurs twice in a row, so that the order does not matter.
    buffer_.scatter_reduce_(0, written_, values_.narrow(0, near.begin, near.size), "amax",
                            /*include_self=*/false);
  else
    buffer_.index_fill_(0, written_, 1);
  return buffer_.narrow(0, 0, rows.size * labels.size).view({rows.size, labels.size});
}

}  // namespace fused_bce
