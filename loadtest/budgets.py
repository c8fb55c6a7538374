"""Simulates how wrong a budget can be when many replicas count it.

    python -m loadtest.budgets          writes loadtest/budgets.json and docs/budgets.png

Customers and a few thieves send requests to replicas that a load balancer picks at random. Each
client has the same budget in images. A request is served or refused as a whole. A client that is
refused sends single images from then on; a customer leaves when a single image is refused, a thief
never does. Halfway through, every replica is replaced once and loses what it had in memory.

| strategy | counts in                         | over the budget | left when refused   |
|----------|-----------------------------------|-----------------|---------------------|
| shared   | one store, at each request        | 0               | 0                   |
| leases   | leases of b images from one store | 0               | (R - 1 + X) (b - 1) |
| local    | each replica's own memory         | (R - 1 + X) B   | 0                   |

There are R replicas, of which X are replaced during the run, and a budget B. These are bounds
because:

- local: there were R + X counters, and each grants at most B.
- leases: the store never gives out more than B, and a lease is spent once. A lease is topped up
  only when it is too small for a request, so at most b - 1 images stay in it. When a single image
  is refused, the lease of its replica and the store are empty, so what is left is in the other
  R - 1 leases and in the X that were lost. It is never more than B.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from numpy.typing import NDArray

OUT = Path(__file__).with_suffix(".json")
PLOT = Path(__file__).parent.parent / "docs" / "budgets.png"
REPLICAS = (1, 2, 4, 8, 16)
LEASES = (10, 50)
LARGEST = 8  # images of a request


class Strategy(Protocol):
    """Where images are counted."""

    calls: int  # of the store

    def ask(self, replica: int, client: int, images: int) -> bool:
        """Whether the images are granted."""
        ...

    def replace(self, replica: int) -> None:
        """Forget what the replica had in memory."""
        ...


class Shared:
    """One store that counts each request, as `app.access.stores.redis` does."""

    def __init__(self, clients: int, replicas: int, budget: int) -> None:
        del replicas
        self.left = [budget] * clients
        self.calls = 0

    def ask(self, replica: int, client: int, images: int) -> bool:
        """Check and take in one step."""
        del replica
        self.calls += 1
        granted = images <= self.left[client]
        self.left[client] -= images * granted
        return granted

    def replace(self, replica: int) -> None:
        """Nothing to forget."""


class Local:
    """Each replica counts separately, as `memory://` would do."""

    def __init__(self, clients: int, replicas: int, budget: int) -> None:
        self.full = [budget] * clients
        self.left = [list(self.full) for _ in range(replicas)]
        self.calls = 0

    def ask(self, replica: int, client: int, images: int) -> bool:
        """Check the replica's own count."""
        left = self.left[replica]
        granted = images <= left[client]
        left[client] -= images * granted
        return granted

    def replace(self, replica: int) -> None:
        """Start counting at 0 again."""
        self.left[replica] = list(self.full)


class Leased:
    """Replicas take some images at a time from one store, and serve from these."""

    def __init__(self, clients: int, replicas: int, budget: int, lease: int) -> None:
        self.left = [budget] * clients
        self.leases = [[0] * clients for _ in range(replicas)]
        self.lease = lease
        self.calls = 0

    def ask(self, replica: int, client: int, images: int) -> bool:
        """Serve from the lease; top it up if it is too small."""
        leases = self.leases[replica]
        missing = images - leases[client]
        if missing > 0:
            self.calls += 1
            if missing > self.left[client]:
                return False
            taken = min(self.left[client], max(missing, self.lease))
            self.left[client] -= taken
            leases[client] += taken
        leases[client] -= images
        return True

    def replace(self, replica: int) -> None:
        """Lose the leases: the store does not know what was served from them."""
        self.leases[replica] = [0] * len(self.left)


@dataclass(frozen=True)
class Load:
    """Requests in the order of their times.

    Attributes:
        clients: how many there are; the first `thieves` of them never leave.
        thieves: how many.
        replicas: how many.
        client: who asks.
        replica: which replica is asked.
        images: how many images the client wants.
        replaced: replicas that are replaced before the request of this number.
    """

    clients: int
    thieves: int
    replicas: int
    client: NDArray[np.int64]
    replica: NDArray[np.int64]
    images: NDArray[np.int64]
    replaced: dict[int, list[int]]


