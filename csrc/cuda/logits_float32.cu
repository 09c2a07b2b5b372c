#include "kernels.cuh"

namespace fused_bce {

void launch_float32(const Arguments& a, const Workspace& workspace, unsigned blocks,
                    cudaStream_t stream) {
  switch (a.problem.target.dtype) {
    case DType::kFloat32:
      return launch_pair<float, float>(a, workspace, blocks, stream);
    case DType::kBool:
      return launch_pair<float, Boolean>(a, workspace, blocks, stream);
    case DType::kInt64:
      return launch_pair<float, int64_t>(a, workspace, blocks, stream);
    default:
      return launch_pair<float, AnyTarget>(a, workspace, blocks, stream);
  }
}

}  // namespace fused_bce
