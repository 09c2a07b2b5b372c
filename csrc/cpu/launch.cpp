#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "isa.h"

namespace fused_bce {
namespace {

// Elements that one thread takes at a time. Fixed, and the sums of the chunks are added in order,
// so that the loss does not depend on the number of threads.
constexpr int64_t kChunk = 16384;

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

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
    default:  // a loss is no integer
      break;
  }
}

// f(chunk, begin, end) for every chunk of numel elements
template <class F>
void for_chunks(int64_t numel, const F& f) {
  at::parallel_for(0, chunks_of(numel), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min((c + 1) * kChunk, numel));
  });
}

template <class S, class F>
double count(const void* data, int64_t numel, const F& is_kept) {
  const S* const p = static_cast<const S*>(data);
  std::vector<int32_t> counts(chunks_of(numel));
  for_chunks(numel, [&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t kept = 0;
    for (int64_t i = begin; i < end; ++i) kept += is_kept(p[i]);
    counts[chunk] = kept;
  });
  return std::accumulate(counts.begin(), counts.end(), 0.0);
}

template <class S>
double count_others(const Dense& target, int64_t numel, int64_t ignore_index) {
  const S ignored = static_cast<S>(ignore_index);
  return count<S>(target.data, numel, [=](S value) { return value != ignored; });
}

// By their bits; a zero may have a sign.
template <class Half>
double count_other_halves(const Dense& target, int64_t numel, int64_t ignore_index) {
  const uint16_t ignored = Half(static_cast<float>(ignore_index)).x;
  const uint16_t mask = ignore_index == 0 ? 0x7fff : 0xffff;
  return count<uint16_t>(target.data, numel,
                         [=](uint16_t bits) { return (bits & mask) != ignored; });
}

}  // namespace

void launch_cpu(const Problem& problem) {
  const RunKernel run = current_instruction_set().run;
  std::vector<double> sums(chunks_of(problem.numel));
  for_chunks(problem.numel, [&](int64_t chunk, int64_t begin, int64_t end) {
    sums[chunk] = run(problem, begin, end);
  });
  if (!has_sum(pass_of(problem))) return;

  double sum = 0;
  for (const double s : sums) sum += s;
  store(sum / problem.divisor, problem.loss_dtype, problem.loss);
}

double count_kept_cpu(const Dense& target, int64_t numel, int64_t ignore_index) {
  switch (target.dtype) {
    case DType::kFloat16:
      return count_other_halves<c10::Half>(target, numel, ignore_index);
    case DType::kBFloat16:
      return count_other_halves<c10::BFloat16>(target, numel, ignore_index);
    case DType::kFloat32:
      return count_others<float>(target, numel, ignore_index);
    case DType::kFloat64:
      return count_others<double>(target, numel, ignore_index);
    case DType::kBool:
      return count<uint8_t>(target.data, numel,
                            [=](uint8_t byte) { return (byte != 0) != (ignore_index != 0); });
    case DType::kUInt8:
      return count_others<uint8_t>(target, numel, ignore_index);
    case DType::kInt8:
      return count_others<int8_t>(target, numel, ignore_index);
    case DType::kInt16:
      return count_others<int16_t>(target, numel, ignore_index);
    case DType::kInt32:
      return count_others<int32_t>(target, numel, ignore_index);
    case DType::kInt64:
      return count_others<int64_t>(target, numel, ignore_index);
  }
  return 0;
}

}  // namespace fused_bce
