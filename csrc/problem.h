// A checked call, as plain data: the bridge from losses.cpp to the backends.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "dtypes.h"

namespace fused_bce {

// A dense array of `numel` elements in iteration order.
struct Dense {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// A broadcast operand, seen as [outer, channels, inner]: element i is
// data[i / inner % channels * stride]. A scalar has one channel, a full array numel of them.
struct Broadcast {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t channels = 1;
  int64_t inner = 1;
  int64_t stride = 0;
};

// A number that a formula has of its own. The kernels take it in [least, most], or equal to other.
struct Parameter {
  const char* name;
  const char* preset;  // where a call leaves it out
  double least, most;
  double other = least;

  constexpr bool takes(double value) const {
    return (least <= value && value <= most) || value == other;
  }
};

// Beyond 1e6 nothing is left of any loss, and products with it might overflow.
constexpr Parameter exponent(const char* name, const char* preset) {
  return {name, preset, 0, 1e6};
}

template <size_t number>
using ParameterTable = std::array<Parameter, number>;

// Their values, in the order of the table
constexpr int kMostParameters = 4;
using Parameters = double[kMostParameters];

enum class Reduction : uint8_t { kNone, kMean, kSum };

// The targets that have neither loss nor gradient.
struct Ignored {
  double index = std::numeric_limits<double>::quiet_NaN();  // nan, which equals nothing: none
  bool nan = false;                                         // those that are nan

  bool any() const { return index == index || nan; }
};

// The arithmetic is done in double if logits or target are float64, else in float.
struct Problem {
  int formula = 0;  // see kFormulaId
  int64_t numel = 0;
  Dense logits;
  Dense target;
  Broadcast weight;
  Broadcast pos_weight;
  Reduction reduction = Reduction::kMean;

  Ignored ignored;
  // What label smoothing makes of the others: target * target_scale + target_shift. Or, if not
  // null, the smoothing in the memory of the GPU.
  double target_scale = 1.0;
  double target_shift = 0.0;
  const double* label_smoothing_on_gpu = nullptr;

  // Outputs; null where not wanted.
  void* loss = nullptr;  // [numel] for none, else one number
  DType loss_dtype = DType::kFloat32;
  void* grad_logits = nullptr;  // [numel], in the dtype of the logits

  // What mean divides by, as a number or as one in the memory of the GPU, where 0 counts as 1:
  // nothing was counted, and the sum is 0. Else 1.
  double divisor = 1.0;
  const double* divisor_on_gpu = nullptr;
  // In backward: one number, or one for each element. What it does to float16 is part of the
  // arithmetic; every other gradient is rounded first, as one is that was stored in forward, and
  // scaled then: see Scaling.
  Broadcast grad_loss;
  Parameters parameters = {};
};

inline bool has_extras(const Problem& p) {
  return p.ignored.any() || p.target_scale != 1 || p.label_smoothing_on_gpu;
}

// float16 may underflow before grad_loss arrives.
inline bool folds_grad_loss(const Problem& p) { return p.logits.dtype == DType::kFloat16; }

// grad_logits *= grad_loss, in float, or in double if grad_logits are.
struct Scaling {
  void* grad_logits = nullptr;
  DType dtype = DType::kFloat32;
  Broadcast grad_loss;
  // Of what is ignored the gradient is 0 even if grad_loss is nan or infinite.
  bool zero_stays = false;
};

inline Scaling scaling_of(const Problem& p) {
  return {p.grad_logits, p.logits.dtype, p.grad_loss, p.ignored.any()};
}

inline bool computes_in_double(const Problem& p) {
  return p.logits.dtype == DType::kFloat64 || p.target.dtype == DType::kFloat64;
}

// What a pass over the operands computes: the sum of the losses or each of them, the gradient, or
// both.
enum class Pass { kSum, kSumAndGrad, kLosses, kLossesAndGrad, kGrad };
constexpr bool has_sum(Pass pass) { return pass == Pass::kSum || pass == Pass::kSumAndGrad; }
constexpr bool has_losses(Pass pass) {
  return pass == Pass::kLosses || pass == Pass::kLossesAndGrad;
}
constexpr bool has_grad(Pass pass) { return pass != Pass::kSum && pass != Pass::kLosses; }

inline Pass pass_of(const Problem& p) {
  if (!p.loss) return Pass::kGrad;
  if (p.reduction == Reduction::kNone) return p.grad_logits ? Pass::kLossesAndGrad : Pass::kLosses;
  return p.grad_logits ? Pass::kSumAndGrad : Pass::kSum;
}

// Bit-identical results for any number of threads.
void launch_cpu(const Problem& problem);
void scale_cpu(const Scaling& scaling, int64_t numel);
// How many targets are not ignored; their dtype holds the index exactly.
double count_unignored_cpu(const Dense& target, int64_t numel, const Ignored& ignored);

// On the current device, in the given stream (a cudaStream_t), without waiting for it. The results
// are bit-identical for any number of blocks. With a float64 target the logits are float64, too.
int64_t cuda_workspace_bytes(const Problem& problem);
void launch_cuda(const Problem& problem, void* workspace, void* stream);
// *count += how many targets are not ignored.
void launch_cuda_count_unignored(const Dense& target, int64_t numel, const Ignored& ignored,
                                 double* count, void* stream);
// grad_logits are aligned to 16 bytes.
void launch_cuda_scale(const Scaling& scaling, int64_t numel, void* stream);
// Whether this build has code that the current device can run.
bool cuda_covers_current_device();
// For tests and benchmarks: no more blocks than this in a launch; and whether the last of them adds
// up their sums, or a second kernel, with the same bits.
void limit_cuda_blocks(int64_t most);
void add_up_in_last_cuda_block(bool choice);

}  // namespace fused_bce
