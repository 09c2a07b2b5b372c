"""Times the fused loss against torch's, eager and compiled, and against the memory.

    python benchmarks/run.py                       a ladder of sizes, with and without backward
    python benchmarks/run.py --preset NAME         one of the other presets

See benchmarks/README.md.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

import fused_bce
from cases.base import DTYPES, MODES, REDUCTIONS, WEIGHTS, Case
from cases.ladder import Alone
from cases.preset import Preset, Selection
from cases.registry import DEFAULT, PRESETS
from harness import machine
from harness.rows import RESULTS, Row, append_rows, csv_path, start_file
from harness.tables import BY_CONTENDER, BY_SIZE, Measured, goals_table, make_console
from harness.timing import calls_per_sample, peak_bytes, time_alternating


def parse_size(text: str) -> int:
    base, _, exponent = text.partition("^")
    if not (base.isdecimal() and int(base) > 0 and (exponent or "1").isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 640 or 2^20")
    return int(base) ** int(exponent or 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["presets:", *(f"  {n:<10} {p.summary}" for n, p in PRESETS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    named = {name: preset.workloads for name, preset in PRESETS.items() if preset.workloads}
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--preset", choices=PRESETS, default=DEFAULT, help="the next seven options select from it")
    names = "; ".join(f"{preset}: {', '.join(map(repr, them))}" for preset, them in named.items())
    choices = list(itertools.chain(*named.values()))
    add("--workloads", nargs="+", choices=choices, metavar="NAME", help=f"of a preset: {names}")
    add("--sizes", nargs="+", type=parse_size, metavar="N", help="elements, such as 640 or 2^20")
    add("--mode", nargs="+", choices=MODES, help="default: both")
    add("--dtype", nargs="+", choices=DTYPES, help="of the logits; default: float32")
    add("--target-dtype", choices=DTYPES, help="default: that of the logits")
    add("--reduction", nargs="+", choices=REDUCTIONS, help="default: mean")
    add("--weights", nargs="+", choices=WEIGHTS, help="per column, per row, or both; default: none")
    add("--non-leaf", action="store_true", help="backward goes on through a view, to the leaf")
    add("--graph", action="store_true", help="CUDA graphs too: N to 2^16, training")
    sets = fused_bce.build_info()["cpu_instruction_sets"]
    add("--instruction-set", choices=sets, help="of this CPU, for all; default: the best")
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
    if arguments.workloads and arguments.preset not in named:
        *most, last = named
        parser.error(f"--workloads needs --preset {', '.join(most)} or {last}")
    if arguments.alone and (arguments.preset != DEFAULT or arguments.graph):
        parser.error("--alone goes with the ladder of sizes: presets and graphs compare")
    if arguments.graph and arguments.device == "cpu":
        parser.error("--graph needs --device cuda: CUDA graphs replay what runs on a GPU")
    return arguments


def measure(
    case: Case, preset: Preset, arguments: argparse.Namespace, facts: dict
) -> dict[str, Row]:
    """One row for each contender."""
    torch.manual_seed(0)
    contenders = preset.contenders(
        case, with_compile=not arguments.no_compile, with_graph=arguments.graph
    )
    steps = {name: contender.step for name, contender in contenders.items()}
    calls = calls_per_sample(steps, case.device)
    with machine.OtherLoad() as others:
        timings = time_alternating(steps, calls, case.device, arguments.repeats, arguments.seconds)
    bytes_per_element = {
        name: contender.bytes_per_element or case.bytes_per_element
        for name, contender in contenders.items()
    }
    rows = {}
    del steps
    for name in list(contenders):
        # Those that were timed make room: at the largest sizes there is room for one.
        renew = contenders.pop(name).renew
        rows[name] = Row(
            **facts | dataclasses.asdict(case),
            shape="x".join(map(str, case.shape)),
            contender=name,
            bytes_per_element=bytes_per_element[name],
            median_seconds=timings[name].median,
            iqr_seconds=timings[name].iqr,
            wall_seconds=timings[name].wall_median,
            peak_bytes=peak_bytes(renew(), case.device) - case.uncounted_bytes if renew else None,
            other_load=others.processors,
        )
    return rows


def measure_all(
    cases: list[Case], preset: Preset, arguments: argparse.Namespace, console: Console
) -> Measured:
    """Prints a table and extends the CSV file as the cases are done."""
    facts = machine.facts(arguments.device)
    machine.touch_constants()
    path = csv_path(arguments.output, facts, arguments.preset)
    start_file(path, arguments.append)
    measured: Measured = {}
    table, legend = BY_SIZE if preset.by_size else BY_CONTENDER
    for title, group in itertools.groupby(cases, key=lambda case: case.title):
        of_group: Measured = {}
        for case in group:
            with console.status(f"{title}, {case.label}"):
                of_group[case] = measure(case, preset, arguments, facts)
            append_rows(path, list(of_group[case].values()))
        console.print(table(of_group))
        measured |= of_group
    console.print(legend, *preset.notes(cases), sep="\n", soft_wrap=True)
    console.print(f"Written to {path}", soft_wrap=True)
    return measured


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


def use_instruction_set(name: str) -> None:
    """For torch, too, which looks when it first computes, and for what torch.compile writes."""
    fused_bce._C.use_instruction_set(name)
    os.environ["ATEN_CPU_CAPABILITY"] = name if name.startswith("avx") else "default"


def main() -> None:
    arguments = parse_arguments()
    if arguments.instruction_set:
        use_instruction_set(arguments.instruction_set)
    preset = Alone() if arguments.alone else PRESETS[arguments.preset]
    asked = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Selection)}
    selection = Selection(**asked)
    cases = [selection.with_logits(c) for c in preset.cases(selection) if selection.takes(c)]
    if not cases:
        sys.exit(f"The preset {arguments.preset} has no such case")
    console = make_console()
    measured = measure_all(cases, preset, arguments, console)
    goals = [
        dataclasses.replace(goal, case=selection.with_logits(goal.case))
        for goal in preset.goals(arguments.device)
        if selection.takes(goal.case)
    ]
    if goals:
        console.print(goals_table(goals, measured))
    warn_of_load(measured, console)


if __name__ == "__main__":
    main()
