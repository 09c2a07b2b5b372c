"""Prints the build, checks loss and gradient on every device here against float64, and compares
their time with torch's. The exit status is 1 if a check fails."""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from fused_bce import BCEWithLogitsLoss, build_info, why_not_fused
from fused_bce.functional import binary_cross_entropy_with_logits

# The largest errors that pass, in units of the last place of the dtype. Half types are the float32
# result, rounded once; in float64 the value to compare with has an error of that size itself.
LIMITS = {torch.float16: 0.51, torch.bfloat16: 0.51, torch.float32: 4.0, torch.float64: 8.0}
# Several chunks of the sum. A power of two: to divide by the number of elements loses nothing.
SHAPE = (512, 64)
# Beyond it gradients divided by the number of elements would leave float32's normal numbers.
LARGEST_LOGIT = 70

SIZES = {"cpu": (2**7, 2**12, 2**16, 2**20, 2**22), "cuda": (2**7, 2**12, 2**16, 2**20, 2**24)}
SAMPLE_SECONDS = 2e-3  # at least one call
ROUNDS = 20
# Times nearer to each other than this are the same.
NOISE = 0.05


@dataclass(frozen=True)
class Device:
    device: str
    name: str
    why_not_fused: str | None


@dataclass(frozen=True)
class Check:
    """The largest errors in one dtype, in units of the last place; None if one is no number."""

    device: str
    dtype: str
    loss: float | None
    gradient: float | None
    mean: float | None
    limit: float

    @property
    def passed(self) -> bool:
        errors = (self.loss, self.gradient, self.mean)
        return all(error is not None and error <= self.limit for error in errors)


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward, through the module."""

    device: str
    numel: int
    torch: float
    fused: float

    @property
    def speedup(self) -> float:
        return self.torch / self.fused


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_bce", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    as_json = parser.parse_args(arguments).json
    say = (lambda text: None) if as_json else print

    build = show_build(say)
    devices = show_devices(say)
    usable = [device.device for device in devices if device.why_not_fused is None]
    checks = check_all(usable, say)
    times = time_all(usable, say)
    passed = all(check.passed for check in checks)
    say("\n" + verdict(times))
    say("All checks passed." if passed else "A CHECK FAILED: see the errors above their limit.")
    if as_json:
        report = {
            "build": build,
            "devices": [asdict(device) for device in devices],
            "checks": [asdict(check) | {"passed": check.passed} for check in checks],
            "times": [asdict(row) | {"speedup": row.speedup} for row in times],
            "verdict": verdict(times),
            "passed": passed,
        }
        print(json.dumps(report, indent=2))
    return 0 if passed else 1


def show_build(say: Callable) -> dict:
    build = build_info() | {
        "running_torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    archs = build["cuda_archs"]
    others = [
        name for name in build["cpu_instruction_sets"] if name != build["cpu_instruction_set"]
    ]
    say(
        f"fused_bce {build['version']}, built for torch {build['torch']} by {build['compiler']}; "
        f"this is torch {torch.__version__}\n"
        f"CPU kernels: {build['cpu_instruction_set']}, {build['threads']} threads"
        f" (this processor also runs {', '.join(others) or 'no others'})\n"
        f"CUDA kernels: {'none in this build' if archs is None else ', '.join(archs)}"
    )
    return build


def show_devices(say: Callable) -> list[Device]:
    names = {"cpu": platform.processor() or platform.machine()}
    names |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    devices = []
    for device, name in names.items():
        tensor = torch.zeros(1, device=device)
        reason = why_not_fused(tensor, tensor)
        devices.append(Device(device, name, reason))
        say(f"{device}: {name}" + (f", left to torch: {reason}" if reason else ""))
    return devices


def check_all(devices: list[str], say: Callable) -> list[Check]:
    say("\nLargest errors against float64, in units of the last place")
    say(f"{'device':8} {'dtype':10} {'loss':>8} {'gradient':>8} {'mean':>8} {'limit':>6}")
    checks = []
    for device in devices:
        for dtype in LIMITS:
            result = check(device, dtype)
            checks.append(result)
            loss, gradient, mean = (
                "nan or inf" if error is None else f"{error:.3g}"
                for error in (result.loss, result.gradient, result.mean)
            )
            say(
                f"{device:8} {result.dtype:10} {loss:>8} {gradient:>8} {mean:>8} "
                f"{result.limit:6g}  {'ok' if result.passed else 'FAILED'}"
            )
    return checks


def check(device: str, dtype: torch.dtype) -> Check:
    """The loss of each element and their mean, and the gradient of both: that of the mean is
    computed in the forward pass, the other in backward."""
    logits, target, pos_weight = draw(dtype)
    true_losses, true_grads = true_values(logits, target, pos_weight)
    leaf = logits.to(device).requires_grad_()
    target, pos_weight = target.to(device), pos_weight.to(device)

    def evaluate(reduction: str, grad_loss: float) -> tuple[Tensor, Tensor]:
        loss = binary_cross_entropy_with_logits(
            leaf, target, pos_weight=pos_weight, reduction=reduction
        )
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, grad_loss))
        return loss.detach(), grad

    losses, grads = evaluate("none", 1)
    mean, grads_of_mean = evaluate("mean", logits.numel())
    true_mean = math.fsum(true_losses.flatten().tolist()) / logits.numel()
    return Check(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        loss=largest_error(losses, true_losses),
        gradient=largest_error(torch.stack([grads, grads_of_mean]), true_grads),
        mean=largest_error(mean, torch.tensor(true_mean, dtype=torch.float64)),
        limit=LIMITS[dtype],
    )


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, half of them in the tails; hard targets; weights that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(SHAPE, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    logits[::2] *= LARGEST_LOGIT
    logits[1::2] *= 10
    target = torch.empty(SHAPE, dtype=dtype).bernoulli_(generator=generator)
    pos_weight = torch.tensor([0.5, 1, 2, 3]).repeat(SHAPE[1] // 4)
    return logits.to(dtype), target, pos_weight.to(dtype)


def true_values(logits: Tensor, target: Tensor, pos_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradients in float64, where no two terms cancel, unlike in torch's own loss."""
    positive = target == 1
    scale = torch.where(positive, pos_weight.double(), 1.0)
    away = torch.where(positive, -logits.double(), logits.double())  # grows with the loss
    losses = scale * torch.logaddexp(away, torch.zeros_like(away))
    grads = scale * torch.sigmoid(away)
    return losses, torch.where(positive, -grads, grads)


