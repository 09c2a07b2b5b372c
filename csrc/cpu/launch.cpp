#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
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

// Whether the operand is the number 1, with which there is nothing to do.
bool is_one(const Broadcast& b) {
  if (!b.data || b.channels != 1) return false;
  switch (b.dtype) {
    case DType::kFloat16:
      return *static_cast<const c10::Half*>(b.data) == 1;
    case DType::kBFloat16:
      return *static_cast<const c10::BFloat16*>(b.data) == 1;
    case DType::kFloat32:
      return *static_cast<const float*>(b.data) == 1;
    case DType::kFloat64:
      return *static_cast<const double*>(b.data) == 1;
    default:  // grad_loss is no integer
      return false;
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

template <class Integer>
double count_other_integers(const Dense& target, int64_t numel, const Ignored& ignored) {
  if (ignored.index != ignored.index) return static_cast<double>(numel);
  const auto index = static_cast<Integer>(ignored.index);
  return count<Integer>(target.data, numel, [=](Integer value) { return value != index; });
}

template <class S>
double count_other_numbers(const Dense& target, int64_t numel, const Ignored& ignored) {
  const auto index = static_cast<S>(ignored.index);
  if (!ignored.nan) return count<S>(target.data, numel, [=](S value) { return value != index; });
  return count<S>(target.data, numel, [=](S value) { return (value != index) & (value == value); });
}

// By their bits; a zero may have a sign, and what lies above infinity is nan.
template <class Half>
double count_other_halves(const Dense& target, int64_t numel, const Ignored& ignored) {
  const uint16_t index = Half(static_cast<float>(ignored.index)).x;
  const uint16_t mask = ignored.index == 0 ? 0x7fff : 0xffff;
  const uint16_t largest = ignored.nan ? Half(std::numeric_limits<float>::infinity()).x : 0x7fff;
  return count<uint16_t>(target.data, numel, [=](uint16_t bits) {
    return ((bits & mask) != index) & ((bits & 0x7fff) <= largest);
  });
}

}  // namespace

void launch_cpu(const Problem& given) {
  Problem problem = given;
  if (is_one(problem.grad_loss)) problem.grad_loss = {};
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

void scale_cpu(const Scaling& scaling, int64_t numel) {
  if (is_one(scaling.grad_loss)) return;
  const ScaleKernel scale = current_instruction_set().scale;
  for_chunks(numel, [&](int64_t, int64_t begin, int64_t end) { scale(scaling, begin, end); });
}

double count_kept_cpu(const Dense& target, int64_t numel, const Ignored& ignored) {
  if (!ignored.any()) return static_cast<double>(numel);
  switch (target.dtype) {
    case DType::kFloat16:
      return count_other_halves<c10::Half>(target, numel, ignored);
    case DType::kBFloat16:
      return count_other_halves<c10::BFloat16>(target, numel, ignored);
    case DType::kFloat32:
      return count_other_numbers<float>(target, numel, ignored);
    case DType::kFloat64:
      return count_other_numbers<double>(target, numel, ignored);
    case DType::kBool:
      if (ignored.index != ignored.index) return static_cast<double>(numel);
      return count<uint8_t>(target.data, numel,
                            [=](uint8_t byte) { return (byte != 0) != (ignored.index != 0); });
    case DType::kUInt8:
      return count_other_integers<uint8_t>(target, numel, ignored);
    case DType::kInt8:
      return count_other_integers<int8_t>(target, numel, ignored);
    case DType::kInt16:
      return count_other_integers<int16_t>(target, numel, ignored);
    case DType::kInt32:
      return count_other_integers<int32_t>(target, numel, ignored);
    case DType::kInt64:
      return count_other_integers<int64_t>(target, numel, ignored);
  }
  return 0;
}

}  // namespace fused_bce
