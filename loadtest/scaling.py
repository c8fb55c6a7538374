"""Writes the figures of docs/how-to/scaling.md from the committed JSON.

python -m loadtest.scaling --price 0.04            price of one core for one hour
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from loadtest.pages import read, table

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "scaling.md"
CONNECTIONS = "32"
USE = 0.7  # of its processor time; what the autoscalers of deploy/kubernetes aim at
Document = dict[str, Any]


def cost(price: float, per_second: float, use: float = USE) -> float:
    """The cost of a million images, at `price` per core and hour and `per_second` per core."""
    return price * 1e6 / (3600 * per_second * use)


def capacity(bench: Document, price: float) -> str:
    """The capacity and cost of a core; a sentence if nothing was measured."""
    if not bench:
        return (
            "**Not measured yet.** `python -m loadtest.bench` writes `loadtest/bench.json`, and "
            f"`python -m loadtest.scaling --price {price:g}` this table."
        )
    head = ["model", "undefended", "`dcp`", f"`dcp` at {USE:.0%}", "cores for 1,000 images/s"]
    return "\n\n".join(
        [
            f"Images per second and core, one image per request, {CONNECTIONS} connections, of "
            f"`{bench['command']}`, [bench.json](../../loadtest/bench.json): "
            f"{bench['cores']} cores, {bench['processor']}. Client and service share the cores, so "
            f"a server on its own does more. A million images at {price:g} per core and hour:",
            table([*head, "a million images"], capacity_rows(bench, price)),
        ]
    )


def capacity_rows(bench: Document, price: float) -> Iterator[list[str]]:
    """One row per model."""
    for case in bench["cases"]:
        none, dcp = (
            case["service"][defense][CONNECTIONS]["rps"] / bench["cores"]
            for defense in ("none", "dcp")
        )
        yield [
            f"`{case['model']}` {case['precision']}",
            f"{none:,.0f}",
            f"{dcp:,.0f}",
            f"{USE * dcp:,.0f}",
            f"{1000 / (USE * dcp):.2f}",
            f"{cost(price, dcp):.4f}",
        ]


def charges(document: Document) -> str:
    """The charges that one Redis counts; a sentence if nothing was measured."""
    if not document:
        return (
            "How many charges a second one Redis counts was **not measured yet**: "
            "`python -m loadtest.charges` writes `loadtest/charges.json`."
        )
    rows = (
        [count, f"{row['per_second']:,}", f"{row['p50_ms']:.2f} / {row['p99_ms']:.2f}"]
        for count, row in document["connections"].items()
    )
    return "\n\n".join(
        [
            f"`{document['command']}`, [charges.json](../../loadtest/charges.json): "
            f"{document['cores']} cores, {document['processor']}, each charge on the disk before "
            "its answer. Redis and those who ask share the cores.",
            table(["connections", "charges per second", "p50 / p99, ms"], rows),
        ]
    )


def budgets(document: Document) -> str:
    """The simulation's rows in which replicas were replaced, for most replicas and for two."""
    counts = (2, max(document["replicas"]))
    head = ["strategy", "replicas", "most beyond the budget", "bound", "most left when refused"]
    return "\n\n".join(
        [
            f"`{document['command']}`, [budgets.json](../../loadtest/budgets.json): "
            f"{document['clients']:,} clients, {document['thieves']} of them thieves, "
            f"{document['budget']} images each, requests of 1 to {document['largest_request']}; "
            "every replica is replaced once.",
            table(
                [*head, "bound", "calls of the store per answer"],
                (budget_row(row) for row in document["rows"] if row["replicas"] in counts
                 and row["replaced"]),
            ),
        ]
    )  # fmt: skip


def budget_row(row: Document) -> list[str]:
    """One strategy."""
    name = f"{row['strategy']} of {row['lease']}" if row["lease"] else row["strategy"]
    figures = ("replicas", "worst_over", "bound_over", "worst_left", "bound_left")
    return [name, *(f"{row[figure]:,}" for figure in figures), f"{row['calls_per_answer']:.2f}"]


def sizes(document: Document) -> str:
    """What breaks first with more workers and replicas."""
    costs, limits = document["costs"], document["limits"]
    most = [list(costs[name])[-1] for name in ("scrape_ms", "redis_us")]
    at = list(document["balance"]["dispatcher"])[-1]
    spread = {name: found[at] for name, found in document["balance"].items()}
    head = ["workers", "replicas", *document["rows"][0]["shares"], "breaks first"]
    return "\n\n".join(
        [
            f"`{document['command']}`, [simulation.json](../../loadtest/simulation.json): "
            f"{document['processor']}. Share of its limit that each part needs, if every worker "
            f"answers small images with keys for {USE:.0%} of its time:",
            table(
                head,
                (
                    [
                        str(row["workers"]),
                        f"{row['replicas']:,}",
                        *(
                            f"{share:,.0f}" if share >= 10 else f"{share:.3f}"
                            for share in row["shares"].values()
                        ),
                        row["first"] or "nothing",
                    ]
                    for row in document["rows"]
                ),
            ),
            f"One Redis is enough for {limits['Redis']:,} workers in all "
            f"({costs['redis_us'][most[1]]:.1f} µs of its one core per charge, "
            f"{costs['redis_us']['1']:.1f} where each has a call of its own), one Prometheus for "
            f"{limits['Prometheus']:,}. A scrape of {most[0]} workers takes "
            f"{costs['scrape_ms'][most[0]]:.0f} ms, and a connection "
            f"{costs['dispatch_us'][most[0]]:.0f} µs of the supervisor.",
            f"Over {at} workers, the busiest has "
            f"{spread['dispatcher']['most_over_mean']:.2f} times the mean of the connections, and "
            f"p99 is {spread['dispatcher']['p99_over_service']:.0f} times a request's own time; "
            "where the kernel hashes connections (`SO_REUSEPORT`), "
            f"{spread['SO_REUSEPORT']['most_over_mean']:.2f} and "
            f"{spread['SO_REUSEPORT']['p99_over_service']:.0f}.",
        ]
    )


def written(
    page: str,
    price: float,
    bench: Document,
    counted: Document,
    simulated: Document,
    larger: Document,
) -> str:
    """The page with all parts regenerated."""
    parts = {
        "capacity": (f"python -m loadtest.scaling --price {price:g}", capacity(bench, price)),
        "charges": ("python -m loadtest.charges", charges(counted)),
        "budgets": (str(simulated["command"]), budgets(simulated)),
        "sizes": (str(larger["command"]), sizes(larger)),
    }
    for name, (command, text) in parts.items():
        found = re.findall(
            rf"<!-- {name}: .* -->\n.*?<!-- end of {name} -->", page, flags=re.DOTALL
        )
        if len(found) != 1:
            raise click.ClickException(f"the page has {len(found)} places for {name}")
        page = page.replace(
            found[0], f"<!-- {name}: {command} -->\n\n{text}\n\n<!-- end of {name} -->"
        )
    return page


@click.command()
@click.option("--price", default=0.04, show_default=True, help="Price of a core for an hour.")
@click.option("--page", type=click.Path(exists=True, path_type=Path), default=PAGE)
def main(price: float, page: Path) -> None:
    """Write the figures into the page."""
    documents = (read(f"{name}.json") for name in ("bench", "charges", "budgets", "simulation"))
    page.write_text(written(page.read_text(), price, *documents))


if __name__ == "__main__":
    main()