def largest_error(result: Tensor, true: Tensor) -> float | None:
    """In units of the last place of the result's dtype."""
    info = torch.finfo(result.dtype)
    exponent = torch.frexp(true.abs().clamp_min(info.smallest_normal)).exponent - 1
    unit = torch.ldexp(torch.full_like(true, info.eps), exponent)
    error = ((result.cpu().double() - true).abs() / unit).max().item()
    return error if math.isfinite(error) else None


def time_all(devices: list[str], say: Callable) -> list[Times]:
    say("\nForward and backward, float32, mean")
    say(f"{'device':8} {'N':>10} {'torch':>10} {'fused':>10} {'faster':>8}")
    times = []
    for device in devices:
        for numel in SIZES[torch.device(device).type]:
            row = measure(device, numel)
            times.append(row)
            say(
                f"{device:8} {numel:10,} {row.torch * 1e3:7.3f} ms {row.fused * 1e3:7.3f} ms "
                f"{row.speedup:7.2f}x"
            )
    return times


def measure(device: str, numel: int) -> Times:
    """The fastest of samples taken in turns: what else the machine does only adds to them."""
    timers = {
        "torch": make_timer(torch.nn.BCEWithLogitsLoss(), device, numel),
        "fused": make_timer(BCEWithLogitsLoss(), device, numel),
    }
    calls = {}
    for name, timer in timers.items():
        seconds = timer.blocked_autorange(min_run_time=SAMPLE_SECONDS).median
        calls[name] = max(1, round(SAMPLE_SECONDS / seconds))
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(calls[name]).median)
    return Times(device, numel, **{name: min(samples[name]) for name in timers})


def make_timer(loss: torch.nn.Module, device: str, numel: int) -> Timer:
    logits = torch.randn(numel, device=device, requires_grad=True)
    target = torch.empty(numel, device=device).bernoulli_()

    def step():
        logits.grad = None
        loss(logits, target).backward()

    return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())


def verdict(times: list[Times]) -> str:
    """One line for a person who has to choose."""
    if not times:
        return "The fused loss runs on no device here: torch's own function is called instead."
    is_faster = max(row.speedup for row in times) > 1 + NOISE
    parts = []
    for device in dict.fromkeys(row.device for row in times):
        speedups = [row.speedup for row in times if row.device == device]
        parts.append(f"{min(speedups):.1f} to {max(speedups):.1f} times as fast on {device}")
    slower = [f"N = {row.numel:,} on {row.device}" for row in times if row.speedup < 1 - NOISE]
    if slower:
        parts.append("slower for " + ", ".join(slower))
    answer = "is faster than" if is_faster else "is not faster than"
    return f"The fused loss {answer} torch's on this machine: {', '.join(parts)}."


if __name__ == "__main__":
    sys.exit(main())