def make_load(
    *, clients: int, thieves: int, replicas: int, budget: int, replace: bool, seed: int
) -> Load:
    """Thieves ask for more than all counters together could grant, customers for what they need."""
    random = np.random.default_rng(seed)
    counters = replicas * (2 if replace else 1)
    wants = random.geometric(2 / budget, clients)  # requests of a customer: some have plenty left
    wants[:thieves] = 3 * counters * budget
    client = np.repeat(np.arange(clients), wants)
    order = np.argsort(random.random(len(client)))
    n = len(client)
    replaced: dict[int, list[int]] = {}
    if replace:
        for replica, when in enumerate(np.linspace(0.45, 0.55, replicas) * n):
            replaced.setdefault(int(when), []).append(replica)
    return Load(
        clients,
        thieves,
        replicas,
        client[order],
        random.integers(0, replicas, n),
        random.integers(1, LARGEST + 1, n),
        replaced,
    )


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation.

    Attributes:
        served: images by client.
        left: images that a client's budget still had when it was refused a single one and left.
        answers: requests that were served.
        calls: of the store, for these.
    """

    served: NDArray[np.int64]
    left: NDArray[np.int64]
    answers: int
    calls: int


def simulate(strategy: Strategy, load: Load, budget: int) -> Outcome:
    """Process all requests in order."""
    served, left = [0] * load.clients, [0] * load.clients
    single, gone = [False] * load.clients, [False] * load.clients
    answers = calls = 0
    requests = zip(load.client.tolist(), load.replica.tolist(), load.images.tolist(), strict=True)
    for number, (client, replica, wanted) in enumerate(requests):
        for lost in load.replaced.get(number, ()):
            strategy.replace(lost)
        if gone[client]:
            continue
        images = 1 if single[client] else wanted
        before = strategy.calls
        if strategy.ask(replica, client, images):
            served[client] += images
            answers += 1
            calls += strategy.calls - before
        elif images > 1:
            single[client] = True
        elif client >= load.thieves:
            gone[client] = True
            left[client] = max(0, budget - served[client])
    return Outcome(np.array(served), np.array(left), answers, calls)


@dataclass(frozen=True)
class Row:
    """The result of one strategy with a number of replicas.

    Attributes:
        strategy: its name.
        lease: size of a lease, 0 where there are none.
        replicas: how many.
        replaced: how many of them were replaced during the run.
        worst_over: the most images that a client got beyond its budget.
        bound_over: what it cannot exceed.
        worst_left: the most images that a customer's budget had when they were refused.
        bound_left: what it cannot exceed.
        mean_left: over the customers who were refused.
        calls_per_answer: of the store.
    """

    strategy: str
    lease: int
    replicas: int
    replaced: int
    worst_over: int
    bound_over: int
    worst_left: int
    bound_left: int
    mean_left: float
    calls_per_answer: float


def bounds(strategy: str, lease: int, replicas: int, replaced: int, budget: int) -> tuple[int, int]:
    """Bounds on images over the budget, and on what is left when a client is refused one image."""
    others = replicas - 1 + replaced
    return others * budget * (strategy == "local"), min(budget, others * max(0, lease - 1))


def rows(
    clients: int, thieves: int, budget: int, replicas: Iterable[int], seed: int
) -> Iterator[Row]:
    """All strategies on the same requests, by number of replicas, with and without failures."""
    for count in replicas:
        for replace in (False, True):
            load = make_load(
                clients=clients, thieves=thieves, replicas=count, budget=budget,
                replace=replace, seed=seed,
            )  # fmt: skip
            replaced = count if replace else 0
            size = (clients, count, budget)
            tried: list[tuple[str, int, Strategy]] = [
                ("shared", 0, Shared(*size)),
                *(("leases", lease, Leased(*size, lease)) for lease in LEASES),
                ("local", 0, Local(*size)),
            ]
            for name, lease, strategy in tried:
                found = simulate(strategy, load, budget)
                over, left = bounds(name, lease, count, replaced, budget)
                refused = found.left[found.left > 0]
                yield Row(
                    strategy=name,
                    lease=lease,
                    replicas=count,
                    replaced=replaced,
                    worst_over=int(max(0, found.served.max() - budget)),
                    bound_over=over,
                    worst_left=int(found.left.max()),
                    bound_left=left,
                    mean_left=round(float(refused.mean()), 1) if refused.size else 0.0,
                    calls_per_answer=round(found.calls / found.answers, 3),
                )


def plot(document: dict[str, Any], path: Path) -> None:
    """Plot the worst client and the bound by number of replicas."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    budget = document["budget"]
    colours = {"shared": "#1b7837", "leases": "#2166ac", "local": "#c0392b"}
    panels = [("over", "times the budget", budget), ("left", "images left when refused", 1)]
    for axis, (what, label, unit) in zip(axes, panels, strict=True):
        names = sorted({(r["strategy"], r["lease"]) for r in document["rows"]})
        for name, lease in names:
            chosen = [
                r
                for r in document["rows"]
                if (r["strategy"], r["lease"]) == (name, lease) and r["replaced"]
            ]
            base = 1 if what == "over" else 0
            count = [r["replicas"] for r in chosen]
            words = f"{name} of {lease}" if lease else name
            style = {"color": colours[name], "alpha": 0.5 if lease == LEASES[0] else 1.0}
            worst = [base + r[f"worst_{what}"] / unit for r in chosen]
            bound = [base + r[f"bound_{what}"] / unit for r in chosen]
            axis.plot(count, worst, "o", label=words, **style)
            axis.plot(count, bound, ":", **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(document["replicas"], [str(n) for n in document["replicas"]])
        axis.set_xlabel("replicas, each replaced once")
        axis.set_ylabel(f"worst client: {label}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small", title="points: worst; dotted: bound")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command()
@click.option("--clients", default=10_000, show_default=True)
@click.option("--thieves", default=50, show_default=True)
@click.option("--budget", default=100, show_default=True, help="Images of each client.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), default=PLOT, show_default=True)
def main(clients: int, thieves: int, budget: int, seed: int, out: Path, picture: Path) -> None:
    """Run the simulation, write the JSON and the plot."""
    found = []
    for row in rows(clients, thieves, budget, REPLICAS, seed):
        found.append(asdict(row))
        click.echo(row)
    document = {
        "command": f"python -m loadtest.budgets --clients {clients} --thieves {thieves} "
        f"--budget {budget} --seed {seed}",
        "python": platform.python_version(),
        "packages": {"numpy": version("numpy")},
        "clients": clients,
        "thieves": thieves,
        "budget": budget,
        "largest_request": LARGEST,
        "replicas": list(REPLICAS),
        "rows": found,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    plot(document, picture)


if __name__ == "__main__":
    main()
