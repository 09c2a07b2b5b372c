// The logits of a linear layer, one block of rows and labels at a time.
#pragma once

#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "linear_operands.h"

namespace fused_bce {

struct Range {
  int64_t begin, size;
};

// f(range, whether it is the first) for all parts of `size`
template <class F>
void for_ranges(int64_t size, int64_t step, const F& f) {
  for (int64_t begin = 0; begin < size; begin += step)
    f(Range{begin, std::min(step, size - begin)}, begin == 0);
}

inline at::Tensor part(const at::Tensor& t, int64_t dim, Range range) {
  return t.narrow(dim, range.begin, range.size);
}

// Products of blocks narrower than this are slow.
constexpr int64_t kLeastWidth = 256;

// Most bytes of the blocks of logits that so many threads hold at a time
int64_t chunk_bytes_of(const LinearOperands& operands, int threads);

class LogitBlocks {
 public:
  // Reads the input, the layer, dtype and chunk_bytes; keeps a reference. Each of so many threads
  // holds a block; the blocks of labels are as many for each share.
  explicit LogitBlocks(const LinearOperands& operands, int threads = 1, int64_t shares = 1);

  int64_t rows() const { return rows_; }
  int64_t labels() const { return labels_; }
  // The most rows and labels of a block
  int64_t block_rows() const { return block_rows_; }
  int64_t block_labels() const { return block_labels_; }
  // How many parts block_labels() makes of the labels
  int64_t parts_of_labels() const { return at::ceil_div(labels_, block_labels_); }
  // Of the factors of the products, and of the blocks
  at::ScalarType product_dtype() const { return product_dtype_; }

  at::Tensor input(Range rows) const { return part(input_, 0, rows); }
  // A block of the weight as a factor, to be used for all its rows
  at::Tensor weight(Range labels) const;
  // Memory for a block of logits
  at::Tensor make_buffer() const;
  // Rounded to the dtype of the logits; in the buffer.
  at::Tensor logits(const at::Tensor& buffer, Range rows, Range labels,
                    const at::Tensor& weight) const;

 private:
  at::Tensor as_factor(const at::Tensor& t) const;
  void choose_blocks(int threads, int64_t shares);

  const LinearOperands& o_;
  int64_t rows_, labels_;
  at::ScalarType logits_dtype_, product_dtype_;
  at::Tensor input_;
  int64_t block_rows_ = 1, block_labels_ = 1;
};

}  // namespace fused_bce
