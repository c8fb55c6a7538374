"""Frontier plots: what is stolen against what honest users lose, one curve per defense."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.summary import Line, best

COLOURS = ["#1f4e79", "#e08e45", "#3a7d44", "#8e44ad", "#c0392b", "#16a085", "#7f6000"]
REFERENCE = ("none", "label")  # lines in every plot, not curves

# what the x axis can be: title, value in the axis' unit
AXES: dict[str, tuple[str, Callable[[Line], float]]] = {
    "l1": ("L1 between served and clean answers, test set", lambda line: line.l1_test.mean),
    "accuracy": ("accuracy of the served answers, %", lambda line: 100 * line.served.mean),
}


def frontier(lines: list[Line], victim: str, x: str) -> Figure:
    """One panel per precision: the naive attacker solid, the best of all attackers dashed."""
    precisions = [p for p in ("float32", "int8") if any(line.precision == p for line in lines)]
    figure, panels = plt.subplots(
        1, len(precisions), figsize=(5.2 * len(precisions), 4.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, precision in zip(panels[0], precisions, strict=True):
        panel(axis, [li for li in lines if (li.victim, li.precision) == (victim, precision)], x)
        axis.set_title(f"{victim}, {precision}", loc="left", fontsize="medium")
        axis.set_xlabel(AXES[x][0])
    panels[0][0].set_ylabel("accuracy of the copy, %")
    handles = {
        label: handle
        for axis in panels[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False,
        fontsize="small",
    )  # fmt: skip
    return figure


def panel(axis: Axes, lines: list[Line], x: str) -> None:
    """Curves of all defenses of one served model."""
    value = AXES[x][1]
    naive = [line for line in lines if not line.adapt]
    strongest = best(lines)
    names = sorted({line.defense.name for line in lines} - set(REFERENCE))
    for name, style in zip(REFERENCE, ("-", ":"), strict=True):
        of = [line for line in strongest if line.defense.name == name]
        if of:
            axis.axhline(
                100 * of[0].stolen.mean, color="#555555", linestyle=style, linewidth=1.2,
                label="undefended" if name == "none" else "labels only",
            )  # fmt: skip
    for colour, name in zip(COLOURS, names, strict=False):
        for group, style, label in (
            (naive, "-", name),
            (strongest, "--", f"{name}, best of all attackers"),
        ):
            points = sorted((line for line in group if line.defense.name == name), key=value)
            if not points:
                continue
            axis.errorbar(
                [value(line) for line in points],
                [100 * line.stolen.mean for line in points],
                yerr=[100 * (line.stolen.half or 0) for line in points],
                color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.5,
                capsize=2, label=label,
            )  # fmt: skip
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(0, 101)


def svg(figure: Figure) -> str:
    """As an SVG element, to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """As a PNG file."""
    figure.savefig(path, dpi=140)
    plt.close(figure)
