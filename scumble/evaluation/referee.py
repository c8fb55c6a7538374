"""Runs one cell against real servers over HTTP: top to bottom, from a cell to its record.

Two servers with the same model are started, one undefended for comparison (never attacked), one as
the cell wants it. Afterwards nothing of the attacker's is used but its copy and what it was told.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scumble.attacker import consent, students
from scumble.attacker.adapt.abstention_filter import withheld
from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import HttpOracle, Oracle
from scumble.attacker.pool import pool
from scumble.attacker.run import Job, data, run
from scumble.attacker.transports import Images, Probs
from scumble.client.http_client import Client
from scumble.data.image_sets import Dataset, numbered_as
from scumble.evaluation import scores
from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.failures import failure
from scumble.evaluation.local_server import Server, serving
from scumble.evaluation.record import Percentile, Record, Transfer, Utility
from scumble.progress import reporting, to_file

SAMPLE = 2000  # of the queries, for what the attacker was told
PROGRESS = "progress"  # file in the cell's folder: how far it has come
Marked = npt.NDArray[np.bool_]
PERCENTILES: tuple[Percentile, ...] = ("p50", "p99")
REQUESTS = 200  # for the latency, to each server
UNTIMED = 10  # before them


def judge(
    cell: Cell,
    folder: Path,
    *,
    root: Path | None,
    command: str,
    threads: int = 1,
    headers: dict[str, str] | None = None,
    progress: bool = False,
) -> Record:
    """Run a cell; `folder` gets the attack's files and `record.json`.

    Args:
        cell: what to do.
        folder: emptied first.
        root: folder with data sets by name.
        command: that started it, for the record.
        threads: of torch.
        headers: for a defense at a URL, as `scumble.attacker.consent.check` gives them.
        progress: show a bar with queries per second.

    Raises:
        AttackError, DatasetError: what was wrong, with which value, and what is allowed.
        RuntimeError: a server did not start; the message has its log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = to_file(folder / PROGRESS)
    report("starting servers", 0, 1)
    test = data(cell.test or cell.victim, "test", root, cell.test_images)
    with ExitStack() as stack:
        if not progress:
            stack.enter_context(reporting(report))
        clean = stack.enter_context(server(cell, Defended()))
        test = numbered_as(test, labels_of(clean))
        if cell.defense.url:
            url, admin = cell.defense.url, None
        else:
            attacked = stack.enter_context(server(cell, cell.defense))
            url, admin = attacked.url, attacked.admin
        served = compare(url, clean.url, test, headers)
        recorders: list[Recorder] = []

        def recording(oracle: Oracle) -> Oracle:
            recorders.append(Recorder(oracle, SAMPLE, cell.seed))
            return recorders[-1]

        asked = job(cell, url, admin, root, threads)
        if "oracle_mask" in cell.adapt:
            asked = replace(asked, changes=(*asked.changes, f"oracle_mask.clean={clean.url}"))
        result = run(
            asked,
            folder,
            command=command,
            headers=headers,
            progress=progress,
            wrap=recording,
        )
        if result.ledger.ended:
            raise AttackError(
                f"{result.ledger.answered} of {result.ledger.budget} images were answered: "
                f"{result.ledger.ended}; needed: an account without a budget"
            )
        images, answers = recorders[0].sample()
        truth = ask(clean.url, images, None)
        sha256 = model_sha256(clean)
    copy = students.make(
        result.student.name, result.victim.shape, result.victim.labels, seed=0,
        weights=folder / result.student.file,
    )  # fmt: skip
    copied = students.predict(copy, pool(test, result.victim.shape).images)
    distances = scores.l1(answers, truth)
    said = ~withheld(answers)
    true = share(said, answers, truth)
    record = Record(
        command=command,
        cell=cell.described(),
        model_sha256=sha256,
        transport=result.transport,
        seeds=result.seeds,
        served=served,
        transfer=Transfer(
            images=len(images),
            l1_mean=float(distances.mean()),
            l1_max=float(distances.max()),
            top1_changed=1 - true,
            agreement=share(said, students.predict(copy, images), answers),
            answered=float(said.mean()),
            true=true,
            bits=scores.bits(answers),
        ),
        attack=result,
        attack_failed=failure(
            copied, test.labels, result.curve, undefended=cell.defense == Defended()
        ),
        secret="unknown" if cell.defense.url else "drawn",
    )
    part = folder / "record.part"
    part.write_text(record.model_dump_json(indent=1) + "\n")
    part.replace(folder / "record.json")
    return record


