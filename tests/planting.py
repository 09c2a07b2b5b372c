"""Faults planted in the sources, one at a time, which the tests must find."""

from pathlib import Path


class TextIsGone(Exception):
    """What a fault replaces does not stand in the file, or not once."""


def plant(path: Path, text: str, replacement: str) -> None:
    source = path.read_text()
    if (times := source.count(text)) != 1:
        raise TextIsGone(f"{path.name} has {times} times: {text}")
    path.write_text(source.replace(text, replacement))
