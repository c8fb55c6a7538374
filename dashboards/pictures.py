"""`python -m dashboards.pictures`: draw every dashboard from its file, with real figures.

Two real servers, one defended, and a Prometheus that scrapes both, all on loopback, under 40 s of
real load. Then every expression of every panel is asked over that time, and each dashboard is drawn
into `docs/pictures/`, panel by panel as its JSON says. Grafana has no part in it, and the pictures
say so.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx2
import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dashboards.__main__ import FOLDER
from dashboards.boards import BOARDS
from dashboards.prometheus import Prometheus, filled_in, running
from scumble.evaluation.local_server import Server, serving

ROOT = FOLDER.parents[2]
OUT = ROOT / "docs" / "pictures"
LOAD_S = 40
JOIN_S = 12  # when a client starts to send many images per request
PAUSE_S = 0.02  # between two requests of an honest client
MANY = 16
BUDGETS = (("shop", 20_000), ("museum", 5_000), ("trial", 100), ("new", 2_500))
RATE_INTERVAL = "5s"
COLUMNS = 24
NOTE = "Drawn from the dashboard file, not by Grafana"
JOBS = {"victim": plt.get_cmap("Blues"), "defended": plt.get_cmap("Oranges")}
INK, FAINT, PAGE = "#24292f", "#d8dee4", "#f6f8fa"
NAMED = 3  # lines of each service in a legend, the highest ones
MARGIN = 0.035  # of the page's width, on both sides
UNIT_IN = 0.26  # inches of a row of the dashboard's grid


@dataclass(frozen=True)
class Series:
    """A line of a panel: name, job, and values over the seconds since the load began."""

    name: str
    job: str
    seconds: list[float]
    values: list[float]


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=OUT,
    help="Folder of the pictures.  [default: docs/pictures]",
)
@click.option("--seconds", type=click.IntRange(min=5), default=LOAD_S, show_default=True)
def main(out: Path, seconds: int) -> None:
    """Draw the dashboards with the metrics of two real servers under load."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys = {name: make_key(folder / "keys.json", name, budget) for name, budget in BUDGETS}
        common: dict[str, Any] = {
            "model": "mnist", "precision": "int8", "workers": 1, "keys_file": folder / "keys.json"
        }  # fmt: skip
        dcp = {"defense": "dcp", "defense_params": {"beta": 1.2}}
        servers = {
            "victim": stack.enter_context(serving(**common)),
            "defended": stack.enter_context(serving(**common, **dcp)),
        }
        prometheus = stack.enter_context(running(configuration(servers), folder))
        time.sleep(3)  # the zeros before the load
        start = time.time()
        load(servers, keys, seconds)
        time.sleep(2)  # a scrape after the last request
        for board in BOARDS:
            shown = json.loads((FOLDER / f"{board.uid}.json").read_text())
            panels = shown["panels"]
            figures = {
                panel["id"]: ask(prometheus, panel, start, start + seconds) for panel in panels
            }
            click.echo(draw(shown, figures, seconds, out / f"{board.uid}.png"))


def configuration(servers: Mapping[str, Server]) -> str:
    """The configuration of Prometheus, as JSON: each server is a job, scraped every second."""
    jobs = {name: server.admin.removeprefix("http://") for name, server in servers.items()}
    return json.dumps(
        {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [target]}]}
                for job, target in jobs.items()
            ],
        }
    )


def make_key(file: Path, client: str, budget: int) -> str:
    """A key with a budget in images."""
    words = ["keys", "add", "--file", str(file), "--client", client, "--total-images", str(budget)]
    made = subprocess.run(  # noqa: S603  # our own command
        [sys.executable, "-m", "scumble.cli", *words], capture_output=True, text=True, check=True
    )
    return made.stdout.strip()


