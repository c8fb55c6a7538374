"""`make demo`: steal a digit reader, undefended and under two policies, and compare.

Three servers run on loopback, and each is attacked with KnockoffNets over HTTP. The transfer set is
scikit-learn's digits, randomly rotated, moved, scaled and distorted; each such picture is a query.
The test set is other digits, and MNIST's test images if they are available. The defended server has
`dcp`. It is attacked with answers as they are, under both losses; with labels only, which a defense
that keeps the label cannot prevent; and by an attacker who knows the defense and inverts it. The
third server has the policy that is recommended for the model, and is attacked with answers as they
are, under both losses, and with the labels only. Clients have keys: the
budget of the attacker's key is large enough, that of the visitor's is not.

    python -m scumble.evaluation.demo --out runs/demo

With `--undefended`, `--defended` and `--recommended` it steals from servers that run elsewhere, as
those of `docker-compose.yml`, and sees only their public ports.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.inference.bundle import open_bundle
from app.inference.policy_presets import recommended_policy
from app.precision import Precision
from app.settings import default_model_dir
from scumble.attacker import consent, students
from scumble.attacker.adapt.abstention_filter import withheld
from scumble.attacker.errors import AttackError
from scumble.attacker.pool import pool
from scumble.attacker.result import Result
from scumble.attacker.run import Job, run
from scumble.attacker.transports import Probs
from scumble.client.wire import encode
from scumble.data.digits import SIDE, digits
from scumble.data.image_sets import Dataset, load, write_parquet
from scumble.evaluation import scores
from scumble.evaluation.demo_clients import Visits, admit, visit
from scumble.evaluation.local_server import serving
from scumble.evaluation.referee import REQUESTS, UNTIMED, ask, latencies
from scumble.training.train import affine, as_tensors, chain, light

MODEL = "mnist"
PRECISION: Precision = "int8"
DCP: dict[str, object] = {"defense": "dcp", "defense_params": {"beta": 1.2, "gamma": 0.2}}
HELD_OUT = 0.25  # of the digits, for the test
DISTORT = chain(affine(degrees=15, shift=0.1, scale=0.25, shear=0.2), light(0.3))

# name of the line, server, modifiers, what is changed
ATTACKS: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = [
    ("undefended", "undefended", (), ("fit.loss=centred",)),
    ("undefended, soft loss", "undefended", (), ("fit.loss=soft", "fit.augment=digits")),
    ("defended", "defended", (), ("fit.loss=centred",)),
    ("defended, soft loss", "defended", (), ("fit.loss=soft", "fit.augment=digits")),
    ("defended, labels only", "defended", ("argmax",), ("fit.loss=soft", "fit.augment=digits")),
    (
        "defended, inverted",
        "defended",
        ("invert",),
        ("fit.loss=centred", "invert.beta=1.2", "invert.gamma=0.2"),
    ),
    ("recommended", "recommended", (), ("fit.loss=centred",)),
    (
        "recommended, soft loss",
        "recommended",
        ("answered",),  # a recommended policy may withhold
        ("fit.loss=soft", "fit.augment=digits"),
    ),
    (
        "recommended, labels only",
        "recommended",
        ("answered", "argmax"),
        ("fit.loss=soft", "fit.augment=digits"),
    ),
]
# The jobs of docker/prometheus, by server.
JOBS = {"undefended": "victim", "defended": "defended", "recommended": "recommended"}


@dataclass(frozen=True)
class Target:
    """A server, as the attacker reaches it.

    Attributes:
        url: of the public port.
        admin: of the admin port, for its count; None where only its owner reaches that.
        headers: sent with every request.
    """

    url: str
    admin: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One attack's outcome.

    Attributes:
        name: of the line.
        server: which was attacked.
        command: that does it by hand.
        stolen: accuracy of the copy by test set.
        agreement: with the server's answers, on the digits.
        queries: spent, by the attacker's count and by the server's (None: not asked).
        images: sent in all: the queries and the test set.
        seconds: of the attack.
    """

    name: str
    server: str
    command: str
    stolen: dict[str, float]
    agreement: float
    queries: tuple[int, int | None]
    images: int
    seconds: float


