"""Fails if an extension would crash on an x86-64 processor that has no more than the baseline.

    python .ci/check_baseline.py fused_bce/_C*.so

What needs AVX may lie in fused_bce::avx2 and fused_bce::avx512 only, which isa.cpp enters where the
processor has them. The danger is an inline function of the standard library or of torch that was
compiled there for more than SSE2: the linker may keep that copy for everyone. Needs objdump.
"""

import re
import subprocess
import sys
from collections import Counter

# VEX and EVEX encodings all begin with v, but for those of masks; popcnt comes with SSE4.2.
BEYOND_BASELINE = re.compile(r"v[a-z]\w+|k(mov|or|ortest|and|xor|not|unpck)\w*|popcnt")
AVX512_REGISTER = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")
SYMBOL = re.compile(r"[0-9a-f]+ <(?P<name>.*)>:$")
INSTRUCTION = re.compile(r" +[0-9a-f]+:\t(?P<name>\S+)(?P<operands>.*)")


def disassemble(library: str) -> str:
    command = ["objdump", "--disassemble", "--demangle", "--wide", "--no-show-raw-insn", library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(listing: str) -> tuple[Counter, dict[str, str]]:
    """Instructions beyond the baseline by namespace; of those elsewhere the first, by function."""
    dispatched: Counter = Counter()
    faults: dict[str, str] = {}
    function = ""
    for line in listing.splitlines():
        if symbol := SYMBOL.match(line):
            function = symbol["name"]
        instruction = INSTRUCTION.match(line)
        if not instruction or not BEYOND_BASELINE.fullmatch(instruction["name"]):
            continue
        namespace = re.search("fused_bce::(avx2|avx512)::", function)
        is_avx512 = AVX512_REGISTER.search(instruction["operands"])
        if namespace and not (is_avx512 and namespace[1] == "avx2"):
            dispatched[namespace[1]] += 1
        else:
            faults.setdefault(function, " ".join(line.split()[1:]))
    return dispatched, faults


def main() -> None:
    (library,) = sys.argv[1:]
    dispatched, faults = read(disassemble(library))
    for function, instruction in faults.items():
        print(f"{instruction!r} in {function[:200]}")
    if faults:
        sys.exit(f"{len(faults)} functions of {library} need more than the baseline of x86-64")
    if len(dispatched) < 2:
        sys.exit(f"{library} has no kernels for AVX2 and AVX-512: stripped, or built without them?")
    print(f"{library}: AVX only where it is dispatched to, {dict(dispatched)} instructions")


if __name__ == "__main__":
    main()
