"""Reads the machine code of the kernels in a build, without a GPU.

    python .ci/check_sass.py fused_bce/_C*.so

For each kernel of a table, mean with gradient, and each GPU architecture in the build: instructions
an element on the whole way through the kernel, from its first instruction through the loop to its
end; loads that are under way before the first of them is used; the distance between the stores of
one thread; the width of accesses; spilled registers. All kernels that spill are listed. Needs
cuobjdump and nvdisasm (from PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm, for which this looks
beside the installed packages). Exits with 1 if a check fails or a kernel is not found.
"""

import heapq
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# The place in enum Variant
PLAIN, EXTRAS, COLUMNS, ROWS = range(4)
BCE, FOCAL = "18BinaryCrossEntropy", "12SigmoidFocal"
QUALITY, VARIFOCAL, ASYMMETRIC = "12QualityFocal", "9Varifocal", "10Asymmetric"
FLOAT32, BFLOAT16 = "ff", "13__nv_bfloat16S2_"
FLOAT32_BOOL, BFLOAT16_BOOL = "fNS_7BooleanE", "13__nv_bfloat16NS_7BooleanE"
FLOAT32_INT64, BFLOAT16_INT64 = "fl", "13__nv_bfloat16l"
BFLOAT16_FLOAT32 = "13__nv_bfloat16f"

ELEMENTS_OF_THREAD = 32  # of a chunk of 8,192, by 256 threads
MOST_STACK = 16  # bytes, for what a chunk needs once; in the loop nothing is spilled
# Beyond that: for sm_120 ptxas has each operation of float64 followed by waits.
MORE_STACK = {"sm_120": 16}
MORE_INSTRUCTIONS = {"sm_100": 2, "sm_120": 3}  # an element
LEAST_SUMS = 8  # of other blocks, that the last block loads at once
LOCAL = r"\b(LDL|STL)\b"
# The stores of one thread are this many bytes apart, if those of a warp are side by side.
WARP_BYTES = 32 * 16


@dataclass(frozen=True)
class Expected:
    formula: str
    dtypes: str
    variant: int
    most_instructions: float  # an element
    least_loads: int  # under way together

    @property
    def lanes(self) -> int:
        """Elements of 16 bytes of logits"""
        return 4 if self.dtypes.startswith("f") else 8

    @property
    def name(self) -> str:
        """Mangled. Pass 1 is kSumAndGrad."""
        variant = f"LNS_4PassE1ELNS_7VariantE{self.variant}E"
        return f"loss_kernelINS_{self.formula}E{self.dtypes}{variant}"


# At the full bandwidth of a Hopper GPU there is time for 106 (float32), 80 (float32 and bool), 53
# (bfloat16) and 44 (bfloat16 and bool) instructions an element, 85 % of which can be issued.
EXPECTED = [
    Expected(BCE, FLOAT32, PLAIN, 33, 4),
    Expected(BCE, FLOAT32_BOOL, PLAIN, 33, 4),
    Expected(BCE, BFLOAT16, PLAIN, 33, 4),
    Expected(BCE, BFLOAT16_BOOL, PLAIN, 33, 4),
    Expected(BCE, BFLOAT16_FLOAT32, PLAIN, 33, 4),
    # With a gamma of 2
    Expected(FOCAL, FLOAT32, PLAIN, 52, 4),
    Expected(FOCAL, BFLOAT16, PLAIN, 54, 4),
    *(
        Expected(BCE, dtypes, variant, most, 2)
        for dtypes in (FLOAT32, FLOAT32_BOOL, BFLOAT16, BFLOAT16_BOOL)
        for variant, most in ((EXTRAS, 38), (COLUMNS, 46), (ROWS, 46))
    ),
    *(
        Expected(BCE, dtypes, variant, most, 1)
        for dtypes in (FLOAT32_INT64, BFLOAT16_INT64)
        for variant, most in ((EXTRAS, 38), (COLUMNS, 46), (ROWS, 46))
    ),
]
# Of other losses an element takes one of several branches, the same for all elements.
BRANCHES = [
    Expected(QUALITY, FLOAT32, PLAIN, 200, 2),
    Expected(VARIFOCAL, FLOAT32, PLAIN, 110, 2),
    Expected(ASYMMETRIC, FLOAT32, PLAIN, 340, 2),
]


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


