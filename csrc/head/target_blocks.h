// Targets of a block of logits, from a dense matrix or from rows of label numbers.
#pragma once

#include "linear_operands.h"

namespace fused_bce {

struct Range {
  int64_t begin, size;
};

class TargetBlocks {
 public:
  // Blocks have at most so many elements.
  TargetBlocks(const LinearOperands& operands, int64_t most_elements);

  // Valid until the next call.
  at::Tensor block(Range rows, Range labels);

 private:
  at::Tensor sparse_block(Range rows, Range labels);
  // The positives among which all of these labels are
  Range candidates(Range labels) const;

  at::Tensor dense_;
  // Of each positive; sorted by label on the CPU, where the host finds those of a block.
  at::Tensor labels_, rows_, values_;
  at::Tensor buffer_;  // all 0 but at written_; its last element is nobody's
  at::Tensor written_;
};

}  // namespace fused_bce
