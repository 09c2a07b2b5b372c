#include "kernels.cuh"

namespace fused_bce {

void launch_float16(const Arguments& a, const Workspace& workspace, unsigned blocks,
                    cudaStream_t stream) {
  switch (a.problem.target.dtype) {
    case DType::kFloat16:
      return launch_pair<__half, __half>(a, workspace, blocks, stream);
    case DType::kFloat32:
      return launch_pair<__half, float>(a, workspace, blocks, stream);
    case DType::kBool:
      return launch_pair<__half, Boolean>(a, workspace, blocks, stream);
    default:
      return launch_pair<__half, AnyTarget>(a, workspace, blocks, stream);
  }
}

}  // namespace fused_bce
