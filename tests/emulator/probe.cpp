// Calls of the kernels for float32, in plain C, for mutants.py. They return null, or what went
// wrong.
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/problem.h"
#include "caught.h"

using namespace fused_bce;

extern "C" {

// A mean with its gradient. `workspace` has room, and whatever was left there.
const char* probe_mean(int64_t numel, const float* logits, const float* target,
                       const float* pos_weight, int64_t channels, double ignore_index,
                       const double* divisor, float* loss, float* grad_logits, void* workspace,
                       int64_t most_blocks, bool in_last_block, void* stream) {
  Problem p;
  p.numel = numel;
  p.logits.data = logits;
  p.target.data = target;
  if (pos_weight) p.pos_weight = {pos_weight, DType::kFloat32, channels, 1, 1};
  p.ignored.index = ignore_index;
  p.divisor_on_gpu = divisor;
  p.loss = loss;
  p.grad_logits = grad_logits;
  limit_cuda_blocks(most_blocks);
  add_up_in_last_cuda_block(in_last_block);
  return caught([&] { launch_cuda(p, cuda_workspace_bytes(p) ? workspace : nullptr, stream); });
}

const char* probe_scale(float* grad_logits, int64_t numel, const float* grad_loss, int64_t channels,
                        void* stream) {
  const Broadcast factors{grad_loss, DType::kFloat32, channels, 1, 1};
  return caught([&] { launch_cuda_scale({grad_logits, DType::kFloat32, factors}, numel, stream); });
}

const char* probe_count_kept(const float* target, int64_t numel, double ignore_index, double* count,
                             void* stream) {
  return caught([&] {
    launch_cuda_count_unignored({target, DType::kFloat32}, numel, {ignore_index}, count, stream);
  });
}

const char* probe_covers(bool* covers) {
  return caught([&] { *covers = cuda_covers_current_device(); });
}
}

namespace fused_bce {

// Of all the kernels those that are called here, for this file is compiled for each fault
void launch_float32(const Arguments& a, const Workspace& workspace, unsigned blocks,
                    cudaStream_t stream) {
  launch_pass<BinaryCrossEntropy, float, float, Pass::kSumAndGrad>(a, workspace, blocks, stream);
}
void launch_float16(const Arguments&, const Workspace&, unsigned, cudaStream_t) {}
void launch_bfloat16(const Arguments&, const Workspace&, unsigned, cudaStream_t) {}
void launch_float64(const Arguments&, const Workspace&, unsigned, cudaStream_t) {}

}  // namespace fused_bce