def load(servers: Mapping[str, Server], keys: Mapping[str, str], seconds: float) -> None:
    """Send both servers the same load: honest clients, broken files, later a client with many."""
    digits = [file.read_bytes() for file in sorted((ROOT / "docs" / "digits").glob("*.png"))]
    end = time.monotonic() + seconds
    clients = [
        threading.Thread(target=kind, args=(server.url, keys[name], digits, end))
        for server in servers.values()
        for kind, name in ((honest, "shop"), (honest, "museum"), (clumsy, "trial"), (greedy, "new"))
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def honest(url: str, key: str, digits: list[bytes], end: float) -> None:
    """Send one digit after another."""
    with httpx2.Client(base_url=url, headers={"X-API-Key": key}, trust_env=False) as client:
        for i in range(10**9):
            if time.monotonic() > end:
                return
            post(client, digits[i % len(digits)])
            time.sleep(PAUSE_S)


def clumsy(url: str, key: str, digits: list[bytes], end: float) -> None:
    """Send half of a file now and then."""
    with httpx2.Client(base_url=url, headers={"X-API-Key": key}, trust_env=False) as client:
        while time.monotonic() < end:
            post(client, digits[0][: len(digits[0]) // 2])
            time.sleep(0.5)


def greedy(url: str, key: str, digits: list[bytes], end: float) -> None:
    """From `JOIN_S` on, send tensors with many pictures of noise, as a data-free attacker does."""
    del digits
    rng = np.random.default_rng(0)
    time.sleep(JOIN_S)
    with httpx2.Client(base_url=url, headers={"X-API-Key": key}, trust_env=False) as client:
        while time.monotonic() < end:
            pixels = rng.integers(0, 256, (MANY, 28, 28, 1), np.uint8)
            tensor = {
                "name": "pixels",
                "datatype": "UINT8",
                "shape": pixels.shape,
                "data": pixels.ravel().tolist(),
            }
            client.post("/v2/models/mnist/infer", json={"inputs": [tensor]})  # finally gets 429
            time.sleep(0.1)


def post(client: httpx2.Client, content: bytes) -> None:
    """Send a file and ignore the answer."""
    client.post("/v1/predict", content=content, headers={"Content-Type": "image/png"})


def ask(prometheus: Prometheus, panel: Mapping[str, Any], start: float, end: float) -> list[Series]:
    """Everything a panel shows; a table's rows have their labels as a name."""
    found = []
    for target in panel.get("targets", []):
        expr = filled_in(target["expr"], RATE_INTERVAL)
        for series in prometheus.ask_range(expr, start, end, 1):
            labels = series["metric"]
            if legend := target.get("legendFormat"):
                named = defaultdict(str, labels)  # as in Grafana, a missing one is empty
                name = re.sub(r"\{\{(\w+)\}\}", r"{\1}", legend).format_map(named)
            else:
                name = json.dumps(labels)
            seconds = [float(at) - start for at, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            found.append(Series(name, labels["job"], seconds, values))
    return found


def draw(
    shown: Mapping[str, Any], figures: Mapping[int, list[Series]], seconds: float, file: Path
) -> str:
    """Draw a dashboard; returns the path of the picture."""
    panels = shown["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    head = 4
    high = (rows + head) * UNIT_IN
    with mpl.rc_context({"font.size": 8, "text.color": INK, "axes.edgecolor": FAINT}):
        page = plt.figure(figsize=(14, high), facecolor=PAGE)
        title(page, shown, high)
        for panel in panels:
            at = panel["gridPos"]
            left = MARGIN / 2 + at["x"] / COLUMNS * (1 - MARGIN)
            wide = at["w"] / COLUMNS * (1 - MARGIN)
            top = 1 - (at["y"] + head) / (rows + head)
            tall = at["h"] / (rows + head)
            box = (left, top - tall, wide, tall)
            if panel["type"] == "row":
                page.text(left, top - tall * 0.8, f"⌄  {panel['title']}", size=11, weight="bold")
            elif panel["type"] == "table":
                table(card(page, box, panel), figures[panel["id"]])
            else:
                graph(card(page, box, panel), panel, figures[panel["id"]], seconds)
        save(page, file, {"Description": NOTE, "Panels": "\n".join(titles(shown))})
        plt.close(page)
    return os.path.relpath(file)


def save(page: Figure, file: Path, words: Mapping[str, str]) -> None:
    """Save as a PNG with few colours, a third of the size, and with `words` in its text chunks."""
    drawn = io.BytesIO()
    page.savefig(drawn, dpi=100)
    text = PngInfo()
    for name, value in words.items():
        text.add_text(name, value)
    Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(
        file, optimize=True, pnginfo=text
    )


def titles(shown: Mapping[str, Any]) -> list[str]:
    """Of all panels of a dashboard."""
    return [panel["title"] for panel in shown["panels"]]


def title(page: Figure, shown: Mapping[str, Any], high: float) -> None:
    """Draw a note above all panels on what the picture is and is not."""
    left = MARGIN / 2
    page.text(left, 1 - 0.34 / high, shown["title"], size=16, weight="bold")
    page.text(left, 1 - 0.58 / high, shown["description"], size=9)
    page.text(
        left,
        1 - 0.82 / high,
        f"{NOTE}: docker/grafana/dashboards/{shown['uid']}.json, asked of a real Prometheus that "
        "scraped two real servers under load on a busy machine.",
        size=9,
        style="italic",
        color="#9a3412",
    )


def card(page: Figure, box: tuple[float, float, float, float], panel: Mapping[str, Any]) -> Axes:
    """Draw a white card with the panel's title; returns the axes inside it."""
    left, bottom, wide, tall = box
    gap_x, gap_y = 0.003, 0.06 * UNIT_IN * 2 / page.get_figheight()
    white = page.add_axes((left + gap_x, bottom + gap_y, wide - 2 * gap_x, tall - 2 * gap_y))
    white.set(xticks=[], yticks=[], facecolor="white")
    inch = 1 / page.get_figheight()
    page.text(left + 0.008, bottom + tall - 0.24 * inch, panel["title"], weight="bold", size=9)
    legend, head = (0.64 * inch, 0.34 * inch) if panel["type"] != "table" else (0, 0.3 * inch)
    return page.add_axes(
        (left + 0.042, bottom + legend, wide - 0.052, tall - legend - head), facecolor="white"
    )


def graph(axes: Axes, panel: Mapping[str, Any], found: list[Series], seconds: float) -> None:
    """Lines over time, blue for the undefended service, orange for the defended one."""
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    jobs = {job: [s for s in found if s.job == job] for job in JOBS}
    for job, lines in jobs.items():
        # Several lines of one job get shades of its colour, the strongest for the largest.
        lines.sort(key=lambda line: -np.nan_to_num(line.values).max())
        for i, line in enumerate(lines):
            colour = JOBS[job](0.85 - 0.55 * i / max(1, len(lines)))
            axes.plot(line.seconds, line.values, color=colour, linewidth=1.3, label=line.name)
    default = panel["fieldConfig"]["defaults"]
    axes.set_xlim(0, seconds)
    highest = max((np.nan_to_num(line.values).max() for line in found), default=0)
    axes.set_ylim(0, 1.08 * (default.get("max") or highest or 1))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.tick_params(length=0, labelsize=7, colors="#57606a")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d s"))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(formatter(default["unit"]))
    handles = {str(h.get_label()): h for h in axes.get_lines()}
    named = [line.name for lines in jobs.values() for line in lines[:NAMED]]
    axes.legend(
        [handles[name] for name in named],
        named,
        loc="upper left",
        bbox_to_anchor=(-0.08, -0.09),
        ncols=2,
        frameon=False,
        fontsize=6.5,
        handlelength=1,
        columnspacing=1,
        labelspacing=0.2,
    )


def formatter(unit: str) -> ticker.Formatter:
    """Format a value as Grafana does for the unit of that name."""
    if unit == "percentunit":
        return ticker.FuncFormatter(lambda share, _: f"{100 * share:g}%")
    if unit in ("s", "bytes"):
        return ticker.EngFormatter("s" if unit == "s" else "B", sep=" ")
    return ticker.StrMethodFormatter(
        "{x:g}/s" if unit == "reqps" or unit.endswith("/s") else "{x:g}"
    )


def table(axes: Axes, found: list[Series]) -> None:
    """Draw the labels of what is served, with a row for each service."""
    axes.axis("off")
    rows: list[dict[str, str]] = [json.loads(series.name) for series in found]
    names = ["job", *sorted(rows[0].keys() - {"job"})]
    for i, row in enumerate([dict(zip(names, names, strict=True)), *rows]):
        high = 0.9 - 0.33 * i
        axes.axhline(high - 0.14, color=FAINT, linewidth=0.8)
        for j, name in enumerate(names):
            weight = "bold" if i == 0 else "normal"
            axes.text(j / len(names), high, row[name][:16], weight=weight, va="center")
    axes.set(xlim=(0, 1), ylim=(0, 1))


if __name__ == "__main__":
    main()
