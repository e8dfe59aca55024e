"""Pictures of populations: binned histograms, the figure for a slide, geometry for the page."""

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

PEOPLE_COLOUR = "#b4c5d9"
MODEL_COLOUR = "#c2410c"
BASE_COLOUR = "#475569"
_MOST_BINS = 31


@dataclass(frozen=True, eq=False)
class Bins:
    """`n` bins of equal width, each centred on a round value, over a game's `A` values.

    The width is a power of five times the smallest gap: odd, so that no value falls on an edge,
    and such that 0, 50 and 100, where people crowd, stand in the middle of a bin.
    """

    edges: NDArray[np.float64]
    index: NDArray[np.int64]

    @classmethod
    def of(cls, values: ArrayLike) -> Bins:
        """The finest bins, no more than 31, over the `[A]` ascending values."""
        numbers = np.asarray(values, np.float64)
        width = float(np.diff(numbers).min())
        while math.floor((numbers[-1] - numbers[0]) / width + 0.5) + 1 > _MOST_BINS:
            width *= 5.0
        index = np.floor((numbers - numbers[0]) / width + 0.5).astype(np.int64)
        edges = numbers[0] + (np.arange(index[-1] + 2) - 0.5) * width
        return cls(edges, index)

    def percent(self, weights: ArrayLike) -> NDArray[np.float64]:
        """`[n]` per cent of the weights in each bin."""
        array = np.asarray(weights, np.float64)
        return np.bincount(self.index, weights=array, minlength=len(self.edges) - 1) * (
            100.0 / array.sum()
        )

    def label(self, position: int, values: Sequence[int]) -> str:
        """The values in a bin, as text."""
        inside = [
            value for value, index in zip(values, self.index, strict=True) if index == position
        ]
        if not inside:
            return "none"
        return f"{inside[0]}" if len(inside) == 1 else f"{inside[0]}–{inside[-1]}"


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` steps apart."""
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
    """One game's chart on the page, in the coordinates of its SVG (`width` x `height`)."""

    width: int
    height: int
    baseline: float
    left: float
    bars: list[dict[str, Any]]
    lines: dict[str, str]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def panel(
    distribution: Mapping[str, Any], others: Mapping[str, Sequence[float]], unit: str
) -> Panel:
    """The geometry of a chart: people as bars, each of `others` (name to shares) as an outline."""
    width, height, left, top, baseline = 460, 204, 42.0, 10.0, 164.0
    values = distribution["values"]
    bins = Bins.of(values)
    people = bins.percent(distribution["people"])
    outlines = {name: bins.percent(shares) for name, shares in others.items()}
    highest = max(float(heights.max()) for heights in (people, *outlines.values()))
    y_ticks = nice_ticks(0.0, highest * 1.08, 4)
    x_scale = (width - left - 8.0) / (bins.edges[-1] - bins.edges[0])
    y_scale = (baseline - top) / (highest * 1.08)
    x = [left + (edge - bins.edges[0]) * x_scale for edge in bins.edges]
    bars = []
    for position, share in enumerate(people):
        shares = [f"people {share:.1f} %"]
        shares += [f"{name} {heights[position]:.1f} %" for name, heights in outlines.items()]
        bars.append(
            {
                "x": round(x[position] + 0.6, 2),
                "width": round(x[position + 1] - x[position] - 1.2, 2),
                "y": round(baseline - share * y_scale, 2),
                "height": round(share * y_scale, 2),
                "title": f"{bins.label(position, values)} {unit}: {', '.join(shares)}",
            }
        )
    ticks = nice_ticks(float(values[0]), float(values[-1]), 5)
    return Panel(
        width=width,
        height=height,
        baseline=baseline,
        left=left,
        bars=bars,
        lines={
            name: _outline(x, [baseline - share * y_scale for share in heights], baseline)
            for name, heights in outlines.items()
        },
        x_ticks=[
            (round(left + (tick - bins.edges[0]) * x_scale, 2), f"{tick:g}") for tick in ticks
        ],
        y_ticks=[(round(baseline - tick * y_scale, 2), f"{tick:g} %") for tick in y_ticks],
    )


def _outline(x: list[float], y: list[float], baseline: float) -> str:
    """An SVG path along the tops of the bins."""
    path = [f"M{x[0]:.2f} {baseline:.2f}"]
    path += [f"V{height:.2f}H{right:.2f}" for height, right in zip(y, x[1:], strict=True)]
    return "".join(path) + f"V{baseline:.2f}"


def games_figure(
    game_behavior: Mapping[str, Any], base: Mapping[str, Any] | None, label: str
) -> Figure:
    """A slide of 1600 x 800 pixels: a panel a game, people against the model and its base.

    Args:
        game_behavior: the model's `tasks.game_behavior`, as in results.json.
        base: the same of the model before tuning, or None.
        label: what to call the model, e.g. "tuned model".
    """
    groups = game_behavior["groups"]
    columns = math.ceil((len(groups) + 1) / 2)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(16, 8), dpi=100, layout=layout)
    cells = list(figure.subplots(2, columns, squeeze=False).flat)
    for axes, (name, group) in zip(cells, groups.items(), strict=False):
        before = base["groups"].get(name) if base else None
        _draw_game(axes, group, before)
    for axes in cells[len(groups) :]:
        axes.set_axis_off()
    _draw_legend(cells[len(groups)], game_behavior, base, label)
    return figure


def _draw_game(axes: Axes, group: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    distribution = group["distribution"]
    bins = Bins.of(distribution["values"])
    axes.bar(
        (bins.edges[:-1] + bins.edges[1:]) / 2,
        bins.percent(distribution["people"]),
        width=np.diff(bins.edges) * 0.92,
        color=PEOPLE_COLOUR,
    )
    if before:
        shares = bins.percent(before["distribution"]["model"])
        axes.stairs(shares, bins.edges, color=BASE_COLOUR, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.stairs(bins.percent(distribution["model"]), bins.edges, color=MODEL_COLOUR, linewidth=2.4)
    figure = group["metrics"]["wasserstein"]
    change = f"{before['metrics']['wasserstein']['value']:.1f} → " if before else ""
    # Titles and units come from whoever declared the game: no mathematics in them.
    axes.set_title(group["title"], loc="left", fontsize=15, weight="bold", pad=26, parse_math=False)
    axes.text(
        0.0,
        1.03,
        f"distance {change}{figure['value']:.1f}, other people {figure['ceiling']:.1f}",
        transform=axes.transAxes,
        fontsize=12,
        color="#334155",
    )
    axes.set_xlabel(group["unit"], fontsize=12, parse_math=False)
    values = distribution["values"]
    axes.set_xticks(nice_ticks(float(values[0]), float(values[-1]), 5))
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(labelsize=11, color="#94a3b8", labelcolor="#334155")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.01)


def _draw_legend(
    axes: Axes, game_behavior: Mapping[str, Any], base: Mapping[str, Any] | None, label: str
) -> None:
    handles: list[Patch | Line2D] = [
        Patch(color=PEOPLE_COLOUR, label="people"),
        Line2D([], [], color=MODEL_COLOUR, linewidth=2.4, label=label),
    ]
    figure = game_behavior["metrics"]["wasserstein"]
    low, high = figure["ci95"]
    lines = [
        "Mean distance to people",
        f"{label}: {figure['value']:.1f} ({low:.1f} to {high:.1f})",
        f"other people: {figure['ceiling']:.1f}",
        f"uniform: {figure['baselines']['uniform']:.1f}",
    ]
    if base:
        handles.append(
            Line2D(
                [], [], color=BASE_COLOUR, linewidth=1.3, linestyle=(0, (4, 2)), label="base model"
            )
        )
        lines.insert(2, f"base model: {base['metrics']['wasserstein']['value']:.1f}")
    axes.legend(handles=handles, loc="upper left", fontsize=13, frameon=False, borderaxespad=0)
    axes.text(
        0.02,
        0.02,
        "\n".join([*lines, "(Wasserstein; game's range = 100)"]),
        transform=axes.transAxes,
        fontsize=12,
        linespacing=1.5,
        color="#0f172a",
        va="bottom",
        parse_math=False,
    )
