"""Times the fused loss against torch's, eager and compiled, and against the memory.

    python benchmarks/run.py                       a ladder of sizes, with and without backward
    python benchmarks/run.py --preset goals        the goals for the device: met or missed
    python benchmarks/run.py --preset workloads    losses as people train with them
    python benchmarks/run.py --preset training     whole training steps
    python benchmarks/run.py --preset peers        other ways to compute the same
    python benchmarks/run.py --preset extras       what torch's loss does not take, against by hand
    python benchmarks/run.py --preset heads        several losses, summed, and one backward pass

See benchmarks/README.md.
"""

import argparse
import dataclasses
import itertools
import shlex
import sys
from pathlib import Path

import torch
from cases import extras, heads, training
from cases.base import DTYPES, MODES, NON_LEAF, REDUCTIONS, WEIGHTS, Case
from cases.extras import EXTRA_SIZES, EXTRAS, ExtraCase, extra_case
from cases.goal import Goal, goal_case
from cases.goals_cpu import cpu_goals
from cases.goals_cuda import cases_without_goals, cuda_goals
from cases.heads import HEAD_SIZES, HEADS, HeadsCase, heads_case
from cases.training import NETWORKS, TrainingCase, training_case
from cases.workloads import WORKLOADS, WorkloadCase, describe, workload_case
from contenders.base import Contender, make_contenders, takes_bool_targets
from contenders.limits import copied_per_element
from contenders.peers import missing_peers
from harness import machine
from harness.rows import Row, append_rows, file_name, start_file
from harness.tables import (
    CONTENDERS_LEGEND,
    LEGEND,
    Measured,
    contenders_table,
    goals_table,
    times_table,
)
from harness.timing import calls_per_sample, peak_bytes, time_alternating
from rich.console import Console

SIZES = [1, 16, 128, 640, 2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24]
PRESETS = ("goals", "workloads", "training", "peers", "extras", "heads")
PEER_SIZES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**16, 2**24, 2**26)}
RESULTS = Path(__file__).parent / "results"


