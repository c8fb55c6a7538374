"""Writes `docs/explanation/results.md`, `report.html` and the plots from the committed records.

python -m docs.generators.results
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from markdown import markdown

from docs.generators import policies as policy_table
from docs.generators.policies import CELLS, README
from scumble.evaluation.claims import CLAIMS, Bench, Claim, advice, groups
from scumble.evaluation.plots import PLOTS, Plot, save, svg
from scumble.evaluation.record import Record
from scumble.evaluation.summary import Line, load, summarise
from scumble.evaluation.tables import (
    COLUMNS,
    VICTIMS,
    advised,
    compared,
    everything,
    latency,
    ordered,
    policies,
    strong,
)

HERE = Path(__file__).parent
DOCS = HERE.parent
BENCH = DOCS / "results" / "records" / "bench.json"


def results(records: list[Record], bench: Bench) -> str:
    """The whole page."""
    lines = ordered(summarise(records))
    plain = [line for line in lines if not line.tuned]
    parts = [
        (HERE / "results.head.md").read_text().rstrip(),
        "## What held, what did not",
        *(claimed(lines, bench)),
        "## Which strength to take",
        (HERE / "results.advice.md").read_text().rstrip(),
        advised(advice(lines)),
        "## The best attackers",
        (HERE / "results.best.md").read_text().rstrip(),
        policies(lines),
        (HERE / "results.strong.md").read_text().rstrip(),
        strong(lines),
        "## Defenses against attackers",
        "Accuracy of the copy on the victim's test set; the best of these attackers is bold.",
        *(part for group in groups(plain) for part in (heading(group[0]), compared(group))),
        "## Latency",
        f"{(HERE / 'results.latency.md').read_text().rstrip()}\n{of_1000_classes()}",
        f"`{bench['command']}`, [bench.json](../results/records/bench.json): "
        f"{bench['cores']} cores, {bench['processor']}."
        if bench
        else "Not measured yet: `scumble bench defenses`.",
        *([latency(bench)] if bench else []),
        "## Plots",
        *(
            f"![{plot.title}, {victim}](../results/{victim}-{name}.png)"
            for victim in victims(lines)
            for name, plot in plots(lines, victim).items()
        ),
        "## Every cell",
        everything(lines),
        "These commands made them:",
        "\n".join(["```sh", *commands(records), "```"]),
    ]
    return "\n\n".join(parts) + "\n"


def of_1000_classes() -> str:
    """What the published forms add to a network of the size of ImageNet, by its own record."""
    defenses = json.loads(policy_table.IMAGENET.read_text())["defenses"]
    mad, grad2 = (
        f"{defenses[f'{name}_reference']['us'] / defenses['dcp']['us']:,.0f}"
        for name in ("mad", "grad2")
    )
    return (
        "With 1,000 classes at 224 x 224 pixels (EfficientNet-Lite0 int8) the published `mad` adds "
        f"{mad} times what\n`dcp` adds to an image, and `grad2` {grad2} times "
        "([performance](performance.md#defenses-of-1000-classes))."
    )


def claimed(lines: list[Line], bench: Bench) -> Iterable[str]:
    """Each claim with its verdict, its rule and its figures."""
    for claim in CLAIMS:
        verdict, figures = claim(lines, bench)
        yield f"### {claim.words} {verdict.capitalize()}."
        yield f"Rule: {claim.rule}."
        if figures:
            listed = "\n".join(f"- {figure}" for figure in figures)
            yield f"<details><summary>{len(figures)} figures</summary>\n\n{listed}\n\n</details>"


def heading(line: Line) -> str:
    """Of a served model's table."""
    return f"### `{line.victim}`, {line.precision}"


def victims(lines: Iterable[Line]) -> list[str]:
    """All victims, in the page's order."""
    there = {line.victim for line in lines}
    return [victim for victim in VICTIMS if victim in there]


def plots(lines: Iterable[Line], victim: str) -> dict[str, Plot]:
    """Of a victim; where only attackers with recipes were run, that over the answers."""
    plain = any(line.victim == victim and not line.tuned for line in lines)
    return PLOTS if plain else {"answers": PLOTS["answers"]}


