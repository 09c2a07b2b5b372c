#include "isa.h"

#include <atomic>
#include <cstddef>
#include <stdexcept>

namespace fused_bce {

// Not inline: GCC would compute the address of a thread_local variable anew in inner loops.
void* thread_scratch() {
  alignas(kScratchAlignment) static thread_local std::byte scratch[kScratchBytes];
  return scratch;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> available = [] {
    std::vector<InstructionSet> found;
#if defined(FUSED_BCE_BASELINE_ONLY)  // for the thread sanitizer: see setup.py
    found.push_back({"baseline", baseline::run, baseline::scale});
#elif defined(__x86_64__)
    __builtin_cpu_init();
    // Every processor with AVX2 has F16C, which not every compiler can ask for.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f"))
      found.push_back({"avx512", avx512::run, avx512::scale});
    if (avx2) found.push_back({"avx2", avx2::run, avx2::scale});
    found.push_back({"sse2", baseline::run, baseline::scale});
#elif defined(__aarch64__)
    found.push_back({"neon", baseline::run, baseline::scale});
#else
    found.push_back({"baseline", baseline::run, baseline::scale});
#endif
    return found;
  }();
  return available;
}

static std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{&instruction_sets().front()};
  return set;
}

const InstructionSet& current_instruction_set() { return *chosen().load(); }

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  // Where there are tiles (AMX), there is this, too.
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported;
#else
  return false;
#endif
}

void use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.name == name) {
      chosen().store(&set);
      return;
    }
  }
  throw std::invalid_argument("no instruction set '" + name + "' here");
}

}  // namespace fused_bce
