#include "kernels.cuh"

namespace fused_bce {

void launch_bfloat16(const Arguments& a, const Workspace& workspace, unsigned blocks,
                     cudaStream_t stream) {
  switch (a.problem.target.dtype) {
    case DType::kBFloat16:
      return launch_pair<__nv_bfloat16, __nv_bfloat16>(a, workspace, blocks, stream);
    case DType::kFloat32:
      return launch_pair<__nv_bfloat16, float>(a, workspace, blocks, stream);
    case DType::kBool:
      return launch_pair<__nv_bfloat16, Boolean>(a, workspace, blocks, stream);
    case DType::kInt64:
      return launch_pair<__nv_bfloat16, int64_t>(a, workspace, blocks, stream);
    default:
      return launch_pair<__nv_bfloat16, AnyTarget>(a, workspace, blocks, stream);
  }
}

}  // namespace fused_bce
