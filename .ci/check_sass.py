"""Reads the machine code of the mean kernels in a build, without a GPU.

    python .ci/check_sass.py fused_bce/_C*.so

For float32 and bfloat16, with targets of the same dtype, bool or int64, each variant of the kernel
but the general one (of other losses the plain one, with targets of the same dtype), and each GPU
architecture in the build: the loop that does the work must load and store 128 bits at a time, use
no local memory (so no register is spilled), and take few instructions an element; the last block
must have many of the sums it adds up under way. Needs cuobjdump and nvdisasm (from PyPI:
nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm, for which this looks beside the installed packages).
Exits with 1 if a check fails or a kernel is not found.
"""

import os
import re
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path

# The place in enum Variant. Rows read one weight for a vector of elements.
VARIANTS = {"plain": 0, "extras": 1, "columns": 2, "rows": 3}
# Formula, mangled dtypes, elements of 128 bits, and most instructions an element, plain and in the
# other variants. At the full bandwidth of a Hopper GPU there is time for 106, 53, 80, 44, 141, 106,
# 106 and 53. Of the other losses an element takes one of several branches.
BCE, FOCAL = "18BinaryCrossEntropy", "12SigmoidFocal"
QUALITY, VARIFOCAL, ASYMMETRIC = "12QualityFocal", "9Varifocal", "10Asymmetric"
KERNELS = {
    "float32": (BCE, "ff", 4, 33, 44),
    "bfloat16": (BCE, "13__nv_bfloat16S2_", 8, 35, 44),
    "float32, bool targets": (BCE, "fNS_7BooleanE", 4, 35, 44),
    "bfloat16, bool targets": (BCE, "13__nv_bfloat16NS_7BooleanE", 8, 36, 44),
    "float32, int64 targets": (BCE, "fl", 4, None, 45),
    "bfloat16, int64 targets": (BCE, "13__nv_bfloat16l", 8, None, 45),
    "focal, float32": (FOCAL, "ff", 4, 400, None),
    "focal, bfloat16": (FOCAL, "13__nv_bfloat16S2_", 8, 400, None),
    "quality focal, float32": (QUALITY, "ff", 4, 200, None),
    "varifocal, float32": (VARIFOCAL, "ff", 4, 110, None),
    "asymmetric, float32": (ASYMMETRIC, "ff", 4, 340, None),
}
LEAST_SUMS = 8


def mangled(formula: str, dtypes: str, variant: int) -> str:
    """Pass 1 is kSumAndGrad."""
    return f"loss_kernelINS_{formula}E{dtypes}LNS_4PassE1ELNS_7VariantE{variant}E"


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
        for function in re.split(r"\n\s*Function (?:: )?", per_arch)[1:]:
            name, _, body = function.partition("\n")
            found[arch[1], name.strip(" :")] = body
    return found


def instructions_of(body: str) -> list[tuple[str, str]]:
    """Address and text."""
    return re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)


def hot_loop(body: str) -> list[str]:
    """The instructions of the smallest loop with exponentials and whole-vector stores."""
    instructions = instructions_of(body)
    index = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    loops = []
    for i, (address, text) in enumerate(instructions):
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            loops.append([text for _, text in instructions[index[int(target[1], 16)] : i + 1]])
    working = [loop for loop in loops if count(loop, "MUFU.EX2") and count(loop, r"STG.*\.128")]
    return min(working, key=len, default=[])


def count(loop: list[str], pattern: str) -> int:
    return sum(re.search(pattern, text) is not None for text in loop)


def sums_under_way(body: str) -> int:
    """The most loads past the L1 cache, which are those of other blocks' sums, at once."""
    most = now = 0
    for _, text in instructions_of(body):
        if re.search("LDG.*STRONG", text):
            now += 1
        elif "DADD" in text:
            now = 0
        most = max(most, now)
    return most


def problems_of(body: str, rows: bool, lanes: int, most_instructions: int) -> list[str]:
    loop = hot_loop(body)
    if not loop:
        return ["no loop with 128-bit stores"]
    elements = count(loop, "STG") * lanes
    per_element = len(loop) / elements
    # Dense operands pass by once: "evict first".
    narrow = count(loop, rf"(LDG{'.*EF' if rows else ''}|STG)(?!.*\.128)")
    local = count(loop, r"\b(LDL|STL)\b")
    print(
        f"{per_element:.1f} instructions an element, {count(loop, 'LDG.*128')} loads and "
        f"{count(loop, 'STG')} stores of 128 bits for {elements} elements"
    )
    return [
        text
        for bad, text in (
            (per_element > most_instructions, f"more than {most_instructions} instructions"),
            (narrow, f"{narrow} accesses narrower than 128 bits"),
            (not count(loop, r"LDG.*EF.*\.128"), "no load of dense operands"),
            (local, f"{local} accesses to local memory"),
            (sums_under_way(body) < LEAST_SUMS, "sums of chunks are loaded one by one"),
        )
        if bad
    ]


def main(path: str) -> int:
    sass = functions(run_cuobjdump("-sass", path))
    usage = functions(run_cuobjdump("-res-usage", path))
    failures = 0
    for (dtypes, (formula, types, lanes, plain, others)), (variant, number) in product(
        KERNELS.items(), VARIANTS.items()
    ):
        most_instructions = others if number else plain
        if most_instructions is None:
            continue
        matches = {
            key: body for key, body in sass.items() if mangled(formula, types, number) in key[1]
        }
        if not matches:
            print(f"{dtypes}, {variant}: no such kernel in {path}")
            failures += 1
        for (arch, name), body in matches.items():
            print(f"{dtypes}, mean, {variant}, {arch}: ", end="")
            problems = problems_of(body, variant == "rows", lanes, most_instructions)
            registers = re.search(r"REG:(\d+) STACK:(\d+)", usage[arch, name])
            print(f"  {registers[1]} registers, {registers[2]} bytes of stack")
            if int(registers[2]):
                problems.append("registers are spilled")
            for problem in problems:
                print(f"  FAILED: {problem}")
            failures += len(problems)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
