// Memory for large results on the CPU.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace fused_bce {

// From this size on malloc returns every freed block to the system, so that each step faults its
// pages in anew, 4 KiB at a time, which costs more than the arithmetic. This allocator takes huge
// pages and keeps the last blocks that were freed, marked as free to the system (MADV_FREE): it
// takes their pages back when it runs short, and until then using them again costs nothing.
constexpr size_t kLargeBlock = size_t{4} << 20;

// Linux only; elsewhere torch's own allocator.
c10::Allocator* large_block_allocator();

}  // namespace fused_bce
