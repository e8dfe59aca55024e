"""Charts of populations: binned histograms, the slide's figure, geometry for the HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from befm_jax.evals.results import Distribution

PEOPLE_COLOUR = "#b4c5d9"
MODEL_COLOUR = "#c2410c"
BASE_COLOUR = "#475569"
_MOST_BINS = 31
_MOST_NAMES = 8
_LONGEST_NAME = 14


@dataclass(frozen=True, eq=False)
class Bins:
    """`n` bins of equal width over `A` values: `edges` `[n+1]`, `shares` `[n, A]`.

    `shares` are those of each value in each bin: where bins are wider than the gap between values,
    a value is as wide as the gap, and one that is on an edge belongs to both bins in part.  So all
    bins hold equally much of the scale, also the first and the last, and evenly spread answers are
    a flat line.
    """

    edges: NDArray[np.float64]
    shares: NDArray[np.float64]

    @classmethod
    def of(cls, values: ArrayLike) -> Bins:
        """A bin a value, or no more than 31, over the `[A]` ascending values.

        Their width is then about a power of five times the smallest gap, which leaves multiples of
        five, frequent answers, inside the bins of 0 to 100.
        """
        numbers = np.asarray(values, np.float64)
        gap = width = float(np.diff(numbers).min())
        low, high = numbers[0] - gap / 2.0, numbers[-1] + gap / 2.0
        while (number := math.floor((numbers[-1] - numbers[0]) / width + 0.5) + 1) > _MOST_BINS:
            width *= 5.0
        if width == gap:
            index = np.floor((numbers - numbers[0]) / gap + 0.5)
            own = (np.arange(number)[:, None] == index).astype(np.float64)
            return cls(low + gap * np.arange(number + 1), own)
        edges = np.linspace(low, high, number + 1)
        ends = np.minimum(edges[1:, None], numbers + gap / 2.0)
        begins = np.maximum(edges[:-1, None], numbers - gap / 2.0)
        return cls(edges, np.maximum(ends - begins, 0.0) / gap)

    def percent(self, weights: ArrayLike) -> NDArray[np.float64]:
        """`[n]` per cent of the `[A]` weights in each bin."""
        array = np.asarray(weights, np.float64)
        return self.shares @ array * (100.0 / array.sum())

    def label(self, position: int, answers: Sequence[str]) -> str:
        """The answers in a bin, as text: those of which it holds most."""
        inside = [
            name for name, share in zip(answers, self.shares[position], strict=True) if share >= 0.5
        ]
        if not inside:
            return "none"
        return inside[0] if len(inside) == 1 else f"about {inside[0]}–{inside[-1]}"


def places(distribution: Distribution) -> list[float]:
    """The x coordinates of answers: their values, or their indices."""
    values = distribution.values
    return list(map(float, range(len(distribution.answers)) if values is None else values))


def ticks(distribution: Distribution) -> list[tuple[float, str]]:
    """Coordinates and labels of ticks: every answer where they are few, else round numbers."""
    at = places(distribution)
    if len(at) <= _MOST_NAMES or distribution.values is None:
        step = math.ceil(len(at) / _MOST_BINS)
        shown = [
            name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
            for name in distribution.answers
        ]
        return list(zip(at, shown, strict=True))[::step]
    return [(tick, f"{tick:g}") for tick in nice_ticks(at[0], at[-1], 5)]


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, in at most `most` steps."""
    span, power = high - low, 10.0 ** math.floor(math.log10(high - low) - 1)
    step = next(
        factor * power * scale
        for scale in (1, 10, 100)
        for factor in (1, 2.5, 5)
        if span / (factor * power * scale) <= most and factor * power * scale >= min(1.0, span)
    )
    return [low + step * count for count in range(int(span / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Panel:
    """One chart of the page, in the coordinates of its SVG (`width` x `height`)."""

    width: int
    height: int
    baseline: float
    left: float
    bars: list[dict[str, Any]]
    lines: dict[str, str]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def panel(distribution: Distribution, outlines: Mapping[str, Sequence[float]]) -> Panel:
    """The geometry of a chart: people as bars, each of `outlines` (name to shares) over them."""
    width, height, left, top, baseline = 460, 204, 42.0, 10.0, 164.0
    bins = Bins.of(places(distribution))
    people = bins.percent(distribution.people)
    heights = {name: bins.percent(shares) for name, shares in outlines.items()}
    highest = max(float(array.max()) for array in (people, *heights.values()))
    y_ticks = nice_ticks(0.0, highest * 1.08, 4)
    x_scale = (width - left - 8.0) / (bins.edges[-1] - bins.edges[0])
    y_scale = (baseline - top) / (highest * 1.08)
    x = [left + (edge - bins.edges[0]) * x_scale for edge in bins.edges]
    bars = []
    for position, share in enumerate(people):
        shares = [f"people {share:.1f} %"]
        shares += [f"{name} {own[position]:.1f} %" for name, own in heights.items()]
        label = f"{bins.label(position, distribution.answers)} {distribution.unit}".rstrip()
        bars.append(
            {
                "x": round(x[position] + 0.6, 2),
                "width": round(x[position + 1] - x[position] - 1.2, 2),
                "y": round(baseline - share * y_scale, 2),
                "height": round(share * y_scale, 2),
                "title": f"{label}: {', '.join(shares)}",
            }
        )
    return Panel(
        width=width,
        height=height,
        baseline=baseline,
        left=left,
        bars=bars,
        lines={
            name: _outline(x, [baseline - share * y_scale for share in own], baseline)
            for name, own in heights.items()
        },
        x_ticks=[
            (round(left + (tick - bins.edges[0]) * x_scale, 2), text)
            for tick, text in ticks(distribution)
        ],
        y_ticks=[(round(baseline - tick * y_scale, 2), f"{tick:g} %") for tick in y_ticks],
    )


def _outline(x: list[float], y: list[float], baseline: float) -> str:
    """An SVG path along the tops of the bins."""
    path = [f"M{x[0]:.2f} {baseline:.2f}"]
    path += [f"V{height:.2f}H{right:.2f}" for height, right in zip(y, x[1:], strict=True)]
    return "".join(path) + f"V{baseline:.2f}"


@dataclass(frozen=True)
class Cell:
    """One panel of the slide: people and the main respondent, another's shares, a caption.

    The caption has a line or two.
    """

    distribution: Distribution
    base: Sequence[float] | None
    caption: str


def slide(cells: Sequence[Cell], main: str, base: str, lines: Sequence[str]) -> Figure:
    """A slide of 1600 x 800 pixels: one panel per distribution, people and the main respondent.

    Args:
        cells: the panels.
        main: the label of the main respondent.
        base: the label of the other one; "" for none.
        lines: text under the legend.
    """
    columns = math.ceil((len(cells) + 1) / 2)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(16, 8), dpi=100, layout=layout)
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    for own, cell in zip(axes, cells, strict=False):
        _draw(own, cell)
    for own in axes[len(cells) :]:
        own.set_axis_off()
    _draw_legend(axes[len(cells)], main, base, lines)
    return figure


def _draw(axes: Axes, cell: Cell) -> None:
    distribution = cell.distribution
    bins = Bins.of(places(distribution))
    axes.bar(
        (bins.edges[:-1] + bins.edges[1:]) / 2,
        bins.percent(distribution.people),
        width=np.diff(bins.edges) * 0.92,
        color=PEOPLE_COLOUR,
    )
    if cell.base is not None:
        shares = bins.percent(cell.base)
        axes.stairs(shares, bins.edges, color=BASE_COLOUR, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.stairs(bins.percent(distribution.model), bins.edges, color=MODEL_COLOUR, linewidth=2.4)
    # Titles and units are user text: no TeX in them.
    axes.set_title(
        distribution.title, loc="left", fontsize=15, weight="bold", parse_math=False,
        pad=26 + 16 * cell.caption.count("\n"),
    )  # fmt: skip
    axes.text(
        0.0, 1.03, cell.caption, transform=axes.transAxes, fontsize=12, color="#334155",
        parse_math=False, in_layout=False,  # a long one would push the panels into slivers
    )  # fmt: skip
    axes.set_xlabel(distribution.unit, fontsize=12, parse_math=False)
    marks = ticks(distribution)
    axes.set_xticks([at for at, _ in marks])
    axes.set_xticklabels([text for _, text in marks], parse_math=False)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(labelsize=11, color="#94a3b8", labelcolor="#334155")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.01)


def _draw_legend(axes: Axes, main: str, base: str, lines: Sequence[str]) -> None:
    handles: list[Patch | Line2D] = [
        Patch(color=PEOPLE_COLOUR, label="people"),
        Line2D([], [], color=MODEL_COLOUR, linewidth=2.4, label=main),
    ]
    if base:
        dashed = (0, (4, 2))
        handles.append(
            Line2D([], [], color=BASE_COLOUR, linewidth=1.3, linestyle=dashed, label=base)
        )
    legend = axes.legend(handles=handles, loc="upper left", fontsize=13, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.text(
        0.02,
        0.02,
        "\n".join([*lines, "height: per cent of answers in a bar"]),
        transform=axes.transAxes,
        fontsize=11,
        linespacing=1.4,
        color="#0f172a",
        va="bottom",
        parse_math=False,
    )
