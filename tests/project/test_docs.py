"""Every example runs, and what the pages point at exists."""

import builtins
import doctest
import functools
import gc
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fused_bce

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    language: str
    line: int  # of the fence
    code: str


FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = ("python", "pycon")
# What a program prints; the directives of the reference.
NOT_RUNNABLE = ("text", "{eval-rst}")
# A block without a language is one of these, too.
COMMAND = re.compile(r"(make|bash|pip|python|torchrun) ")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], text.count("\n", 0, match.start()) + 1, match[2])
        for match in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


class Strict(doctest.DocTestRunner):
    """Fails like a test, not with a line in a report."""

    def __init__(self):
        super().__init__(optionflags=doctest.ELLIPSIS, verbose=False)

    def run_in(self, names: dict, text: str, source: str, line: int) -> int:
        """The number of examples in the text."""
        test = doctest.DocTestParser().get_doctest(text, names, source, source, line)
        test.globs = names  # not a copy: later blocks of a page see what these define
        report = []
        result = self.run(test, out=report.append, clear_globs=False)
        assert result.failed == 0, "".join(report)
        return result.attempted


def documented() -> Iterator:
    """Whatever has a docstring in the package's modules."""
    for module_info in pkgutil.iter_modules(fused_bce.__path__, "fused_bce."):
        if module_info.name.endswith(("._C", ".__main__")):
            continue
        yield importlib.import_module(module_info.name)
    yield fused_bce


def docstring_examples() -> list:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [
        pytest.param(test, id=test.name)
        for module in documented()
        for test in finder.find(module)
        if test.examples
    ]


# torch.export uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("example", docstring_examples())
def test_docstring_examples(example):
    """With nothing but what the example itself imports, as for whoever copies it."""
    names = {"__name__": "__main__", "__builtins__": builtins}
    Strict().run_in(names, example.docstring, example.name, example.lineno or 0)


def public_names() -> dict[str, object]:
    names = {f"fused_bce.{n}": getattr(fused_bce, n) for n in fused_bce.__all__}
    del names["fused_bce.functional"]
    functional = fused_bce.functional
    return names | {f"fused_bce.functional.{n}": getattr(functional, n) for n in functional.__all__}


def test_every_public_name_has_an_example():
    without = [
        name for name, thing in public_names().items() if ">>> " not in (thing.__doc__ or "")
    ]
    assert without == []


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)) == public_names().keys()


@pytest.fixture
def _one_process_of_torchrun(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any that is free
    }.items():
        monkeypatch.setenv(name, value)
    yield
    # DistributedDataParallel lies in a reference cycle; threads of its group that outlive Python
    # would end the process with an error.
    gc.collect()


@pytest.fixture
def _compile_without_a_compiler(monkeypatch):
    # Inductor takes ten seconds; test_compile.py is about it.
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)


# Packages that are not always there. Their own warnings are no concern of the pages.
NEEDED_BY = {"lightning.md": ("lightning",), "transformers.md": ("transformers", "accelerate")}


@pytest.mark.usefixtures("_one_process_of_torchrun", "_compile_without_a_compiler")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=pytest.mark.filterwarnings("ignore" if page.name in NEEDED_BY else "error"),
        )
        for page in PAGES
        if any(block.language in RUNNABLE for block in blocks(page))
    ],
)
def test_blocks_of_a_page(page, tmp_path, monkeypatch):
    """From the top of the page to its end, in one namespace."""
    for library in NEEDED_BY.get(page.name, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__", "__builtins__": builtins}
    try:
        for block in blocks(page):
            if block.language == "python":
                # Empty lines before it, so that a traceback names the line of the page.
                exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            elif block.language == "pycon":
                Strict().run_in(names, block.code, str(page), block.line)
    finally:
        fused_bce.unpatch()
        # What was compiled tidies up in the namespace, so it goes first.
        torch._dynamo.reset()


@by_page
def test_blocks_say_what_they_are(page):
    """Python under another name would be neither run nor seen to be no program."""
    for block in blocks(page):
        if block.language in ("", "sh"):
            assert all(COMMAND.match(line) for line in block.code.splitlines())
        else:
            assert block.language in (*RUNNABLE, *NOT_RUNNABLE)
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page))


def anchors(page: Path) -> set[str]:
    """Those of the headings, as repositories' sites and docs/conf.py make them."""
    headings = re.findall(r"^#{1,6} +(.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


LINK = re.compile(r"\]\(([^)\s]+)\)")


@by_page
def test_links_resolve(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{target}: no such file"
        assert linked.is_relative_to(ROOT), f"{target}: outside of the repository"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme_or_a_page():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(prose(page))
        if not target.startswith("#")
    }
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked


def defined_tests() -> dict[str, set[str]]:
    """The functions in each file of tests, by its name."""
    defined = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.name not in defined, f"two files are called {path.name}"
        text = path.read_text(encoding="utf-8")
        defined[path.name] = set(re.findall(r"^ *def (test_\w+)", text, re.MULTILINE))
    return defined


@by_page
def test_named_tests_exist(page):
    """A name without a file is in the file named before it in the line."""
    defined = defined_tests()
    for line in prose(page).splitlines():
        file = None
        for name, suffix in re.findall(r"\b(test_\w+)(\.py)?", line):
            if suffix:
                file = name + suffix
                assert file in defined, f"there is no {file}"
            elif not re.search(rf"-k {name}\b", line):
                assert file, f"which file is {name} in?"
                assert name in defined[file], f"there is no {file}::{name}"
            else:
                assert f"{name}.py" in defined


@by_page
def test_named_commands_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    # `make X` in code, or at the beginning of a line of it.
    named = re.findall(r"(?:^|`)make ((?:[a-z]+ ?)+)", text, re.MULTILINE)
    assert {target for words in named for target in words.split()} <= targets
    paths = re.findall(r"[`\s]((?:benchmarks|examples|csrc|fused_bce|docs|\.ci)/[\w./-]+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