@dataclass(frozen=True)
class ServerFigures:
    """One server's side.

    Attributes:
        settings: other than the defaults; None of a server that runs elsewhere.
        accuracy: of its answers by test set; a withheld one is wrong.
        withheld: share of its answers by test set.
        l1: mean L1 distance of its answers from the undefended ones by test set.
        latency_ms: median of single requests, taken by turns with the other servers.
        images: sent for these figures.
    """

    settings: dict[str, object] | None
    accuracy: dict[str, float]
    withheld: dict[str, float]
    l1: dict[str, float]
    latency_ms: float
    images: int


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
)
@click.option("--queries", type=click.IntRange(min=100), default=10_000, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("../shared/data"),
    show_default=True,
    help="Where MNIST may be.",
)
@click.option("--undefended", metavar="URL", help="Of a server that runs, with the next two.")
@click.option("--defended", metavar="URL", help="Of the one with dcp.")
@click.option(
    "--recommended", metavar="URL", help="Of the one with codebook.  [default: own servers]"
)
@click.option(
    "--i-have-the-owners-consent",
    "consented",
    is_flag=True,
    help="Needed, with --owner-token, for any host but this one.",
)
@click.option(
    "--owner-token",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the token that the owner of all three gave you.",
)
def main(
    out: Path,
    queries: int,
    epochs: int,
    seed: int,
    data: Path,
    undefended: str | None,
    defended: str | None,
    recommended: str | None,
    consented: bool,
    owner_token: Path | None,
) -> None:
    """Steal the digit reader, undefended and under two policies, and compare."""
    start = time.perf_counter()
    urls = {"undefended": undefended, "defended": defended, "recommended": recommended}
    given = {name: url for name, url in urls.items() if url is not None}
    if given and len(given) < len(urls):
        raise click.UsageError(f"{', '.join(f'--{name}' for name in urls)} belong together")
    try:
        servers = {
            name: Target(url, headers=consent.check(url, consent=consented, token=owner_token))
            for name, url in given.items()
        }
    except AttackError as exc:
        raise click.ClickException(str(exc)) from exc
    settings: dict[str, dict[str, object] | None] = dict.fromkeys(servers)
    visits: dict[str, Visits] = {}
    out.mkdir(parents=True, exist_ok=True)
    transfer, tests = material(out, queries, seed, data)
    with ExitStack() as stack:
        if not servers:
            settings = {"undefended": {}, "defended": DCP, "recommended": recommended_settings()}
            asked = queries + sum(map(len, tests.values()))
            keys = out.absolute() / "keys.json"
            guests = admit(keys, 2 * len(ATTACKS) * asked)
            for name, ours in settings.items():
                for old in out.glob(f"{name}.sqlite*"):  # with what was spent of the budgets
                    old.unlink()
                store = f"sqlite:///{out.absolute() / f'{name}.sqlite'}"
                server = stack.enter_context(
                    serving(
                        model=MODEL,
                        precision=PRECISION,
                        keys_file=keys,
                        store=store,
                        **(ours or {}),
                    )
                )
                servers[name] = Target(server.url, server.admin, guests["thief"])
            watch(servers, out / "targets.json")
            image = encode(tests["digits"].images[0])[0]
            visits = {
                name: visit(server.url, image, guests["visitor"])
                for name, server in servers.items()
            }
        served = measure(servers, settings, tests)
        lines = list(steal(servers, transfer, out, tests, queries, epochs, seed))
    seconds = round(time.perf_counter() - start, 1)
    report = {
        "command": shlex.join(
            [
                "python",
                "-m",
                "scumble.evaluation.demo",
                "--queries",
                str(queries),
                "--epochs",
                str(epochs),
                "--seed",
                str(seed),
            ]
        ),
        "servers": {name: asdict(side) for name, side in served.items()},
        "attacks": [asdict(line) for line in lines],
        "visits": {name: asdict(found) for name, found in visits.items()},
        "seconds": seconds,
    }
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(served, lines, out / "demo.png")
    show(served, lines, visits, out, seconds)


