#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "isa.h"

namespace fused_bce {
namespace {

// Elements that one thread takes at a time. Fixed, and the sums of the chunks are added in order,
// so that the loss does not depend on the number of threads.
constexpr int64_t kChunk = 16384;

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

struct HostHalf {
  using Float16 = c10::Half;
  using BFloat16 = c10::BFloat16;
};

// Rounded to float first, as the arithmetic of half types does.
void store(double value, DType dtype, void* out) {
  with_float<HostHalf>(dtype, [=](auto tag) {
    using S = decltype(tag);
    if constexpr (std::is_same_v<S, double>)
      *static_cast<S*>(out) = value;
    else
      *static_cast<S*>(out) = static_cast<float>(value);
  });
}

// Whether the operand is the number 1, with which there is nothing to do.
bool is_one(const Broadcast& b) {
  bool one = false;
  if (b.data && b.channels == 1)
    with_float<HostHalf>(b.dtype,
                         [&](auto tag) { one = *static_cast<const decltype(tag)*>(b.data) == 1; });
  return one;
}

// f(chunk, begin, end) for every chunk of numel elements
template <class F>
void for_chunks(int64_t numel, const F& f) {
  at::parallel_for(0, chunks_of(numel), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min((c + 1) * kChunk, numel));
  });
}

template <class S, class F>
double count(const void* data, int64_t numel, const F& is_unignored) {
  const S* const p = static_cast<const S*>(data);
  std::vector<int32_t> counts(chunks_of(numel));
  for_chunks(numel, [&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t unignored = 0;
    for (int64_t i = begin; i < end; ++i) unignored += is_unignored(p[i]);
    counts[chunk] = unignored;
  });
  return std::accumulate(counts.begin(), counts.end(), 0.0);
}

template <class S>
double count_others(const void* data, int64_t numel, const Ignored& ignored) {
  const auto index = static_cast<S>(ignored.index);
  if (!ignored.nan) return count<S>(data, numel, [=](S value) { return value != index; });
  return count<S>(data, numel, [=](S value) { return (value != index) & (value == value); });
}

// By their bits; a zero may have a sign, and what lies above infinity is nan.
template <class Half>
double count_other_halves(const void* data, int64_t numel, const Ignored& ignored) {
  const uint16_t index = Half(static_cast<float>(ignored.index)).x;
  const uint16_t mask = ignored.index == 0 ? 0x7fff : 0xffff;
  const uint16_t largest = ignored.nan ? Half(std::numeric_limits<float>::infinity()).x : 0x7fff;
  return count<uint16_t>(data, numel, [=](uint16_t bits) {
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

double count_unignored_cpu(const Dense& target, int64_t numel, const Ignored& ignored) {
  const bool by_number = ignored.index == ignored.index;
  if (!by_number && !(ignored.nan && is_floating(target.dtype))) return static_cast<double>(numel);
  double unignored = 0;
  with_dtype<HostHalf>(target.dtype, [&](auto tag) {
    using S = decltype(tag);
    if constexpr (std::is_same_v<S, Boolean>)
      unignored = count<uint8_t>(target.data, numel,
                                 [&](uint8_t byte) { return (byte != 0) != (ignored.index != 0); });
    else if constexpr (sizeof(S) == 2 && !std::is_integral_v<S>)
      unignored = count_other_halves<S>(target.data, numel, ignored);
    else
      unignored = count_others<S>(target.data, numel, ignored);
  });
  return unignored;
}

}  // namespace fused_bce
