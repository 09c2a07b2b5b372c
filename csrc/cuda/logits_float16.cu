#include "kernels.cuh"

namespace fused_bce {

void launch_float16(const Arguments& a, const Workspace& workspace, unsigned blocks,
                    cudaStream_t stream) {
  switch (a.problem.target.dtype) {
    case DType::kFloat16:
      return launch_pair<__half, __half>(a, workspace, blocks, stream);
    case DType::kBFloat16:
      return launch_pair<__half, __nv_bfloat16>(a, workspace, blocks, stream);
    case DType::kFloat32:
      return launch_pair<__half, float>(a, workspace, blocks, stream);
    case DType::kFloat64:
      break;  // computed in double, with float64 logits
  }
}

}  // namespace fused_bce
