// Targets of a block of logits, from a dense matrix or from rows of label numbers.
#pragma once

#include "linear_operands.h"
#include "logit_blocks.h"

namespace fused_bce {

class TargetBlocks {
 public:
  // Blocks have at most so many rows and labels.
  TargetBlocks(const LinearOperands& operands, int64_t block_rows, int64_t block_labels);

  // Memory for a block of targets
  struct Buffer {
    at::Tensor elements;  // all 0 but at `written`; the last one takes what no block has
    at::Tensor written;
  };
  Buffer make_buffer() const;
  // Valid until the buffer is used again
  at::Tensor block(Buffer& buffer, Range rows, Range labels) const;

 private:
  at::Tensor sparse_block(Buffer& buffer, Range rows, Range labels) const;
  // The positives among which all of this block are
  Range candidates(Range rows, Range labels) const;

  at::Tensor dense_;
  // Of each positive, in int32 where that holds all rows and labels
  at::Tensor labels_, rows_, values_;
  // What a block's positives are found by on the CPU, where the host can look: in the order of the
  // labels, or of the rows, as they came; else each block looks at all of them.
  bool by_label_ = false, by_row_ = false;
  at::Tensor offsets_;
  int64_t block_elements_;
};

}  // namespace fused_bce
