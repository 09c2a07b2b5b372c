"""The faults: file, text that stands in it, what is put there, and which tests should find it.

Each is one that somebody could make: a wrong bound, a case left out, a stale value, a wrong dtype.
Of the steps of .ci/run the one that finds them is `tests`: what only sanitizers find is planted in
the CUDA kernels, by tests/emulator/mutants.py.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    text: str
    replacement: str
    tests: str  # files and options for pytest, below tests/

    @property
    def needs_build(self) -> bool:
        return self.file.startswith("csrc/")


CHECKS = {
    "a label_smoothing of 1": Fault(
        "fused_bce/checks.py",
        "if not 0.0 <= label_smoothing < 1.0:",
        "if not 0.0 <= label_smoothing <= 1.0:",
        "module/test_options.py loss/test_extras.py module/test_module.py",
    ),
    "an ignore_index of 2**24": Fault(
        "fused_bce/checks.py",
        "if not -_MOST_IGNORED < index < _MOST_IGNORED:",
        "if not -_MOST_IGNORED <= index <= _MOST_IGNORED:",
        "loss/test_extras.py module/test_module.py",
    ),
    "an ignore_index that bfloat16 rounds": Fault(
        "fused_bce/checks.py",
        "return abs(odd_part) < 2 / info.eps",
        "return abs(odd_part) < 4 / info.eps",
        "loss/test_extras.py",
    ),
    "a chunk_bytes of 0": Fault(
        "fused_bce/checks.py",
        "if not 1 <= chunk_bytes < 2**63:",
        "if not 0 <= chunk_bytes < 2**63:",
        "head/test_head_roads.py",
    ),
    "a nan among the targets": Fault(
        "fused_bce/checks.py",
        "invalid = ~((target >= 0) & (target <= 1))",
        "invalid = (target < 0) | (target > 1)",
        "loss/test_extras.py",
    ),
    "ignored targets validated": Fault(
        "fused_bce/checks.py",
        "return invalid if ignore_index is None else invalid & ~is_ignored(target, ignore_index)",
        "return invalid",
        "loss/test_extras.py",
    ),
    "a weight for other rows": Fault(
        "fused_bce/checks.py",
        "if last == 1 and others == [rows]:",
        "if last == 1 and len(others) == 1:",
        "head/test_head_roads.py head/test_head_layers.py",
    ),
    "a bias of another size": Fault(
        "fused_bce/checks.py",
        "tuple(linear_bias.shape) != (num_labels,):",
        "linear_bias.dim() != 1:",
        "head/test_head_roads.py",
    ),
    "a graph without validation": Fault(
        "fused_bce/checks.py",
        "if not _in_vmap():",
        "if False:",
        "compiler/test_compile.py loss/test_extras.py",
    ),
}

COVERAGE = {
    "a weight that requires a gradient": Fault(
        "fused_bce/coverage.py",
        'return f"{name} requires a gradient"',
        "return None",
        "module/test_module.py",
    ),
    "any dtype": Fault(
        "fused_bce/coverage.py",
        "if tensor.dtype not in _COVERED[name]:",
        "if False:",
        "module/test_module.py",
    ),
    "another size of as many dimensions": Fault(
        "fused_bce/coverage.py",
        "if input.shape != target.shape:",
        "if input.dim() != target.dim():",
        "module/test_module.py loss/test_parity.py",
    ),
    "a transform of torch.func": Fault(
        "fused_bce/coverage.py",
        'return "inside a torch.func transform"\n    if forward_ad',
        "return None\n    if forward_ad",
        "autograd/test_transforms.py module/test_module.py",
    ),
    "forward-mode differentiation": Fault(
        "fused_bce/coverage.py",
        'return "inside forward-mode differentiation"',
        "return None",
        "autograd/test_transforms.py module/test_module.py",
    ),
    "torch.jit.trace": Fault(
        "fused_bce/coverage.py",
        'return "inside torch.jit.trace"',
        "return None",
        "module/test_module.py",
    ),
    "a mode of torch functions": Fault(
        "fused_bce/coverage.py",
        "if has_torch_function_variadic(*operands) and not _only_default_device(*operands):",
        "if False:",
        "module/test_module.py",
    ),
    "a default device is an override": Fault(
        "fused_bce/coverage.py",
        "type(mode) is DeviceContext for mode in modes",
        "False for _ in modes",
        "loss/test_parity.py -k default_device",
    ),
    "a reason logged every time": Fault(
        "fused_bce/coverage.py",
        "if reason not in _logged and _logged.setdefault(reason, own := object()) is own:",
        "if True:",
        "module/test_module.py",
    ),
    "a plain tensor beside shards": Fault(
        "fused_bce/coverage.py",
        "(any(of_dtensors) if _replicates_implicitly() else all(of_dtensors))",
        "all(of_dtensors)",
        "distributed/test_distributed.py",
    ),
}

PATCHING = {
    "another library's replacement undone": Fault(
        "fused_bce/patching.py",
        "elif found is not original:",
        "elif False:",
        "module/test_patching.py",
    ),
    "an inner patch ends the outer": Fault(
        "fused_bce/patching.py",
        "if (module, ours.__name__) not in _replaced",
        "if True",
        "module/test_patching.py",
    ),
    "subclasses converted": Fault(
        "fused_bce/patching.py",
        "if type(module) is _torch_class:",
        "if isinstance(module, _torch_class):",
        "module/test_patching.py",
    ),
    "a recompute lost by convert": Fault(
        "fused_bce/patching.py",
        "cast(BCEWithLogitsLoss, module).recompute = recompute",
        "cast(BCEWithLogitsLoss, module).recompute = False",
        "module/test_patching.py autograd/test_roads.py",
    ),
    "a patched function pickled by its own name": Fault(
        "fused_bce/patching.py",
        "    present.__qualname__ = name\n",
        "",
        "module/test_patching.py",
    ),
}

SPARSE = {
    "a padding of -1 in uint8": Fault(
        "fused_bce/sparse.py",
        "kept = indices.to(torch.int64) != as_integer",
        "kept = indices != as_integer",
        "head/test_sparse_target.py",
    ),
    "padding over the last label": Fault(
        "fused_bce/sparse_selection.py",
        "places = torch.where(kept, kept.cumsum(0) - 1, kept.numel())",
        "places = torch.where(kept, kept.cumsum(0) - 1, kept.numel() - 1)",
        "head/test_sparse_target.py",
    ),
    "entries of SciPy that occur twice": Fault(
        "fused_bce/sparse.py",
        "csr.sum_duplicates()",
        "pass",
        "head/test_sparse_target.py",
    ),
    "a matrix of SciPy changed": Fault(
        "fused_bce/sparse.py",
        "                csr = csr.copy()\n",
        "",
        "head/test_sparse_target.py",
    ),
    "the smallest of several values": Fault(
        "fused_bce/sparse.py",
        'dense = scatter(0, places, given, "amax", include_self=False)',
        'dense = scatter(0, places, given, "amin", include_self=False)',
        "head/test_sparse_target.py",
    ),
    "a value behind the last row": Fault(
        "fused_bce/sparse_checks.py",
        "return places < offsets[-1]",
        "return places <= offsets[-1]",
        "head",
    ),
    "a nan counted as often as it occurs": Fault(
        "fused_bce/sparse.py",
        "changes = places.diff(prepend=places.new_full((1,), -1)) != 0",
        "changes = places >= 0",
        "head",
    ),
    "a negative label": Fault(
        "fused_bce/arguments.py",
        "if not 0 <= number < size:",
        "if not number < size:",
        "head/test_sparse_target.py",
    ),
    "offsets that do not begin with 0": Fault(
        "fused_bce/sparse_checks.py",
        "if first != 0:",
        "if first < 0:",
        "head/test_sparse_target.py",
    ),
    "unsorted rows": Fault(
        "fused_bce/sparse.py",
        "columns = columns[order].to(_labels_dtype(columns))",
        "columns = columns.to(_labels_dtype(columns))",
        "head/test_sparse_target.py",
    ),
}

SHARDS = {
    "chunks rounded down": Fault(
        "fused_bce/sharded.py",
        "chunk = -(-size // self.mesh.size(dim))",
        "chunk = size // self.mesh.size(dim)",
        "distributed/test_head_shards.py",
    ),
    "partial sums taken for whole ones": Fault(
        "fused_bce/sharded.py",
        "grad_placements=self.placements(rows, labels, Partial())",
        "grad_placements=self.placements(rows, labels, Replicate())",
        "distributed/test_head_shards.py",
    ),
    "labels of another shard": Fault(
        "fused_bce/sharded.py",
        "SparseTarget(target.indices - label, offsets",
        "SparseTarget(target.indices, offsets",
        "distributed/test_head_shards.py",
    ),
    "a mean over one shard": Fault(
        "fused_bce/sharded.py",
        'divisor is None and call.reduction == "mean"',
        "False",
        "distributed/test_head_shards.py",
    ),
    "another rank than the process's": Fault(
        "fused_bce/siglip.py",
        "if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):",
        "if False:",
        "distributed/test_siglip.py",
    ),
}

LOWERING = {
    "a bias left out": Fault(
        "fused_bce/decompositions.py",
        "bias = None if linear_bias is None else linear_bias.to(dtype)",
        "bias = None",
        "every_loss/test_every_loss_compiled.py head/test_head_compiled.py",
    ),
    "what is ignored counted": Fault(
        "fused_bce/decompositions.py",
        "return (~_ignored(target, ignore_index, ignore_nan)).sum(",
        "return _ignored(target, ignore_index, ignore_nan).sum(",
        "compiler/test_lowering.py compiler/test_compile.py every_loss",
    ),
    "a nan not ignored": Fault(
        "fused_bce/decompositions.py",
        "return ignored | is_ignored(target, math.nan) if ignore_nan else ignored",
        "return ignored",
        "compiler/test_lowering.py compiler/test_compile.py every_loss",
    ),
    "batchmean by elements": Fault(
        "fused_bce/scalars.py",
        "scalar_operand(input.size(0), input)",
        "scalar_operand(input.numel(), input)",
        "loss/test_extras.py",
    ),
    "alpha in the place of gamma": Fault(
        "fused_bce/pointwise.py",
        "tensors[i] = number if",
        "tensors[0] = number if",
        "pointwise focal every_loss",
    ),
}

BUILD = {
    "an old torch": Fault(
        "setup.py",
        "if torch.__version__ < OLDEST_TORCH:",
        'if torch.__version__ < "2.0":',
        "project/test_build.py",
    ),
    "an old setuptools": Fault(
        "setup.py",
        'if int(setuptools.__version__.split(".")[0]) < 77:',
        'if int(setuptools.__version__.split(".")[0]) < 61:',
        "project/test_build.py",
    ),
    "a wheel for any torch": Fault(
        "setup.py",
        'if IS_SDIST else f"torch=={major}.{minor}.*"]',
        'if IS_SDIST else f"torch>={major}.{minor}"]',
        "project/test_packaging.py",
    ),
    "an sdist for one torch": Fault(
        "setup.py",
        'IS_SDIST = "sdist" in sys.argv',
        "IS_SDIST = False",
        "project/test_packaging.py",
    ),
    "a version with dots": Fault(
        "setup.py",
        "torch.version.cuda.replace('.', '')",
        "torch.version.cuda",
        "project/test_packaging.py",
    ),
    "Clang on Linux": Fault(
        "setup.py",
        'if sys.platform == "linux" and "__clang__" in macros:',
        "if False:",
        "project/test_build.py",
    ),
    # Headers are in an sdist without a word of this file, as what the extension depends on.
    "an sdist without the kernels for CUDA": Fault(
        "MANIFEST.in",
        "graft csrc\n",
        "recursive-include csrc *.cpp *.h\n",
        "project/test_packaging.py",
    ),
    "an sdist without its settings": Fault(
        "MANIFEST.in",
        "include .clang-format .clang-tidy .gitignore .pre-commit-config.yaml\n",
        "",
        "project/test_packaging.py",
    ),
}

FORMULAS = {
    "a pos_weight that the gradient lacks": Fault(
        "csrc/formulas/bce.h",
        "flip_sign(q - (u + v) * c, x)",
        "flip_sign(q - c, x)",
        "loss/test_values.py",
    ),
    "infinity times 0": Fault(
        "csrc/formulas/elementary.h",
        "select(factor == Real(0), Real(0), a)",
        "a",
        "loss/test_numerics.py -k infinite",
    ),
    "a coefficient of log1p": Fault(
        "csrc/formulas/elementary.h",
        "0.0792039822f",
        "0.0792039f",
        "loss/test_numerics.py",
    ),
    "a coefficient of log1p in double": Fault(
        "csrc/formulas/elementary.h",
        "0.15630577800922850446",
        "0.0",
        "loss/test_numerics.py",
    ),
    "an exponent beyond the largest": Fault(
        "csrc/formulas/elementary.h",
        "const Real bounded = at_most(a, Real(P::kLargestExponent));",
        "const Real bounded = a;",
        "loss/test_numerics.py",
    ),
}

LOOPS = {
    "a tail of half types": Fault(
        "csrc/cpu/kernels.h",
        "for (int i = count; i % Vec<T>::kLanes != 0; ++i) buffer_[i] = padding_;",
        "for (int i = count; i % Vec<T>::kLanes != 0; ++i) buffer_[i] = S{};",
        "loss/test_values.py",
    ),
    "a tail with weights": Fault(
        "csrc/cpu/kernels.h",
        "for (int i = count; i % Vec<T>::kLanes != 0; ++i) buffer_[i] = 0;",
        "for (int i = count; i % Vec<T>::kLanes != 0; ++i) buffer_[i] = 1;",
        "loss/test_values.py loss/test_extras.py",
    ),
    "a period laid out once": Fault(
        "csrc/cpu/kernels.h",
        "filled < 2 * kTile<T>; filled += n)",
        "filled < kTile<T>; filled += n)",
        "loss/test_values.py",
    ),
    "a gradient that is ignored": Fault(
        "csrc/cpu/kernels.h",
        "      r.grad = select(ignored, V(0), r.grad);\n",
        "",
        "loss/test_extras.py",
    ),
    "long runs in float": Fault(
        "csrc/cpu/kernels.h",
        "constexpr int kRun = kTile<T> / 4;",
        "constexpr int kRun = kTile<T>;",
        "loss/test_numerics.py",
    ),
    "a sum in float": Fault(
        "csrc/cpu/launch.cpp",
        "  double sum = 0;\n  for (const double s : sums)",
        "  float sum = 0;\n  for (const double s : sums)",
        "loss/test_numerics.py",
    ),
    "a zero with a sign": Fault(
        "csrc/cpu/launch.cpp",
        "ignored.index == 0 ? 0x7fff : 0xffff",
        "0xffff",
        "loss/test_extras.py",
    ),
    "a nan counted": Fault(
        "csrc/cpu/launch.cpp",
        "return (value != index) & (value == value);",
        "return value != index;",
        "loss/test_extras.py",
    ),
    "dimensions in the wrong order": Fault(
        "csrc/operands.cpp",
        "return reference.stride(a) > reference.stride(b);",
        "return reference.stride(a) < reference.stride(b);",
        "loss/test_values.py",
    ),
    "a weight that varies along two dimensions": Fault(
        "csrc/operands.cpp",
        "(d->stride == 0 && d + 1 == dims.rend())",
        "d + 1 == dims.rend()",
        "loss/test_values.py",
    ),
    "every target ignored": Fault(
        "csrc/losses.cpp",
        "problem.divisor = value == 0 ? 1 : value;",
        "problem.divisor = value;",
        "loss/test_extras.py",
    ),
}

AUTOGRAD = {
    "a float16 gradient stored": Fault(
        "csrc/autograd.cpp",
        "logits.scalar_type() != at::kHalf && ",
        "",
        "autograd/test_backward.py autograd/test_roads.py autograd/test_memory.py",
    ),
    "a gradient under hooks": Fault(
        "csrc/autograd.cpp",
        " &&\n         !at::SavedTensorDefaultHooks::get_hooks();",
        ";",
        "autograd/test_memory.py autograd/test_saved_tensors.py",
    ),
    "recompute passed over": Fault(
        "csrc/autograd.cpp",
        " && !recompute",
        "",
        "autograd/test_memory.py autograd/test_roads.py",
    ),
    "infinity times what is ignored": Fault(
        "csrc/autograd.cpp",
        "scaled(std::move(stored), grad_loss, o.ignores())",
        "scaled(std::move(stored), grad_loss, false)",
        "loss/test_extras.py autograd",
    ),
    "a divisor counted anew": Fault(
        "csrc/saved_arguments.h",
        "return !o.divisor && o.ignores()",
        "return o.ignores()",
        "loss/test_extras.py",
    ),
    "a shared gradient scaled in place": Fault(
        "csrc/stored_gradients.cpp",
        "const bool shared = stored.use_count() > 1;",
        "const bool shared = false;",
        "autograd",
    ),
    "a weight that requires a gradient, quickly": Fault(
        "csrc/eager_loss.cpp",
        "!(weight.requires_grad() && at::GradMode::is_enabled())",
        "true",
        "module/test_module.py",
    ),
    "recompute passed over, quickly": Fault(
        "csrc/eager_loss.cpp",
        "i < PyTuple_GET_SIZE(extras);",
        "i < PyTuple_GET_SIZE(extras) - 1;",
        "module/test_module.py autograd/test_memory.py autograd/test_roads.py",
    ),
    "a second derivative by the target": Fault(
        "csrc/composite.cpp",
        "if (o.label_smoothing) grad = grad * at::rsub(*o.label_smoothing, 1);",
        "",
        "loss/test_extras.py autograd",
    ),
}

HEAD = {
    "labels beyond 32 bits": Fault(
        "csrc/head/target_blocks.cpp",
        "labels_ = labels_.clamp(-1, labels);",
        "labels_ = labels_;",
        "head",
    ),
    "positives of the block before": Fault(
        "csrc/head/target_blocks.cpp",
        "  if (written.defined()) elements.index_fill_(0, written, 0);\n",
        "",
        "head/test_head.py",
    ),
    "several values added up": Fault(
        "csrc/head/target_blocks.cpp",
        '"amax",',
        '"sum",',
        "head/test_head.py head/test_head_roads.py every_loss/test_every_loss.py",
    ),
    "a block's part of the weight's gradient": Fault(
        "csrc/head/linear_loss.cpp",
        "grad_scale_, !first_rows,",
        "grad_scale_, false,",
        "head/test_head.py",
    ),
    "threads that share a block": Fault(
        "csrc/head/linear_loss.cpp",
        "    const auto work = [&] {\n"
        "      Buffers buffers{blocks_.make_buffer(), targets_.make_buffer()};\n",
        "    Buffers buffers{blocks_.make_buffer(), targets_.make_buffer()};\n"
        "    const auto work = [&] {\n",
        "head/test_head_threads.py",
    ),
    "the first share of the input's gradient alone": Fault(
        "csrc/head/linear_loss.cpp",
        "grad_input.add_(shares[i].grad_input);",
        "",
        "head/test_head_threads.py",
    ),
    "a head's gradient in half precision": Fault(
        "csrc/head/linear_autograd.cpp",
        "const bool in_half = wanted[1] && ",
        "const bool in_half = false && wanted[1] && ",
        "head",
    ),
}

COMPOSITE = {
    "nothing left to count": Fault(
        "csrc/composite.cpp",
        ".sum().clamp_min(1)",
        ".sum()",
        "loss/test_extras.py pointwise/test_calls.py every_loss",
    ),
    "targets smoothed towards 1": Fault(
        "csrc/composite.cpp",
        "+ *o.label_smoothing / 2",
        "+ *o.label_smoothing",
        "loss/test_extras.py pointwise/test_calls.py every_loss",
    ),
    "losses added up in half precision": Fault(
        "csrc/composite.cpp",
        "t.to(at_least_float(in_double ? at::kDouble : o.logits.scalar_type()))",
        "t.to(in_double ? at::kDouble : o.logits.scalar_type())",
        "loss/test_extras.py pointwise/test_calls.py focal every_loss",
    ),
    "a nan that is ignored reaches a gradient": Fault(
        "csrc/composite.cpp",
        "return zero_where_ignored(widened(o.logits, o), o);",
        "return widened(o.logits, o);",
        "loss/test_extras.py pointwise/test_calls.py every_loss",
    ),
    "the weight of the wrong side": Fault(
        "csrc/composite/focal.cpp",
        "at::where(side > 0, of_positive(), of_negative())",
        "at::where(side > 0, of_negative(), of_positive())",
        "pointwise every_loss",
    ),
    "a detached weight is not": Fault(
        "csrc/composite/varifocal.cpp",
        "detaches_weight ? x.detach() : x",
        "x",
        "pointwise every_loss",
    ),
}

WITHOUT_VALUES = {
    "autocast in half precision": Fault(
        "csrc/autocast.h",
        "widened.dtype = at_least_float(dtype_of_loss(widened));",
        "widened.dtype = dtype_of_loss(widened);",
        "loss/test_parity.py -k autocast",
    ),
    "autocast of float64": Fault(
        "csrc/autocast.h",
        "  if (cast.input.scalar_type() != at::kDouble)\n",
        "",
        "head",
    ),
    "a fake gradient in the target's dtype": Fault(
        "csrc/meta.h",
        "return {meta::forward(o), at::empty_like(o.logits)};",
        "return {meta::forward(o), at::empty_like(o.target)};",
        "compiler/test_lowering.py compiler/test_compile.py every_loss",
    ),
    "a fake count in float": Fault(
        "csrc/meta.h",
        "target.options().dtype(at::kDouble)",
        "target.options().dtype(at::kFloat)",
        "compiler/test_lowering.py compiler/test_compile.py every_loss",
    ),
}

IN_PYTHON = CHECKS | COVERAGE | PATCHING | SPARSE | SHARDS | LOWERING | BUILD
IN_CPP = FORMULAS | LOOPS | AUTOGRAD | HEAD | COMPOSITE | WITHOUT_VALUES
FAULTS = IN_PYTHON | IN_CPP
