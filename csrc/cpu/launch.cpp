#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <vector>

#include "isa.h"

namespace fused_bce {
namespace {

// Elements that one thread takes at a time. Fixed, and the sums of the chunks are added in order,
// so that the loss does not depend on the number of threads.
constexpr int64_t kChunk = 16384;

void store(double value, DType dtype, void* out) {
  switch (dtype) {
    case DType::kFloat16:
      *static_cast<c10::Half*>(out) = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      *static_cast<c10::BFloat16*>(out) = static_cast<float>(value);
      break;
    case DType::kFloat32:
      *static_cast<float*>(out) = static_cast<float>(value);
      break;
    case DType::kFloat64:
      *static_cast<double*>(out) = value;
      break;
  }
}

}  // namespace

void launch_cpu(const Problem& problem) {
  const RunKernel run = current_instruction_set().run;
  const int64_t chunks = (problem.numel + kChunk - 1) / kChunk;
  std::vector<double> sums(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      sums[c] = run(problem, c * kChunk, std::min((c + 1) * kChunk, problem.numel));
  });
  if (!has_sum(pass_of(problem))) return;

  double sum = 0;
  for (const double s : sums) sum += s;
  store(sum / problem.divisor, problem.loss_dtype, problem.loss);
}

}  // namespace fused_bce
