"""The plot of ``trackers.py``, and the numbers in it; needs matplotlib (``pip install matplotlib``)."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some measurements, and the outermost of them."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some measurements."""
        return cls(median=statistics.median(values), smallest=min(values), largest=max(values))


def draw(
    path: Path,
    columns: Sequence[tuple[str, str, str, float]],
    costs: Mapping[str, Mapping[str, Spread]],
    kept: Mapping[str, Mapping[str, Spread]],
    *,
    title: str,
) -> None:
    """Write the plot: a panel for each operator, with a logarithmic scale, and one for the workloads.

    Args:
        path: the file to write; its ending is its format.
        columns: of each operator its name in the results, heading, unit, and how many of that are a second.
        costs: by tracker and operator, in seconds.
        kept: by workload and tracker, as a share.
        title: of the panel for the workloads.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    trackers = list(costs)
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic([[name for name, *_ in columns], ["kept"] * len(columns)])
    for name, heading, unit, factor in columns:
        _bars(panels[name], range(len(trackers)), [costs[tracker][name] for tracker in trackers], factor, 0.7)
        panels[name].set(title=heading, ylabel=unit, yscale="log")
        panels[name].set_xticks(range(len(trackers)), trackers, rotation=60, ha="right")
        panels[name].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        panels[name].yaxis.set_major_formatter("{x:g}")
    width = 0.8 / len(trackers)
    for number, tracker in enumerate(trackers):
        at = [place + (number + 0.5) * width - 0.4 for place in range(len(kept))]
        _bars(panels["kept"], at, [row[tracker] for row in kept.values()], 1, width, label=tracker, color=f"C{number}")
    panels["kept"].set(title=title, ylabel="share", ylim=(0, 1.5))
    panels["kept"].set_xticks(range(len(kept)), kept)
    panels["kept"].axhline(1, color="gray", linewidth=0.8)
    panels["kept"].legend(ncols=len(trackers), loc="lower center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path)


def _bars(panel, at: Sequence[float], spreads: Sequence[Spread], factor: float, width: float, **more: object) -> None:  # noqa: ANN001
    medians = [spread.median * factor for spread in spreads]
    below = [(spread.median - spread.smallest) * factor for spread in spreads]
    above = [(spread.largest - spread.median) * factor for spread in spreads]
    panel.bar(at, medians, width, yerr=(below, above), capsize=2, **more)


def plot_path(text: str) -> Path:
    """Check before anything is measured that the plot can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise argparse.ArgumentTypeError("matplotlib is not installed: pip install matplotlib") from None
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file name that ends in .png, .svg or .pdf, in a directory")
    return path