def parse_size(text: str) -> int:
    base, _, exponent = text.partition("^")
    if not (base.isdecimal() and int(base) > 0 and (exponent or "1").isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 640 or 2^20")
    return int(base) ** int(exponent or 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = (
        f"of the presets workloads ({', '.join(WORKLOADS)}), training ({', '.join(NETWORKS)}), "
        f"extras ({'; '.join(EXTRAS)}) and heads ({'; '.join(HEADS)})"
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--preset", choices=PRESETS, help="the next seven options select from it")
    named = (*WORKLOADS, *NETWORKS, *EXTRAS, *HEADS)
    add("--workloads", nargs="+", choices=named, metavar="NAME", help=names)
    add("--sizes", nargs="+", type=parse_size, metavar="N", help="elements, such as 640 or 2^20")
    add("--mode", nargs="+", choices=MODES, help="default: both")
    add("--dtype", nargs="+", choices=DTYPES, help="of the logits; default: float32")
    add("--target-dtype", choices=DTYPES, help="default: that of the logits")
    add("--reduction", nargs="+", choices=REDUCTIONS, help="default: mean")
    add("--weights", nargs="+", choices=WEIGHTS, help="per column, per row, or both; default: none")
    add("--non-leaf", action="store_true", help="backward goes on through a view, to the leaf")
    add("--graph", action="store_true", help="time CUDA graphs too, up to N = 2^16")
    add("--repeats", type=int, default=7, help="rounds at least, for each case (7)")
    add("--seconds", type=float, default=2, help="more rounds while these last (2)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--alone", action="store_true", help="fused and none beside it, for the largest sizes")
    add("--output", type=Path, default=RESULTS, help="a CSV file, or a folder (benchmarks/results)")
    add("--append", action="store_true", help="add to the CSV file, in place of a new one")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.workloads and arguments.preset in (None, "goals", "peers"):
        parser.error("--workloads needs --preset workloads, training, extras or heads")
    if arguments.alone and (arguments.preset or arguments.graph):
        parser.error("--alone goes with the ladder of sizes: presets and graphs compare")
    if arguments.graph and arguments.device == "cpu":
        parser.error("--graph needs --device cuda: CUDA graphs replay what runs on a GPU")
    return arguments


def ladder_cases(arguments: argparse.Namespace) -> list[Case]:
    # The sizes run fastest: cases that differ in nothing else share a table.
    combinations = itertools.product(
        arguments.mode or MODES,
        arguments.dtype or ["float32"],
        arguments.reduction or ["mean"],
        arguments.weights or ["none"],
        arguments.sizes or SIZES,
    )
    cases = [
        Case(
            numel=numel,
            device=arguments.device,
            mode=mode,
            dtype=dtype,
            target_dtype=arguments.target_dtype or dtype,
            reduction=reduction,
            weights=weights,
        )
        for mode, dtype, reduction, weights, numel in combinations
    ]
    return [with_logits(case, arguments) for case in cases]


def is_selected(case: Case, arguments: argparse.Namespace) -> bool:
    return (
        case.numel in (arguments.sizes or [case.numel])
        and case.mode in (arguments.mode or [case.mode])
        and case.dtype in (arguments.dtype or DTYPES)
        and case.target_dtype == (arguments.target_dtype or case.target_dtype)
        and case.reduction in (arguments.reduction or REDUCTIONS)
        and case.weights in (arguments.weights or WEIGHTS)
        and case.workload in (arguments.workloads or [case.workload])
    )


def preset_goals(arguments: argparse.Namespace) -> list[Goal]:
    if arguments.preset != "goals":
        return []
    goals = cuda_goals() if arguments.device == "cuda" else cpu_goals()
    return [
        dataclasses.replace(goal, case=with_logits(goal.case, arguments))
        for goal in goals
        if is_selected(goal.case, arguments)
    ]


def preset_cases(goals: list[Goal], arguments: argparse.Namespace) -> list[Case]:
    device = arguments.device
    cases = {
        "goals": cases_without_goals() if device == "cuda" else [],
        "workloads": [workload_case(name, device) for name in WORKLOADS],
        "training": [training_case(name, device) for name in NETWORKS],
        "peers": [goal_case(device, n, mode) for mode in MODES for n in PEER_SIZES[device]],
        # They have no shapes of their own: any size will do.
        "extras": [
            extra_case(name, device, n) for n in arguments.sizes or EXTRA_SIZES for name in EXTRAS
        ],
        "heads": [
            heads_case(name, device, n)
            for n in arguments.sizes or HEAD_SIZES[device]
            for name in HEADS
        ],
    }[arguments.preset]
    selected = [with_logits(case, arguments) for case in cases if is_selected(case, arguments)]
    # Several goals share a case.
    return list(dict.fromkeys([*(goal.case for goal in goals), *selected]))


def with_logits(case: Case, arguments: argparse.Namespace) -> Case:
    """The case with the kind of logits that is asked for; without backward there is only one."""
    if arguments.non_leaf and case.mode == "fwd+bwd":
        return dataclasses.replace(case, mode=NON_LEAF)
    return case


def contenders_of(case: Case, arguments: argparse.Namespace) -> dict[str, Contender]:
    if isinstance(case, TrainingCase):
        return training.make_contenders(case, with_compile=not arguments.no_compile)
    if isinstance(case, ExtraCase):
        return extras.make_contenders(case, with_compile=not arguments.no_compile)
    if isinstance(case, HeadsCase):
        return heads.make_contenders(case, with_compile=not arguments.no_compile)
    return make_contenders(
        case,
        with_compile=not arguments.no_compile,
        with_graph=arguments.graph,
        with_peers=arguments.preset == "peers",
        alone=arguments.alone,
    )


def measure(case: Case, arguments: argparse.Namespace, facts: dict) -> dict[str, Row]:
    """One row for each contender."""
    torch.manual_seed(0)
    contenders = contenders_of(case, arguments)
    steps = {name: contender.step for name, contender in contenders.items()}
    calls = calls_per_sample(steps, case.device)
    with machine.OtherLoad() as others:
        timings = time_alternating(steps, calls, case.device, arguments.repeats, arguments.seconds)
    bytes_per_element = dict.fromkeys(steps, case.bytes_per_element)
    bytes_per_element["copy"] = 2 * copied_per_element(case.numel)
    if "fused plain" in steps:
        bytes_per_element["fused plain"] = case.plain.bytes_per_element
    rows = {}
    del steps
    for name in list(contenders):
        # Those that were timed make room: at the largest sizes there is room for one.
        renew = contenders.pop(name).renew
        rows[name] = Row(
            **facts,
            **dataclasses.asdict(case),
            shape="x".join(map(str, case.shape)),
            contender=name,
            bytes_per_element=bytes_per_element[name],
            median_seconds=timings[name].median,
            iqr_seconds=timings[name].iqr,
            wall_seconds=timings[name].wall_median,
            peak_bytes=peak_bytes(renew(), case.device) if renew else None,
            other_load=others.processors,
        )
    return rows


def measure_all(cases: list[Case], arguments: argparse.Namespace, console: Console) -> Measured:
    """Prints a table and extends the CSV file as the cases are done."""
    facts = {**machine.facts(arguments.device), "command": shlex.join(["python", *sys.argv])}
    path = arguments.output
    if path.suffix != ".csv":
        content = arguments.preset or "ladder"
        path /= file_name(arguments.device, facts["device_name"], facts["date"], content)
    start_file(path, arguments.append)
    measured: Measured = {}
    compares = arguments.preset in (None, "goals") and not arguments.alone
    table = times_table if compares else contenders_table
    for title, group in itertools.groupby(cases, key=lambda case: case.title):
        of_group: Measured = {}
        for case in group:
            with console.status(f"{title}, {case.label}"):
                of_group[case] = measure(case, arguments, facts)
            append_rows(path, list(of_group[case].values()))
        console.print(table(of_group))
        measured |= of_group
    legend = LEGEND if table is times_table else CONTENDERS_LEGEND
    console.print(legend, *notes(cases, arguments), sep="\n", soft_wrap=True)
    console.print(f"Written to {path}", soft_wrap=True)
    return measured


def notes(cases: list[Case], arguments: argparse.Namespace) -> list[str]:
    """What a reader of the tables must know beside the numbers."""
    workloads = [case for case in cases if isinstance(case, WorkloadCase)]
    lines = [describe(case) for case in workloads]
    if any(case.target_dtype == "bool" for case in workloads):
        fused = "takes them" if takes_bool_targets(arguments.device) else "gets the same"
        lines.append(f"Bool targets: cast to the dtype of the logits for torch, fused {fused}.")
    if arguments.preset == "extras":
        lines += [extras.describe(name) for name in dict.fromkeys(case.workload for case in cases)]
    if arguments.preset == "heads":
        lines += heads.NOTES
    if arguments.preset == "peers":
        missing = {
            f"{name}: {reason}" for case in cases for name, reason in missing_peers(case).items()
        }
        lines += [f"Not measured: {line}." for line in sorted(missing)]
    return lines


def warn_of_load(measured: Measured, console: Console) -> None:
    disturbed = [
        f"{case.title}: {case.label}"
        for case, rows in measured.items()
        if rows["fused"].is_disturbed
    ]
    if disturbed:
        console.print(
            "[bold red]Other work kept processors busy (column other_load); do not trust the times "
            f"of: {'; '.join(disturbed)}",
            soft_wrap=True,
        )


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    if not console.is_terminal:
        console.width = 150
    goals = preset_goals(arguments)
    cases = preset_cases(goals, arguments) if arguments.preset else ladder_cases(arguments)
    if not cases:
        sys.exit(f"The preset {arguments.preset} has no such case")
    measured = measure_all(cases, arguments, console)
    if goals:
        console.print(goals_table(goals, measured))
    warn_of_load(measured, console)


if __name__ == "__main__":
    main()