def material(out: Path, queries: int, seed: int, data: Path) -> tuple[Path, dict[str, Dataset]]:
    """The transfer set as a Parquet file, and the test sets."""
    rest, held_out = digits().split(HELD_OUT, seed)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(rest), queries)
    images, _ = as_tensors(rest)
    bent = DISTORT(images[rows], torch.Generator().manual_seed(seed))
    pictures = np.rint(bent.numpy().transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    write_parquet(out / "queries.parquet", pictures, rest.labels[rows])
    write_parquet(out / "test.parquet", held_out.images, held_out.labels)
    tests = {"digits": held_out}
    if (data / "mnist_test.parquet").is_file():
        tests["mnist"] = load("mnist", "test", root=data)
    return out / "queries.parquet", tests


def recommended_settings() -> dict[str, object]:
    """Settings of the policy that is recommended for the model."""
    preset = recommended_policy(open_bundle(default_model_dir(), MODEL).card, PRECISION)
    return {"defense": preset.defense, "defense_params": dict(preset.params)}


def watch(servers: dict[str, Target], path: Path) -> None:
    """Tell a Prometheus with `docker/prometheus/demo.yml` where the servers' metrics are."""
    targets = [
        {"targets": [server.admin.removeprefix("http://")], "labels": {"job": JOBS[name]}}
        for name, server in servers.items()
        if server.admin
    ]
    path.write_text(json.dumps(targets))


def measure(
    servers: dict[str, Target],
    settings: dict[str, dict[str, object] | None],
    tests: dict[str, Dataset],
) -> dict[str, ServerFigures]:
    """Accuracy, distortion and latency of the servers."""
    shape = (1, SIDE, SIDE)
    images = {test: pool(data, shape).images for test, data in tests.items()}
    answers = {
        name: {test: ask(server.url, images[test], server.headers) for test in tests}
        for name, server in servers.items()
    }
    said = {
        name: {test: ~withheld(rows) for test, rows in found.items()}
        for name, found in answers.items()
    }
    urls = {name: server.url for name, server in servers.items()}
    latency = latencies(urls, tests["digits"], REQUESTS, headers=servers["defended"].headers)
    return {
        name: ServerFigures(
            settings=settings[name],
            accuracy={
                test: float((said[name][test] & right(answers[name][test], data)).mean())
                for test, data in tests.items()
            },
            withheld={test: float(1 - said[name][test].mean()) for test in tests},
            l1={
                test: float(scores.l1(answers[name][test], answers["undefended"][test]).mean())
                for test in tests
            },
            latency_ms=latency[name]["p50"],
            images=sum(map(len, tests.values())) + REQUESTS + UNTIMED,
        )
        for name in servers
    }


def right(rows: Probs, data: Dataset) -> npt.NDArray[np.bool_]:
    """Which rows are largest at the true label."""
    found: npt.NDArray[np.bool_] = rows.argmax(1) == data.labels
    return found


def steal(
    servers: dict[str, Target],
    transfer: Path,
    out: Path,
    tests: dict[str, Dataset],
    queries: int,
    epochs: int,
    seed: int,
) -> Iterator[Line]:
    """Every line's attack, over HTTP, as `scumble attack` does it."""
    for name, server, modifiers, changes in ATTACKS:
        click.echo(f"{name} ...")
        folder = out / name.replace(", ", "-").replace(" ", "-")
        for file in folder.glob("*"):
            file.unlink()
        job = Job(
            servers[server].url,
            "knockoff",
            queries,
            test=str(out / "test.parquet"),
            queries=str(transfer),
            adapt=modifiers,
            changes=(*changes, f"fit.epochs={epochs}", "attack.curve=[]"),
            admin=servers[server].admin,
            seed=seed,
        )
        command = shlex.join(
            ["scumble", "attack", "URL", "--attack", "knockoff", "--budget", str(queries),
             "--queries", str(transfer), "--test", job.test, "--seed", str(seed)]
            + [word for change in job.changes for word in ("--set", change)]
            + (["--adapt", ",".join(modifiers)] if modifiers else [])
        )  # fmt: skip
        result = run(job, folder, command=command, headers=servers[server].headers, progress=True)
        yield Line(
            name=name,
            server=server,
            command=command,
            stolen={test: accuracy(result, folder, data) for test, data in tests.items()},
            agreement=result.scores.agreement,
            queries=(result.ledger.spent, result.ledger.server),
            images=result.ledger.spent + result.ledger.test,
            seconds=round(result.timing.wall_s, 1),
        )


def accuracy(result: Result, folder: Path, data: Dataset) -> float:
    """Of a finished run's copy."""
    shape, labels = result.victim.shape, result.victim.labels
    copy = students.make("auto", shape, labels, seed=0, weights=folder / result.student.file)
    test = pool(data, shape)
    return scores.accuracy(students.predict(copy, test.images), test.labels)


def show(
    served: dict[str, ServerFigures],
    lines: list[Line],
    visits: dict[str, Visits],
    out: Path,
    seconds: float,
) -> None:
    """The table, in 80 columns, and what it does not say."""
    tests = list(next(iter(served.values())).accuracy)
    table = Table(
        title="A digit reader, stolen over HTTP",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("attack", overflow="fold")
    for test in tests:
        table.add_column(f"served\n{test}", justify="right", no_wrap=True)
        table.add_column(f"stolen\n{test}", justify="right", style="bold", no_wrap=True)
    for column in ("agreement", "L1", "latency"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        side = served[line.server]
        cells = []
        for test in tests:
            cells += [f"{side.accuracy[test]:.1%}", f"{line.stolen[test]:.1%}"]
        table.add_row(
            line.name, *cells, f"{line.agreement:.1%}", f"{side.l1[tests[-1]]:.2f}",
            f"{side.latency_ms:.2f} ms",
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    if len(tests) == 1:
        console.print(
            "MNIST's test images are not available (--data): the copies are measured only on the "
            "kind of digits that was asked about, where they learn most."
        )
    for name, found in visits.items():
        console.print(
            f"A visitor whose key allows {found.budget} images got {found.answered} from the "
            f"{name} server and was refused {found.refused} times."
        )
    counted = [line.queries[1] for line in lines]
    free = served["undefended"].latency_ms
    added = {name: f"{side.latency_ms / free - 1:+.1%}" for name, side in served.items()}
    console.print(
        f"{lines[0].queries[0]:,} queries each, counted by the servers as "
        f"{', '.join('not asked' if n is None else f'{n:,}' for n in counted)}.\n"
        f"A request's median latency changes by {added['defended']} (defended) and "
        f"{added['recommended']} (recommended).\n"
        f"{seconds:.0f} s; written: {out / 'demo.json'}, {out / 'demo.png'}"
    )


def plot(served: dict[str, ServerFigures], lines: list[Line], path: Path) -> None:
    """Stolen accuracy per attack; the served model's as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tests = list(lines[0].stolen)
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(lines)), layout="constrained")
    high = 0.8 / len(tests)
    colours = ["#1f4e79", "#e08e45"]
    for i, test in enumerate(tests):
        places = [-j - i * high for j in range(len(lines))]
        values = [100 * line.stolen[test] for line in lines]
        axis.barh(places, values, high * 0.92, color=colours[i], label=f"copy, on {test}")
        for place, value in zip(places, values, strict=True):
            axis.text(value - 1, place, f"{value:.1f}", va="center", ha="right", color="white")
        axis.axvline(
            100 * served["undefended"].accuracy[test],
            color=colours[i],
            linestyle=":",
            linewidth=1.2,
            label=f"served model, on {test}",
        )
    axis.set_yticks(
        [-j - high * (len(tests) - 1) / 2 for j in range(len(lines))], [line.name for line in lines]
    )
    axis.set_xlim(0, 100)
    axis.set_xlabel(f"accuracy, % ({lines[0].queries[0]:,} queries)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
