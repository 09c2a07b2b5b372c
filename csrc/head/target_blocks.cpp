#include "target_blocks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace fused_bce {

using at::Tensor;

TargetBlocks::TargetBlocks(const LinearOperands& o, int64_t block_rows, int64_t block_labels)
    : block_elements_(block_rows * block_labels) {
  if (!o.offsets) {
    dense_ = o.target;
    return;
  }
  const int64_t rows = o.input.size(0), labels = o.linear_weight.size(0);
  const bool small = std::max(rows, labels) < std::numeric_limits<int32_t>::max();
  labels_ = o.target;
  // A label out of range must not become another in 32 bits.
  if (small && labels_.scalar_type() == at::kLong) labels_ = labels_.clamp(-1, labels);
  labels_ = labels_.to(small ? at::kInt : at::kLong);
  // Of bool there is no maximum.
  if (o.values) values_ = o.values->to(at::promoteTypes(o.values->scalar_type(), at::kByte));
  offsets_ = *o.offsets;
  // In the order in which fewer are looked at in vain: each part of the labels looks at all rows,
  // or each part of the rows at all labels.
  const auto parts = [](int64_t size, int64_t of) { return size == 0 ? 0 : (size - 1) / of + 1; };
  const int64_t row_parts = parts(rows, block_rows), label_parts = parts(labels, block_labels);
  by_label_ = labels_.is_cpu() && label_parts > row_parts;
  by_row_ = labels_.is_cpu() && !by_label_ && row_parts > 1;
  rows_ = at::searchsorted(offsets_, at::arange(labels_.numel(), offsets_.options()),
                           /*out_int32=*/small, /*right=*/true)
              .sub_(1);
  if (by_label_) {
    Tensor order;
    std::tie(labels_, order) = labels_.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
    rows_ = rows_.index_select(0, order);
    if (o.values) values_ = values_.index_select(0, order);
  }
}

TargetBlocks::Buffer TargetBlocks::make_buffer() const {
  if (dense_.defined()) return {};
  const auto dtype = values_.defined() ? values_.scalar_type() : at::kBool;
  return {at::zeros({block_elements_ + 1}, labels_.options().dtype(dtype)), {}};
}

Tensor TargetBlocks::block(Buffer& buffer, Range rows, Range labels) const {
  if (dense_.defined())
    return dense_.narrow(0, rows.begin, rows.size).narrow(1, labels.begin, labels.size);
  return sparse_block(buffer, rows, labels);
}

Range TargetBlocks::candidates(Range rows, Range labels) const {
  const int64_t all = labels_.numel();
  if (by_row_) {
    const auto place_of = [&](int64_t row) {
      return std::clamp<int64_t>(offsets_.const_data_ptr<int64_t>()[row * offsets_.stride(0)], 0,
                                 all);
    };
    const int64_t begin = place_of(rows.begin);
    return {begin, std::max<int64_t>(place_of(rows.begin + rows.size) - begin, 0)};
  }
  if (!by_label_) return {0, all};
  const auto find = [&](const auto* first) -> Range {
    const auto begin = std::lower_bound(first, first + all, labels.begin);
    const auto end = std::lower_bound(begin, first + all, labels.begin + labels.size);
    return {begin - first, end - begin};
  };
  return labels_.scalar_type() == at::kInt ? find(labels_.const_data_ptr<int32_t>())
                                           : find(labels_.const_data_ptr<int64_t>());
}

// Positives outside the block, and places that belong to no row, go to the last element: with a
// mask the host would have to wait for their number.
Tensor TargetBlocks::sparse_block(Buffer& buffer, Range rows, Range labels) const {
  auto& [elements, written] = buffer;
  if (written.defined()) elements.index_fill_(0, written, 0);
  const Range near = candidates(rows, labels);
  const Tensor row = rows_.narrow(0, near.begin, near.size) - rows.begin;
  const Tensor label = labels_.narrow(0, near.begin, near.size) - labels.begin;
  const Tensor inside = (row >= 0)
                            .logical_and_(row < rows.size)
                            .logical_and_(label >= 0)
                            .logical_and_(label < labels.size);
  const int64_t nobodys = elements.numel() - 1;
  written = (row.to(at::kLong) * labels.size + label).masked_fill_(inside.logical_not(), nobodys);
  if (values_.defined())
    // The largest where a label occurs twice in a row, so that the order does not matter.
    elements.scatter_reduce_(0, written, values_.narrow(0, near.begin, near.size), "amax",
                             /*include_self=*/false);
  else
    elements.index_fill_(0, written, 1);
  return elements.narrow(0, 0, rows.size * labels.size).view({rows.size, labels.size});
}

}  // namespace fused_bce