class Recorder:
    """An oracle that keeps a uniform sample of what was asked and answered."""

    def __init__(self, inner: Oracle, size: int, seed: int) -> None:
        self.labels, self.shape, self.step = inner.labels, inner.shape, inner.step
        self._inner = inner
        self._rng = np.random.default_rng(seed)
        self._images = np.empty((size, *inner.shape), np.float32)
        self._answers = np.empty((size, inner.labels), np.float32)
        self._seen = 0

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self._inner.remaining

    def __call__(self, images: Images) -> Probs:
        """The inner oracle's answers."""
        answers = self._inner(images)
        # Reservoir sampling: the i-th image ever asked takes a place among the first i.
        ranks = self._seen + np.arange(len(images))
        places = np.where(ranks < len(self._images), ranks, self._rng.integers(0, ranks + 1))
        for i in np.flatnonzero(places < len(self._images)):
            self._images[places[i]], self._answers[places[i]] = images[i], answers[i]
        self._seen += len(images)
        return answers

    def sample(self) -> tuple[Images, Probs]:
        """Images (n, C, H, W) and their answers (n, K)."""
        n = min(self._seen, len(self._images))
        return self._images[:n], self._answers[:n]


def server(cell: Cell, defense: Defended) -> AbstractContextManager[Server]:
    """A server of the cell's model; `victim` is a bundle's name or its folder."""
    folder = Path(cell.victim)
    place = {"model": folder.name, "model_dir": folder.parent} if folder.is_dir() else {}
    return serving(
        **{"model": cell.victim, **place},
        precision=cell.precision,
        workers=1,
        defense=defense.name,
        defense_params=dict(defense.params),
    )


def job(cell: Cell, url: str, admin: str | None, root: Path | None, threads: int) -> Job:
    """The cell's attack as a job."""
    return Job(
        url,
        cell.attack,
        cell.budget,
        test=cell.test or cell.victim,
        queries=cell.queries,
        profile=cell.profile,
        adapt=cell.adapt,
        changes=cell.changes,
        student=cell.student,
        recipe=cell.recipe,
        transport=cell.transport,
        seed=cell.seed,
        threads=threads,
        root=root,
        test_images=cell.test_images,
        admin=admin,
    )


def ask(url: str, images: Images, headers: Mapping[str, str] | None) -> Probs:
    """Answers (N, K), outside of any budget."""
    with HttpOracle(url, budget=len(images), transport="pixels", headers=headers) as oracle:
        return oracle(images)


def compare(url: str, clean_url: str, test: Dataset, headers: dict[str, str] | None) -> Utility:
    """What honest users get from `url`, beside the undefended `clean_url`."""
    with HttpOracle(clean_url, budget=len(test), transport="pixels") as oracle:
        images = pool(test, oracle.shape).images
        clean = oracle(images)
    rows = ask(url, images, headers)
    distances = scores.l1(rows, clean)
    said = ~withheld(rows)
    latency = latencies({"served": url, "clean": clean_url}, test, REQUESTS, headers=headers)
    return Utility(
        images=len(test),
        accuracy=float((said & (rows.argmax(1) == test.labels)).mean()),
        clean_accuracy=scores.accuracy(clean, test.labels),
        top1_changed=1 - share(said, rows, clean),
        l1_mean=float(distances.mean()),
        l1_max=float(distances.max()),
        kl=scores.kl(rows, clean),
        calibration_error=scores.calibration_error(rows[said], test.labels[said]),
        clean_calibration_error=scores.calibration_error(clean, test.labels),
        latency_ms=latency["served"],
        added_ms={p: latency["served"][p] - latency["clean"][p] for p in PERCENTILES},
        answered=float(said.mean()),
        ranking=scores.ranking(rows[said], test.labels[said]),
        clean_ranking=scores.ranking(clean, test.labels),
    )


def share(said: Marked, one: Probs, other: Probs) -> float:
    """Share of all rows that are marked and have the same label in both."""
    return float((said & (one.argmax(1) == other.argmax(1))).mean())


def latencies(
    urls: dict[str, str],
    test: Dataset,
    requests: int,
    *,
    headers: Mapping[str, str] | None = None,
) -> dict[str, dict[Percentile, float]]:
    """p50 and p99 in ms of single PNG requests to each URL, by turns."""
    token = (headers or {}).get("Authorization", "").removeprefix("Bearer ")
    found: dict[str, list[float]] = {name: [] for name in urls}
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(
                Client(url, key=token or None, transport=consent.transport(url))
            )
            for name, url in urls.items()
        }
        for i in range(requests + UNTIMED):
            for name, client in clients.items():
                start = time.perf_counter()
                client.predict(test.images[i % len(test)])
                found[name].append(time.perf_counter() - start)
    return {
        name: {p: 1000 * float(np.percentile(values[UNTIMED:], int(p[1:]))) for p in PERCENTILES}
        for name, values in found.items()
    }


def labels_of(clean: Server) -> tuple[str, ...]:
    """The labels of the served model."""
    with Client(clean.url, transport=consent.transport(clean.url)) as client:
        return tuple(client.model().labels)


def model_sha256(clean: Server) -> str:
    """Of the ONNX file that is served, by the server's own word."""
    (info,) = [name for name in clean.metrics() if name.startswith("scumble_model_info")]
    return info.partition('sha256="')[2].partition('"')[0]