class Code:
    """The instructions of a function, and which may come after each."""

    def __init__(self, body: str):
        pairs = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
        self.texts = [text.strip() for _, text in pairs]
        index = {int(address, 16): i for i, (address, _) in enumerate(pairs)}
        self.next = [self._next(i, text, index) for i, text in enumerate(self.texts)]

    def _next(self, i: int, text: str, index: dict[int, int]) -> list[int]:
        operation = without_predicate(text)
        after = [i + 1] if i + 1 < len(self.texts) else []
        # Under a predicate, before it or as an operand, or where threads have diverged
        is_conditional = operation != text or "," in operation
        if re.match("EXIT|RET", operation):
            return after if is_conditional else []
        target = re.match(r"(BRA|CALL.REL).*0x([0-9a-f]+)", operation)
        if not target:
            return after
        returns = is_conditional or target[1] != "BRA"
        return [index[int(target[2], 16)], *(after if returns else [])]

    def way(self, start: int, goals: Collection[int]) -> list[int]:
        """The shortest, none if there is none. A call may be a jump; a function that returns is for
        rare numbers."""
        done: dict[int, int] = {}
        waiting = [(1, start, -1)]
        while waiting:
            so_far, i, before = heapq.heappop(waiting)
            if i in done:
                continue
            done[i] = before
            if i in goals:
                way = [i]
                while way[-1] != start:
                    way.append(done[way[-1]])
                return way[::-1]
            for j in self.next[i]:
                is_return = "CALL" in self.texts[i] and j == i + 1
                heapq.heappush(waiting, (so_far + (1000 if is_return else 1), j, i))
        return []

    def hot_loop(self) -> tuple[int, int] | None:
        """First and last of the smallest loop with exponentials and whole-vector stores."""
        loops = [
            (first, last)
            for last, following in enumerate(self.next)
            for first in following
            if first < last
            and count(self.texts[first:last], "MUFU.EX2")
            and count(self.texts[first:last], r"STG.*\.128")
        ]
        return min(loops, key=lambda loop: loop[1] - loop[0], default=None)

    def end_of_block(self, first: int, last: int) -> list[int]:
        """The way from a loop to the end, of a block that is not the last: it takes a ticket, and
        ends behind a barrier."""
        exits = {i for i, text in enumerate(self.texts) if "EXIT" in text}
        barriers = {i for i, text in enumerate(self.texts) if "BAR.SYNC" in text}
        ticket = next(i for i, text in enumerate(self.texts) if "ATOM" in text)
        barrier = self.way(ticket, barriers)[-1]
        behind_loop = {
            j for i in range(first, last + 1) for j in self.next[i] if not first <= j <= last
        }
        ways = [way for j in behind_loop if (way := self.way(j, {barrier}))]
        return min(ways, key=len) + self.way(barrier, exits)[1:]


def without_predicate(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text)


def count(texts: list[str], pattern: str) -> int:
    return sum(re.search(pattern, text) is not None for text in texts)


def sums_under_way(texts: list[str]) -> int:
    """The most loads past the L1 cache, which are those of other blocks' sums, at once."""
    most = now = 0
    for text in texts:
        if re.search("LDG.*STRONG", text):
            now += 1
        elif "DADD" in text:
            now = 0
        most = max(most, now)
    return most


def loads_under_way(loop: list[str]) -> int:
    """Of dense operands, which pass by once ("evict first"), before one of them is used."""
    loaded: set[int] = set()
    loads = 0
    for text in map(without_predicate, loop):
        into = re.match(r"LDG\S*\.EF(\.128|\.64)?\S*\s+R(\d+)", text)
        if into:
            words = {".128": 4, ".64": 2}.get(into[1], 1)
            loaded |= {int(into[2]) + word for word in range(words)}
            loads += 1
            continue
        used = text if text.startswith("ST") else text.partition(",")[2]
        if loaded & {int(register) for register in re.findall(r"\bR(\d+)\b", used)}:
            break
    return loads


