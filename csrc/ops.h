#pragma once

namespace fused_bce {

// Makes torch.ops.fused_bce known to the dispatcher. Not a static initialiser, so that the version
// of torch can be compared before torch is called.
void register_ops();

}  // namespace fused_bce
