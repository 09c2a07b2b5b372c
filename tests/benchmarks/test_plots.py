"""What plot.py draws."""

from scripts import make_row

from plots.bars import plot_bars
from plots.head import plot_chunk_bytes, plot_labels
from plots.pairwise import plot_batch


def test_bars():
    """Their lengths are the ratios, whatever the order of the rows."""
    rows = [
        make_row(contender=name, workload=workload, shape="32x32", median_seconds=s, peak_bytes=p)
        for workload, eager in (("a", 10e-3), ("b", 20e-3))
        for name, s, p in (
            ("stream", 1e-3, None),
            ("fused", 2e-3, 4096),
            ("compile", 4e-3, 4096),
            ("eager", eager, 2 * 4096),
        )
    ]
    speedups, peaks = (
        {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
        for axes in plot_bars(rows).axes
    )
    assert speedups == {"compile": [2.5, 5.0], "fused": [5.0, 10.0]}
    assert peaks == {"eager": [2, 2], "compile": [1, 1], "fused": [1, 1]}


def test_ladders_of_head():
    """Memory over labels; time over the bytes of a block, between lines for the others."""
    shapes = {2**20: "256x4096", 2**21: "256x8192"}
    rows = [
        make_row(contender=name, workload="labels", numel=numel, shape=shape, peak_bytes=peak)
        for numel, shape in shapes.items()
        for name, peak in (("gemms", None), ("eager", 8 * numel), ("head", 2**20))
    ]
    (axes,) = plot_labels(rows).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "linear layer, eager": [[4096, 8], [8192, 16]],
        "head": [[4096, 1], [8192, 1]],
        "the logits": [[4096, 4], [8192, 8]],
    }

    seconds = {"gemms": 1e-3, "fused": 3e-3, "head": 2e-3, "head 2^16": 5e-3, "head 2^17": 4e-3}
    rows = [
        make_row(contender=name, workload="chunk_bytes", shape="16x64", median_seconds=each)
        for name, each in seconds.items()
    ]
    (axes,) = plot_chunk_bytes(rows).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines.pop("head")) == [5, 4]
    assert list(axes.lines[0].get_xdata()) == [2**16, 2**17]
    heights = {label: set(heights) for label, heights in lines.items()}
    assert heights == {
        "gemms (the limit)": {1},
        "linear layer, fused": {3},
        "head by default": {2},
    }


def test_ladder_of_pairwise():
    """Memory and time over the batch; the limit has no peak."""
    rows = [
        make_row(
            contender=name,
            workload="batch",
            numel=batch**2,
            shape=f"{batch}x{batch}",
            median_seconds=seconds * batch,
            peak_bytes=peak and peak * batch**2,
        )
        for batch in (1024, 2048)
        for name, seconds, peak in (("gemms", 1, None), ("eager", 3, 16), ("fused", 2, 1))
    ]
    peaks, times = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in plot_batch(rows).axes
    )
    assert peaks == {
        "eager": [[1024, 16], [2048, 64]],
        "fused": [[1024, 1], [2048, 4]],
        "the logits": [[1024, 4], [2048, 16]],
    }
    assert times == {
        "eager": [[1024, 3072], [2048, 6144]],
        "fused": [[1024, 2048], [2048, 4096]],
        "gemms (the limit)": [[1024, 1024], [2048, 2048]],
    }
