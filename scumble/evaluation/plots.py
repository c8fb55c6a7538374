"""Plots: what is stolen against what honest users lose, and defense beside defense."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scumble.evaluation.claims import labels_only, undefended
from scumble.evaluation.summary import Line, best, own_kind_line
from scumble.evaluation.tables import is_policy

COLOURS = {
    "dcp": "#c0392b",
    "reverse_sigmoid": "#e08e45",
    "adaptive_misinformation": "#3a7d44",
    "random": "#7f7f7f",
    "mad": "#1f4e79",
    "grad2": "#8e44ad",
    "none": "#000000",
    "label": "#b8860b",
    "codebook": "#2e86c1",
    "withhold": "#c2185b",
}
OTHER = "#16a085"
GREY = "#444444"


@dataclass(frozen=True)
class Plot:
    """A plot of one victim: a panel per precision, side by side.

    Attributes:
        title: what it shows.
        panel: draws one served model's lines; takes the victim's policies in the order of the rows
            too, which are the same in all panels.
        x, y: names of the axes.
        height: in inches.
    """

    title: str
    panel: Callable[[Axes, list[Line], list[str]], None]
    x: str
    y: str
    height: float = 4.2

    def __call__(self, lines: list[Line], victim: str) -> Figure:
        """The figure."""
        precisions = [p for p in ("float32", "int8") if (victim, p) in {o.model for o in lines}]
        figure, panels = plt.subplots(
            1, len(precisions), figsize=(5.6 * len(precisions), self.height), sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        rows = list(dict.fromkeys(str(o.defense) for o in lines if o.victim == victim))[::-1]
        for axis, precision in zip(panels[0], precisions, strict=True):
            self.panel(axis, [o for o in lines if o.model == (victim, precision)], rows)
            axis.set_title(f"{victim}, {precision}", loc="left", fontsize="medium")
            axis.set_xlabel(self.x)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel(self.y)
        handles = {
            label: handle
            for axis in panels[0]
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center",
            ncols=2 * len(precisions), frameon=False, fontsize="small",
        )  # fmt: skip
        return figure


def beside(axis: Axes, lines: list[Line], rows: list[str]) -> None:
    """One row per defense: the published attack hollow, the best of all attackers full."""
    for y, name in enumerate(rows):
        own = [line for line in lines if str(line.defense) == name]
        if not own:
            continue
        colour = COLOURS.get(own[0].defense.name, GREY)
        published = [line for line in own if line.attacker == "knockoff"]
        # One attacker is the best of all where the published one was not run.
        strongest = best(own, tried=2 if published else 1)
        ends = [100 * line.stolen.mean for line in (*published, *strongest)]
        axis.plot(ends, [y] * len(ends), color=colour, linewidth=1.2, alpha=0.6)
        for line in strongest:
            axis.plot(100 * line.stolen.mean, y, marker="o", markersize=7, color=colour)
        for line in published:
            axis.errorbar(
                100 * line.stolen.mean, y, xerr=100 * (line.stolen.half or 0), color=colour,
                marker="o", markerfacecolor="white", markersize=7, capsize=2,
            )  # fmt: skip
    references(axis.axvline, lines)
    axis.plot([], [], "o", color=GREY, markerfacecolor="white", label="KnockoffNets as published")
    axis.plot([], [], "o", color=GREY, label="best of all attackers")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlim(0, 101)
    axis.grid(axis="x", color="#e5e5e5")


def against(value: Callable[[Line], float]) -> Callable[[Axes, list[Line], list[str]], None]:
    """One curve per defense over `value`: the published attack solid, the best of all dashed."""

    def panel(axis: Axes, lines: list[Line], rows: list[str]) -> None:
        del rows
        references(axis.axhline, lines)
        for name in dict.fromkeys(line.defense.name for line in lines):
            if name in ("none", "label"):
                continue
            own = [line for line in lines if line.defense.name == name]
            published = [line for line in own if line.attacker == "knockoff"]
            for points, style, face, label in (
                (published, "-", "white", name),
                (best(own, tried=2), "--", None, None),
            ):
                points = sorted(points, key=value)
                colour = COLOURS.get(name, OTHER)
                axis.errorbar(
                    [value(line) for line in points],
                    [100 * line.stolen.mean for line in points],
                    yerr=[100 * (line.stolen.half or 0) for line in points],
                    color=colour, linestyle=style, marker="o", markersize=5, linewidth=1.4,
                    markerfacecolor=face or colour, capsize=2, label=label,
                )  # fmt: skip
        axis.plot([], [], "--o", color=GREY, label="best of all attackers")
        axis.set_ylim(0, 101)
        axis.grid(color="#e5e5e5")

    return panel


def by_answers(axis: Axes, lines: list[Line], rows: list[str]) -> None:
    """A point per attacker over the answers that it got, a colour per policy of the table."""
    del rows
    references(axis.axhline, lines)
    counted = [o for o in lines if is_policy(o) and o.failed is None and not o.own_kind]
    for name in dict.fromkeys(line.defense.name for line in counted):
        own = [line for line in counted if line.defense.name == name]
        axis.errorbar(
            [max(line.budget * line.answered_transfer, 1) for line in own],
            [100 * line.stolen.mean for line in own],
            yerr=[100 * (line.stolen.half or 0) for line in own],
            color=COLOURS.get(name, OTHER), linestyle="none", marker="o", markersize=5,
            capsize=2, label=name,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(1, 1_000_000)
    axis.set_ylim(0, 101)
    axis.grid(color="#e5e5e5")


def references(draw: Callable[..., object], lines: Iterable[Line]) -> None:
    """Undefended, labels only, and attackers with own images, each by the best copy."""
    lines = list(lines)
    for line, style, label in (
        (undefended(lines), "-", "undefended"),
        (labels_only(lines), ":", "labels only"),
        (own_kind_line(lines), "-.", "own images as queries, any policy"),
    ):
        if line is not None:
            draw(100 * line.stolen.mean, color=GREY, linestyle=style, linewidth=1.3, label=label)


STOLEN = "accuracy of the copy, %"
PLOTS = {
    "defenses": Plot("Stolen accuracy by defense", beside, STOLEN, "", 4.8),
    "l1": Plot(
        "Stolen accuracy against L1",
        against(lambda line: line.l1_test.mean),
        "L1 between served and clean answers of honest users",
        STOLEN,
    ),
    "accuracy": Plot(
        "Stolen accuracy against served accuracy",
        against(lambda line: 100 * line.served.mean),
        "accuracy of the served answers, %",
        STOLEN,
    ),
    "answers": Plot(
        "Stolen accuracy against answers",
        by_answers,
        "answers that were not withheld",
        STOLEN,
    ),
}


def svg(figure: Figure) -> str:
    """As an SVG element, to be put into a page; the same bytes for the same figure."""
    buffer = io.StringIO()
    # Text as text, which can be selected, and not as drawn letters.
    with mpl.rc_context({"svg.hashsalt": "scumble", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """As a PNG file."""
    figure.savefig(path, dpi=120)
    plt.close(figure)
