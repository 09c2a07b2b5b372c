// Memory for large results on the CPU.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace fused_bce {

// From about this size on malloc may return freed blocks to the system, so that each step faults
// the pages of its gradient in anew, 4 KiB at a time, which costs several times as much as the
// kernel. This allocator takes huge pages and keeps the last blocks that were freed. Those larger
// than malloc would ever keep are marked as free to the system (MADV_FREE): it takes their pages
// back when it runs short, and until then using them again costs nothing.
constexpr size_t kLargeBlock = size_t{4} << 20;
constexpr size_t kMarkedFree = size_t{32} << 20;

// Linux only; elsewhere torch's own allocator.
c10::Allocator* large_block_allocator();

}  // namespace fused_bce
