// The launchers of csrc/problem.h as plain C, for an interpreter of the kernels' PTX that calls
// them through ctypes. They return null, or what went wrong.
#include <algorithm>
#include <string>

#include "../emulator/caught.h"
#include "formulas/formulas.h"
#include "problem.h"

using namespace fused_bce;

namespace {

constexpr DType kDTypes[] = {
    DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64, DType::kBool,
    DType::kUInt8,   DType::kInt8,     DType::kInt16,   DType::kInt32,   DType::kInt64,
};
constexpr Reduction kReductions[] = {Reduction::kNone, Reduction::kMean, Reduction::kSum};

struct PlainBroadcast {
  const void* data;
  int64_t dtype, channels, inner, stride;

  Broadcast broadcast() const { return {data, kDTypes[dtype], channels, inner, stride}; }
};

Problem chosen;  // of which only the formula and its parameters count

template <class... Formula>
bool choose(const std::string& name, FormulaList<Formula...>) {
  return ((name == Formula::kName && ((chosen.formula = kFormulaId<Formula>), true)) || ...);
}

}  // namespace

extern "C" {

struct PlainProblem {
  int64_t numel;
  const void* logits;
  int64_t logits_dtype;
  const void* target;
  int64_t target_dtype;
  PlainBroadcast weight, pos_weight;
  int64_t reduction;
  double ignore_index, target_scale, target_shift;
  void* loss;
  int64_t loss_dtype;
  void* grad_logits;
  double divisor;
  const double* divisor_on_gpu;
  PlainBroadcast grad_loss;

  Problem problem() const {
    Problem p = chosen;
    p.numel = numel;
    p.logits = {logits, kDTypes[logits_dtype]};
    p.target = {target, kDTypes[target_dtype]};
    p.weight = weight.broadcast();
    p.pos_weight = pos_weight.broadcast();
    p.reduction = kReductions[reduction];
    p.ignored.index = ignore_index;
    p.target_scale = target_scale;
    p.target_shift = target_shift;
    p.loss = loss;
    p.loss_dtype = kDTypes[loss_dtype];
    p.grad_logits = grad_logits;
    p.divisor = divisor;
    p.divisor_on_gpu = divisor_on_gpu;
    p.grad_loss = grad_loss.broadcast();
    return p;
  }
};

int64_t face_workspace_bytes(const PlainProblem* p) { return cuda_workspace_bytes(p->problem()); }

const char* face_launch(const PlainProblem* p, void* workspace) {
  return caught([&] { launch_cuda(p->problem(), workspace, nullptr); });
}

// Of which face_launch computes the loss from now on: a name and numbers that the plain struct has
// not. Whether there is such a formula.
bool face_choose_formula(const char* name, const double* parameters) {
  chosen = {};
  std::copy(parameters, parameters + kMostParameters, chosen.parameters);
  return choose(name, Formulas());
}

const char* face_count_kept(const void* target, int64_t dtype, int64_t numel, int64_t ignore_index,
                            double* count) {
  return caught([&] {
    const Ignored ignored{static_cast<double>(ignore_index)};
    launch_cuda_count_unignored({target, kDTypes[dtype]}, numel, ignored, count, nullptr);
  });
}

const char* face_scale(void* grad_logits, int64_t dtype, int64_t numel, const void* grad_loss,
                       int64_t grad_loss_dtype) {
  return caught([&] {
    const Broadcast number{grad_loss, kDTypes[grad_loss_dtype]};
    launch_cuda_scale({grad_logits, kDTypes[dtype], number}, numel, nullptr);
  });
}

void face_limit_blocks(int64_t most) { limit_cuda_blocks(most); }

void face_add_up_in_last_block(bool choice) { add_up_in_last_cuda_block(choice); }

bool face_covers_device() { return cuda_covers_current_device(); }

}  // extern "C"
