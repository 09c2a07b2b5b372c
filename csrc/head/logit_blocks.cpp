#include "logit_blocks.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cmath>

#include "../cpu/isa.h"

namespace fused_bce {

using at::Tensor;

namespace {

// Of a block of logits. On the CPU it stays in the cache between the kernels and the products; a
// GPU has to be filled.
constexpr int64_t kChunkBytesOnCpu = int64_t{4} << 20;
constexpr int64_t kLeastBytesOfThread = int64_t{1} << 20;
constexpr int64_t kChunkBytesOnGpu = int64_t{256} << 20;
constexpr int64_t kAlignedLabels = 16;  // of blocks whose rows begin with a line of the cache

// The CPU's products of half types are slow where it has no instructions for them: there the
// operands are widened block by block.
at::ScalarType choose_product_dtype(const LinearOperands& o) {
  const at::ScalarType type = o.logits_dtype();
  if (!o.input.is_cpu() || (type == at::kBFloat16 && multiplies_bfloat16())) return type;
  return o.wide_dtype();
}

}  // namespace

int64_t chunk_bytes_of(const LinearOperands& o, int threads) {
  if (o.chunk_bytes > 0) return o.chunk_bytes;
  return o.input.is_cpu() ? std::max(kChunkBytesOnCpu, threads * kLeastBytesOfThread)
                          : kChunkBytesOnGpu;
}

LogitBlocks::LogitBlocks(const LinearOperands& operands, int threads, int64_t shares)
    : o_(operands),
      rows_(o_.input.size(0)),
      labels_(o_.linear_weight.size(0)),
      logits_dtype_(o_.logits_dtype()),
      product_dtype_(choose_product_dtype(o_)),
      input_(as_factor(o_.input)) {
  choose_blocks(threads, shares);
}

Tensor LogitBlocks::as_factor(const Tensor& t) const {
  return t.to(logits_dtype_).to(product_dtype_);
}

Tensor LogitBlocks::weight(Range labels) const {
  return as_factor(part(o_.linear_weight, 0, labels));
}

// Of the longer of both sides, and of the shorter one where a block would be too narrow.
void LogitBlocks::choose_blocks(int threads, int64_t shares) {
  const int64_t bytes = chunk_bytes_of(o_, threads) / threads;
  const int64_t elements =
      std::max<int64_t>(bytes / static_cast<int64_t>(c10::elementSize(product_dtype_)), 1);
  const auto square = static_cast<int64_t>(std::sqrt(static_cast<double>(elements)));
  const auto at_most = [](int64_t size, int64_t most) {
    return std::max<int64_t>(std::min(size, most), 1);
  };
  int64_t& shorter = labels_ < rows_ ? block_labels_ : block_rows_;
  int64_t& longer = labels_ < rows_ ? block_rows_ : block_labels_;
  shorter = at_most(std::min(labels_, rows_), std::max(elements / kLeastWidth, square));
  // A block of the weight is no larger either where it is cast.
  const bool casts = o_.linear_weight.scalar_type() != product_dtype_;
  const int64_t width = casts ? std::max(shorter, o_.input.size(1)) : shorter;
  longer = at_most(std::max(labels_, rows_), elements / width);
  if (shares > 1) {
    const int64_t labels = at::ceil_div(labels_, shares);
    const int64_t even = at::ceil_div(labels, at::ceil_div(labels, block_labels_));
    block_labels_ = std::min(at::round_up(even, kAlignedLabels), block_labels_);
  }
}

Tensor LogitBlocks::make_buffer() const {
  return at::empty({block_rows_ * block_labels_}, o_.input.options().dtype(product_dtype_));
}

Tensor LogitBlocks::logits(const Tensor& buffer, Range rows, Range labels,
                           const Tensor& weight) const {
  Tensor block = buffer.narrow(0, 0, rows.size * labels.size).view({rows.size, labels.size});
  if (o_.linear_bias)
    at::addmm_out(block, as_factor(part(*o_.linear_bias, 0, labels)), input(rows), weight.t());
  else
    at::mm_out(block, input(rows), weight.t());
  // As torch's layer rounds them
  if (product_dtype_ != logits_dtype_) block.copy_(block.to(logits_dtype_));
  return block;
}

}  // namespace fused_bce
