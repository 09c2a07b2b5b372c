"""The tables of the pages are those of the results."""

import pytest

pytest.importorskip("rich", reason="the benchmarks print tables with it")

import documented
from documented import DocTable
from harness import machine


def test_tables_are_made_of_the_results():
    assert documented.list_differences() == []


def test_a_changed_number_is_found(monkeypatch, tmp_path):
    """And written anew."""
    table = documented.TABLES[0]
    path = tmp_path / table.page
    text = (documented.ROOT / table.page).read_text(encoding="utf-8")
    line = table.make_lines()[0]
    path.write_text(text.replace(line, line.replace(" us", "9 us")), encoding="utf-8")
    monkeypatch.setattr(documented, "ROOT", tmp_path)
    monkeypatch.setattr(documented, "TABLES", [table])
    assert len(documented.list_differences(write=True)) == 1
    assert path.read_text(encoding="utf-8") == text


def test_a_table_that_is_not_there_is_an_error():
    table = documented.TABLES[0]
    missing = DocTable(table.page, "| no such heading |", table.results, table.lines)
    with pytest.raises(LookupError, match="0 tables"):
        missing.replace_in("text")


def test_kernels_are_named_by_their_code(monkeypatch, tmp_path):
    """Not by its comments."""
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    source = folder / "a.h"
    monkeypatch.setattr(
        machine, "__file__", str(tmp_path / "benchmarks" / "harness" / "machine.py")
    )
    (tmp_path / "csrc" / "problem.h").touch()
    source.write_text("int a = 1;  // one\n")
    name = machine.hash_kernels("cpu")
    source.write_text("// another\nint a =  1;\n")
    assert machine.hash_kernels("cpu") == name
    source.write_text("int a = 2;  // one\n")
    assert machine.hash_kernels("cpu") != name