def commands(records: Iterable[Record]) -> list[str]:
    """What made the records."""
    return sorted({record.command for record in records})


def report(records: list[Record], bench: Bench) -> str:
    """One page: the recommendation, verdicts, plots, and all cells folded; self-contained."""
    lines = ordered(summarise(records))
    verdicts = "".join(card(claim, *claim(lines, bench)) for claim in CLAIMS)
    names = victims(lines)
    figures = "".join(
        f"<section id={victim}><h2>{html.escape(victim)}</h2>"
        + "".join(
            f"<figure>{svg(plot(lines, victim))}</figure>" for plot in plots(lines, victim).values()
        )
        + "</section>"
        for victim in names
    )
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{inline(cell(line))}</td>' for cell in COLUMNS.values())}</tr>"
        for line in lines
    )
    places = {"policy": "Which policy", "claims": "What held", **{name: name for name in names}}
    places["cells"] = "All cells"
    links = " ".join(f"<a href='#{place}'>{text}</a>" for place, text in places.items())
    style = (HERE / "report.css").read_text()
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Scumble: results</title><style>{style}</style></head><body>"
        f"<header><h1>What model stealing defenses are worth</h1><nav>{links}</nav></header><main>"
        f"<section id=policy>{recommendation()}</section>"
        "<section id=claims><h2>What held, what did not</h2>"
        "<p>Every copy was stolen from a real server over HTTP. "
        "<a href='../explanation/results.md'>Results</a> has the rules and all figures.</p>"
        f"<div class=claims>{verdicts}</div></section>"
        "<p>In the plots, a point is the accuracy of a copy: hollow for the published "
        "KnockoffNets, full for the best of all attackers that were tried. The lower, the better "
        "the defense; left of the dotted line it beats giving out nothing but labels.</p>"
        f"{figures}<section id=cells><details><summary>All {len(lines)} cells</summary>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "</details></section></main></body></html>\n"
    )


def recommendation() -> str:
    """The README's section on policies as HTML, with links that hold beside the report."""
    title = "## Which policy should I run?"
    section = README.read_text().partition(title)[2].partition("\n## ")[0]
    section = re.sub(r"<!--.*?-->", "", section, flags=re.DOTALL).replace("](docs/", "](../")
    made: str = markdown(title + section, extensions=["tables"])
    return made.replace("<table>", "<div class=wide><table>").replace("</table>", "</table></div>")


def inline(text: str) -> str:
    """A line of Markdown as HTML without a paragraph around it."""
    if "`" not in text and "](" not in text:
        return html.escape(text)
    made: str = markdown(html.escape(text, quote=False))
    return made.removeprefix("<p>").removesuffix("</p>")


def card(claim: Claim, said: str, figures: list[str]) -> str:
    """A claim and its verdict, to be opened to its figures."""
    items = "".join(f"<li>{inline(figure)}</li>" for figure in figures)
    return (
        f"<details class='{said.replace(' ', '-')}'><summary>{inline(claim.words)} "
        f"<b>{said}</b></summary><p>Rule: {inline(claim.rule)}.</p><ul>{items}</ul></details>"
    )


def read_bench() -> dict[str, Any]:
    """The committed latency bench; empty where there is none."""
    return dict(json.loads(BENCH.read_text())) if BENCH.exists() else {}


@click.command()
@click.option("--cells", type=click.Path(file_okay=False, path_type=Path), default=CELLS)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=DOCS)
def main(cells: Path, out: Path) -> None:
    """Write results.md, report.html and plots into OUT; tables of policies with the records."""
    committed = (cells, out) == (CELLS, DOCS)
    if committed:
        policy_table.write()  # before the report, which has the README's table
    records, bench = load(cells), read_bench()
    for folder in ("explanation", "results"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "explanation" / "results.md").write_text(results(records, bench))
    (out / "results" / "report.html").write_text(report(records, bench))
    lines = ordered(summarise(records))
    for victim in victims(lines):
        for name, plot in plots(lines, victim).items():
            save(plot(lines, victim), out / "results" / f"{victim}-{name}.png")
    if committed:
        click.echo("run python -m docs.generators.recommended too: the cards have these figures")


if __name__ == "__main__":
    main()
