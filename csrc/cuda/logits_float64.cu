#include "kernels.cuh"

namespace fused_bce {

void launch_float64(const Arguments& a, const Workspace& workspace, unsigned blocks,
                    cudaStream_t stream) {
  switch (a.problem.target.dtype) {
    case DType::kFloat64:
      return launch_pair<double, double>(a, workspace, blocks, stream);
    default:
      return launch_pair<double, AnyTarget>(a, workspace, blocks, stream);
  }
}

}  // namespace fused_bce
