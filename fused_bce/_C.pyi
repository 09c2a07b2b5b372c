from torch import Tensor

def build_info() -> dict[str, object]: ...
def instruction_sets() -> list[str]: ...
def current_instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def eager_loss(
    input: object,
    target: object,
    weight: object,
    size_average: object,
    reduce: object,
    reduction: object,
    pos_weight: object,
    label_smoothing: object,
    ignore_index: object,
    validate_targets: object,
    recompute: object,
    /,
) -> Tensor | None: ...

# With CUDA kernels only
def has_kernels_for_gpu(index: int) -> bool: ...
def limit_cuda_blocks(most: int) -> None: ...
