"""Faults planted in the sources, one at a time, which the tests must find."""

from pathlib import Path


def stands_once(path: Path, text: str) -> bool:
    return path.exists() and path.read_text().count(text) == 1


def plant(path: Path, text: str, replacement: str) -> None:
    assert stands_once(path, text), f"{path.name} does not have this once: {text}"
    path.write_text(path.read_text().replace(text, replacement))