def stores_apart(loop: list[str]) -> int:
    """The least distance in bytes between two stores of one thread that share a base. A register
    that comes with one offset twice has been given another address."""
    offsets: dict[str, set[int]] = {}
    for text in loop:
        store = re.search(r"STG.*\[(R\d+)\.64(?:\+(-?0x[0-9a-f]+))?\]", text)
        if store:
            offsets.setdefault(store[1], set()).add(int(store[2] or "0", 16))
    apart = [b - a for of_base in offsets.values() for a, b in pairwise(sorted(of_base))]
    return min(apart, default=sys.maxsize)


def problems_of(body: str, expected: Expected, arch: str) -> list[str]:
    """Prints what it counts, and returns what is wrong."""
    most_instructions = expected.most_instructions + MORE_INSTRUCTIONS.get(arch, 0)
    code = Code(body)
    ends = code.hot_loop()
    if ends is None:
        return ["no loop with 128-bit stores"]
    first, last = ends
    whole = code.texts[first : last + 1]
    # Of several branches the shortest would be one that other numbers take.
    loop = whole if expected in BRANCHES else [code.texts[i] for i in code.way(first, {last})]
    elements = count(whole, "STG") * expected.lanes
    before = [code.texts[i] for i in code.way(0, {first})[:-1]]
    outside = len(before) + len(code.end_of_block(first, last))
    # Some turns may be laid out before the loop.
    in_loop = 1 - count(before, "STG") * expected.lanes / ELEMENTS_OF_THREAD
    per_element = in_loop * len(loop) / elements + outside / ELEMENTS_OF_THREAD
    loads = loads_under_way(loop)
    apart = stores_apart(whole)
    narrow = count(whole, r"STG(?!.*\.128)")
    local = count(whole, LOCAL)
    distance = "bases of their own" if apart == sys.maxsize else apart
    print(
        f"{per_element:.1f} instructions an element, {len(loop) / elements:.1f} in the loop; "
        f"{loads} loads under way; {distance} between stores"
    )
    return [
        text
        for bad, text in (
            (per_element > most_instructions, "more instructions than expected"),
            (loads < expected.least_loads, "fewer loads under way than expected"),
            (apart < WARP_BYTES, "stores of neighbouring threads are not side by side"),
            (narrow, f"{narrow} stores narrower than 128 bits"),
            (local, "registers are spilled in the loop"),
            (sums_under_way(code.texts) < LEAST_SUMS, "sums of chunks are loaded one by one"),
        )
        if bad
    ]


def spills(sass: dict[tuple[str, str], str], usage: dict[tuple[str, str], str]) -> list[str]:
    """All kernels whose registers do not suffice."""
    found = []
    for key, body in sass.items():
        stack = re.search(r"STACK:(\d+)", usage.get(key, "STACK:0"))
        if int(stack[1]) or re.search(LOCAL, body):
            found.append(f"{key[0]}, {key[1]}: {stack[1]} bytes of stack")
    return found


def main(path: str) -> int:
    sass = functions(run_cuobjdump("-sass", path))
    usage = functions(run_cuobjdump("-res-usage", path))
    failures = 0
    for expected in [*EXPECTED, *BRANCHES]:
        matches = {key: body for key, body in sass.items() if expected.name in key[1]}
        if not matches:
            print(f"{expected}: no such kernel in {path}")
            failures += 1
        for (arch, name), body in matches.items():
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage[arch, name]).groups()
            print(f"{expected.formula.lstrip('0123456789')}, {expected.dtypes}, ", end="")
            print(f"variant {expected.variant}, {arch}, {registers} registers: ", end="")
            problems = problems_of(body, expected, arch)
            if int(stack) > MOST_STACK + MORE_STACK.get(arch, 0):
                problems.append(f"{stack} bytes of stack")
            for problem in problems:
                print(f"  FAILED: {problem}")
            failures += len(problems)
    spilled = spills(sass, usage)
    print(f"{len(sass)} kernels, {len(spilled)} of which spill registers", *spilled, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
