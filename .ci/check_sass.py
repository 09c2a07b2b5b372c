"""Reads the machine code of the plain mean kernels in a build, without a GPU.

    python .ci/check_sass.py fused_bce/_C*.so

For float32 and bfloat16, with targets of the same dtype or bool, and each GPU architecture in the
build, the loop that does the work must load and store 128 bits at a time, use no local memory (so
no register is spilled), and take few instructions an element. Needs cuobjdump and nvdisasm (from
PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm, for which this looks beside the installed
packages). Exits with 1 if a check fails or a kernel is not found.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

# Mangled name and most instructions an element. Pass 1 is kSumAndGrad, b0 without weights. At the
# full bandwidth of a Hopper GPU there is time for 106, 53, 80 and 44.
LOSS = "loss_kernelINS_18BinaryCrossEntropyE"
KERNELS = {
    "float32": (LOSS + "ffLNS_4PassE1ELb0E", 36),
    "bfloat16": (LOSS + "13__nv_bfloat16S2_LNS_4PassE1ELb0E", 36),
    "float32, bool targets": (LOSS + "fNS_7BooleanELNS_4PassE1ELb0E", 37),
    "bfloat16, bool targets": (LOSS + "13__nv_bfloat16NS_7BooleanELNS_4PassE1ELb0E", 37),
}


def run_cuobjdump(*arguments: str) -> str:
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    path = os.pathsep.join([str(packaged), os.environ["PATH"]])
    return subprocess.run(
        ["cuobjdump", *arguments],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def functions(listing: str) -> dict[tuple[str, str], str]:
    """The text of each function, by architecture and mangled name."""
    found = {}
    for per_arch in re.split(r"\n(?=\s*arch = )", listing):
        arch = re.search(r"arch = (\w+)", per_arch)
        for function in re.split(r"\n\s*Function : ", per_arch)[1:]:
            name, _, body = function.partition("\n")
            found[arch[1], name.strip()] = body
    return found


def hot_loop(body: str) -> list[str]:
    """The instructions of the smallest loop with exponentials and whole-vector loads."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
    index = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    loops = []
    for i, (address, text) in enumerate(instructions):
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            loops.append([text for _, text in instructions[index[int(target[1], 16)] : i + 1]])
    working = [loop for loop in loops if count(loop, "MUFU.EX2") and count(loop, r"LDG.*\.128")]
    return min(working, key=len, default=[])


def count(loop: list[str], pattern: str) -> int:
    return sum(re.search(pattern, text) is not None for text in loop)


def problems_of(loop: list[str], most_instructions: int) -> list[str]:
    if not loop:
        return ["no loop with 128-bit loads"]
    per_element = len(loop) / count(loop, "MUFU.EX2")
    narrow = count(loop, r"(LDG|STG)(?!.*\.128)")
    local = count(loop, r"\b(LDL|STL)\b")
    print(
        f"{per_element:.1f} instructions an element, {count(loop, 'LDG')} loads and "
        f"{count(loop, 'STG')} stores of 128 bits for {count(loop, 'MUFU.EX2')} elements"
    )
    return [
        text
        for bad, text in (
            (per_element > most_instructions, f"more than {most_instructions} instructions"),
            (narrow, f"{narrow} accesses narrower than 128 bits"),
            (not count(loop, "STG"), "no store"),
            (local, f"{local} accesses to local memory"),
        )
        if bad
    ]


def main(path: str) -> int:
    sass = functions(run_cuobjdump("-sass", path))
    usage = run_cuobjdump("-res-usage", path)
    failures = 0
    for dtypes, (mangled, most_instructions) in KERNELS.items():
        matches = {key: body for key, body in sass.items() if mangled in key[1]}
        if not matches:
            print(f"{dtypes}: no such kernel in {path}")
            failures += 1
        for (arch, name), body in matches.items():
            print(f"{dtypes}, mean, {arch}: ", end="")
            problems = problems_of(hot_loop(body), most_instructions)
            registers = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", usage)
            print(f"  {registers[1]} registers, {registers[2]} bytes of stack")
            if int(registers[2]):
                problems.append("registers are spilled")
            for problem in problems:
                print(f"  FAILED: {problem}")
            failures += len(problems)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
