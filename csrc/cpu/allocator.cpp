#include "allocator.h"

#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <utility>

namespace fused_bce {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

// Aligned to huge pages: what lies around is given back at once.
Block map_block(size_t bytes) {
  const size_t reserved = bytes + kHugePage;
  void* const raw =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, raw != MAP_FAILED, "fused_bce: cannot allocate ", bytes,
                   " bytes");
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = round_up(begin);
  if (aligned != begin) munmap(raw, aligned - begin);
  const uintptr_t end = aligned + bytes;
  if (end != begin + reserved) munmap(reinterpret_cast<void*>(end), begin + reserved - end);
  void* const data = reinterpret_cast<void*>(aligned);
  // Advice: a system that has no huge pages is only slower.
  madvise(data, bytes, MADV_HUGEPAGE);
  return {data, bytes};
}

class LargeBlockAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Block block = take(round_up(bytes));
    if (!block.data) block = map_block(round_up(bytes));
    c10::profiledCPUMemoryReporter().New(block.data, block.bytes);
    return {block.data, new Block(block), &free_block, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void free_block(void* context);

  // The lock is tried, not waited for: a fork may have copied it locked, but not the thread that
  // holds it.

  // A kept block of about this size, or none.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    for (Block& kept : kept_)
      if (kept.bytes >= bytes && kept.bytes <= bytes + bytes / 4) return std::exchange(kept, {});
    return {};
  }

  // Keeps the block and returns the one kept longest.
  Block keep(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return block;
    for (Block& kept : kept_)
      if (!kept.data) return std::exchange(kept, block);
    return std::exchange(kept_[oldest_++ % kept_.size()], block);
  }

  std::mutex mutex_;
  std::array<Block, 2> kept_;  // a gradient, and the losses of reduction none
  size_t oldest_ = 0;
};

// Never destroyed: tensors may outlive static objects.
LargeBlockAllocator& the_allocator() {
  static auto* const allocator = new LargeBlockAllocator;
  return *allocator;
}

void LargeBlockAllocator::free_block(void* context) {
  const Block block = *static_cast<Block*>(context);
  delete static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block.data);
  const bool may_keep =
      block.bytes <= kMarkedFree || madvise(block.data, block.bytes, MADV_FREE) == 0;
  const Block dropped = may_keep ? the_allocator().keep(block) : block;
  if (dropped.data) munmap(dropped.data, dropped.bytes);
}

}  // namespace

c10::Allocator* large_block_allocator() { return &the_allocator(); }

}  // namespace fused_bce

#else

namespace fused_bce {
c10::Allocator* large_block_allocator() { return c10::GetCPUAllocator(); }
}  // namespace fused_bce

#endif
