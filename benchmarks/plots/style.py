"""What the figures have in common: their width, the look of a contender, and the caption."""

import textwrap
from collections.abc import Sequence

from harness.rows import Facts, Row

STYLES = {
    "eager": {"color": "tab:orange", "marker": "s"},
    "compile": {"color": "tab:green", "marker": "^"},
    "fused": {"color": "tab:blue", "marker": "o"},
    "fused compile": {"color": "tab:cyan", "marker": "v"},
    "fused plain": {"color": "tab:cyan", "marker": "<"},
    "fused recompute": {"color": "tab:cyan", "marker": ">"},
    "no loss": {"color": "darkgray", "marker": "."},
    "eager graph": {"color": "tab:orange", "marker": "s", "linestyle": ":"},
    "fused graph": {"color": "tab:blue", "marker": "o", "linestyle": ":"},
    "sigmoid + BCELoss": {"color": "tab:red", "marker": "x"},
    "softplus - x*t": {"color": "tab:purple", "marker": "+"},
    "flag_gems": {"color": "tab:brown", "marker": "d"},
    "siglip_kernel": {"color": "tab:brown", "marker": "d"},
    "chunked": {"color": "tab:red", "marker": "x"},
    "head": {"color": "tab:purple", "marker": "D"},
    "gemms": {"color": "gray", "linestyle": "--", "label": "gemms (the limit)"},
    "stream": {"color": "black", "linestyle": "--", "label": "stream (the limit)"},
}


def caption(rows: Sequence[Facts]) -> str:
    """Where the numbers come from, each fact once."""
    facts = [machine_text(row) for row in rows]
    if any(isinstance(row, Row) and row.is_disturbed for row in rows):
        facts.append("Other work disturbed some of these times: see other_load in the CSV file.")
    unique = dict.fromkeys([*facts, *(row.command for row in rows)])
    return "\n".join(textwrap.fill(text, 105) for text in unique)


def machine_text(row: Facts) -> str:
    cuda = f", CUDA {row.cuda}" if row.cuda else ""
    instructions = f", {row.instruction_set}" if row.device == "cpu" else ""
    return (
        f"{row.device_name}{instructions}, {row.threads} threads; torch {row.torch}{cuda}; "
        f"fused_bce {row.fused_bce}; {row.date[:10]}"
    )


CAPTION_STYLE = {"fontsize": 7, "color": "dimgray", "family": "monospace"}
# In inches, that of a page of the site: there texts have their sizes in points.
WIDTH = 7.6
DPI = 200
SIZES = {"font.size": 10, "axes.titlesize": 10, "figure.titlesize": 10, "legend.fontsize": 9}
