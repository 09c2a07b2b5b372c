// The instruction sets that the CPU kernel is compiled for. The best one that the processor has is
// chosen once, so a binary built on one machine is fast and safe on another.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../problem.h"

namespace fused_bce {

// Computes elements [begin, end) and returns the sum of their losses.
using RunKernel = double (*)(const Problem&, int64_t begin, int64_t end);

// Scales elements [begin, end).
using ScaleKernel = void (*)(const Scaling&, int64_t begin, int64_t end);

// Memory of the calling thread in which a kernel converts its tiles. Its stack may be too small:
// OMP_STACKSIZE may leave 16 KiB.
constexpr size_t kScratchBytes = size_t{29} * 1024;
constexpr size_t kScratchAlignment = 64;
void* thread_scratch();

struct InstructionSet {
  const char* name;
  RunKernel run;
  ScaleKernel scale;
};

// Those that this build has and this processor can run, best first.
const std::vector<InstructionSet>& instruction_sets();
const InstructionSet& current_instruction_set();
// Whether the processor multiplies matrices of bfloat16 as fast as those of float32, or faster.
bool multiplies_bfloat16();
// For tests and measurements; std::invalid_argument if there is none of that name.
void use_instruction_set(const std::string& name);

namespace baseline {
double run(const Problem&, int64_t begin, int64_t end);
void scale(const Scaling&, int64_t begin, int64_t end);
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
double run(const Problem&, int64_t begin, int64_t end);
void scale(const Scaling&, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
double run(const Problem&, int64_t begin, int64_t end);
void scale(const Scaling&, int64_t begin, int64_t end);
}  // namespace avx512
#endif

}  // namespace fused_bce
