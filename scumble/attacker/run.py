"""One run: from a URL and a budget to a copy and its `result.json`.

A run has a folder: `job.json` (what was asked for), `journal.sqlite` (every answer), `copy.pt` and
`result.json`. The same job in the same folder goes on where it ended; another job is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx2
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from scumble.attacker import (
    adapt,
    attacks,
    consent,
    device,
    settings,
    students,
    template_transport,
    third_party,
    transfer,
)
from scumble.attacker.attacks import Attack
from scumble.attacker.errors import AttackError, OracleUnavailable, ResumeMismatch
from scumble.attacker.oracle import HttpOracle, Oracle
from scumble.attacker.pool import Pool, pool
from scumble.attacker.recipes import recipe
from scumble.attacker.result import (
    Chosen,
    Data,
    Ledgers,
    Machine,
    Point,
    Result,
    Scores,
    Student,
    Timing,
    Victim,
    write,
)
from scumble.attacker.third_party import short
from scumble.attacker.transports import TRANSPORTS, Probs
from scumble.data.image_sets import Dataset, numbered_as
from scumble.machine import keep_freed_memory, processor
from scumble.progress import showing


@dataclass(frozen=True)
class Job:
    """What to do. Everything that decides the copy is here.

    Attributes:
        url: of the service.
        attack: key of `ATTACKS`, or `FILE.py:Class`.
        budget: queries, in images.
        test: data set to measure on: a file, a folder or a name; a name means its test part.
        queries: data set to ask about; None for data-free attacks. A name means its training part.
        profile: `cpu` or `paper`.
        adapt: keys of `MODIFIERS`, or `FILE.py:Class`; the first is nearest to the service.
        changes: `name.field=value`; a name is `attack`, `fit` or a modifier.
        recipe: name in `recipes.toml`, whose student and fit are taken; `changes` come after it.
        student: key of `STUDENTS`, or `auto`: the recipe's, else one like the included victims'.
        weights: of the student to start from.
        transport: key of `TRANSPORTS`.
        template: TOML file that describes another API; then `transport` is not used.
        seed: of everything random.
        threads: of torch; another number gives another copy. 0 takes torch's own choice.
        root: folder with data sets by name.
        test_images: how many of the test set are used at most; 0 for all.
        batch: images of one request.
        connections: requests at a time.
        admin: URL of the admin port, to compare both ledgers.
        keys: file with API keys of one or several accounts, one a line, used by turns; the test
            images are asked about with the token in `headers`, where there is one.
    """

    url: str
    attack: str
    budget: int
    test: str
    queries: str | None = None
    profile: str = "cpu"
    adapt: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    recipe: str | None = None
    student: str = "auto"
    weights: Path | None = None
    transport: str = "png"
    template: Path | None = None
    seed: int = 0
    threads: int = 0
    root: Path | None = None
    test_images: int = 0
    batch: int = 256
    connections: int = 8
    admin: str | None = None
    keys: Path | None = None


def run(
    job: Job,
    out: Path,
    *,
    command: str,
    headers: Mapping[str, str] | None = None,
    progress: bool = False,
    wrap: Callable[[Oracle], Oracle] = lambda oracle: oracle,
) -> Result:
    """Do a job.

    Args:
        job: what to do.
        out: folder of the run; made if it is not there.
        command: that started it, for the result.
        headers: sent with every request, as `consent.check` gives them.
        progress: show a bar with queries per second.
        wrap: wraps the oracle below the modifiers; the referee records answers with it.

    Raises:
        AttackError: what was wrong, with which value, and what is allowed.
        DatasetError: a data set cannot be read.
    """
    clock, started = time.perf_counter(), datetime.now(UTC)
    attack, modifiers = configure(job)
    files = {
        file: digest
        for name in (job.attack, *job.adapt)
        for file, digest in third_party.hashes(name).items()
    }
    described = template_transport.load(job.template) if job.template else None
    with third_party.blamed(job.attack):
        attack.check(job.budget, images=job.queries is not None)
        # The result holds them: what cannot be written there must not cost queries first.
        json.dumps(dataclasses.asdict(attack))  # type: ignore[call-overload] # all attacks are dataclasses
    require_data(job, modifiers)
    keep_freed_memory()
    if job.threads:
        torch.set_num_threads(job.threads)
    claim(job, out)

    keys = keys_of(job.keys)

    def open_oracle(
        budget: int, journal: Path, progress: bool, keys: Sequence[str], partial: bool
    ) -> HttpOracle:
        return HttpOracle(
            job.url,
            budget=budget,
            transport=described.transport if described else job.transport,
            model=described.model if described else None,
            headers=headers,
            keys=keys,
            partial=partial,
            batch=job.batch,
            connections=job.connections,
            journal=journal,
            progress=progress,
        )

    with open_oracle(job.budget, out / "journal.sqlite", progress, keys, True) as oracle:
        whole = data(job.test, "test", job.root, job.test_images)
        test_data = numbered_as(whole, oracle.model["labels"])
        test = pool(test_data, oracle.shape)
        own_data = None if job.queries is None else data(job.queries, "train", job.root)
        own = pool(own_data, oracle.shape) if own_data else None
        student = students.make(
            student_of(job), oracle.shape, oracle.labels, seed=job.seed, weights=job.weights
        )
        own_keys = [] if headers else keys  # the owner's token has no budget to be spent
        with open_oracle(len(test), out / "test.sqlite", False, own_keys, False) as examiner:
            # Asked before the server's count is read: these do not belong to the budget.
            truth = Examination(test, examiner(test.images))
        before = first_count(job.admin, out)

        def watch(queries: int, copy: nn.Module) -> None:
            # An attack does not tell what the service refused from what a modifier threw away.
            truth(min(queries, oracle.ledger.spent), copy)

        with showing(progress), third_party.blamed(job.attack, *job.adapt):
            attack(adapt.apply(modifiers, wrap(oracle), student), student, own, watch)
        counted = None if before is None else count(job.admin) - before
        students.save(student, out / "copy.pt")
        result = Result(
            scumble=version("scumble"),
            command=command,
            started=started,
            victim=victim(job, oracle),
            attack=Chosen(name=job.attack, settings=dataclasses.asdict(attack)),  # type: ignore[call-overload] # all attacks are dataclasses
            profile=job.profile,
            adapt=tuple(
                Chosen(name=name, settings=dataclasses.asdict(modifier))  # type: ignore[call-overload] # all modifiers are dataclasses
                for name, modifier in zip(job.adapt, modifiers, strict=True)
            ),
            transport=oracle.transport.name,
            step=oracle.step,
            seeds={"attack": job.seed, "student": job.seed},
            files=files,
            queries=described_data(own_data) if own_data else None,
            test=described_data(test_data),
            student=described_student(job, student, out / "copy.pt"),
            ledger=ledgers(oracle, counted, len(test)),
            timing=timing(oracle, time.perf_counter() - clock),
            scores=truth.scores(student),
            curve=tuple(truth.curve),
            machine=Machine(
                processor=processor(),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                gpu=device.gpu(),
            ),
        )
    write(result, out / "result.json")
    return result


class Examination:
    """Scores copies against the labels and against the answers of the service.

    Called by attacks as their `watch`, it keeps the curve.
    """

    def __init__(self, test: Pool, answers: Probs) -> None:
        self._test = test
        self._served = answers.argmax(1)
        self.curve: list[Point] = []

    def __call__(self, queries: int, student: nn.Module) -> None:
        """Add a point to the curve."""
        scores = self.scores(student)
        self.curve.append(
            Point(queries=queries, accuracy=scores.accuracy, agreement=scores.agreement)
        )

    def scores(self, student: nn.Module) -> Scores:
        """All scores of a copy."""
        copied = students.predict(student, self._test.images).argmax(1)
        return Scores(
            victim_accuracy=float((self._served == self._test.labels).mean()),
            accuracy=float((copied == self._test.labels).mean()),
            agreement=float((copied == self._served).mean()),
        )


def configure(job: Job) -> tuple[Attack, list[adapt.Modifier]]:
    """The attack and the modifiers with the job's changes.

    Raises:
        AttackError: a name, a field or a value is not allowed.
    """
    changes = settings.parse(job.changes)
    attack = attacks.make(job.attack, job.profile, seed=job.seed)
    own = changes.pop("fit", {})
    if fit := {**(recipe(job.recipe).fit if job.recipe else {}), **own}:
        if not hasattr(attack, "fitting"):
            given = "set attack.… instead" if own else "leave out --recipe"
            raise AttackError(f"{job.attack} does not fit a transfer set: {given}")
        fitting = settings.replace(attack.fitting, "fit", fit)
        attack = dataclasses.replace(attack, fitting=fitting)  # type: ignore[type-var] # same
    attack = settings.replace(attack, "attack", changes.pop("attack", {}))
    if twice := repeated(job.adapt):
        raise AttackError(f"modifier {twice!r} is given twice; allowed: once")
    names = ["attack", "fit", *map(short, job.adapt)]
    if twice := repeated(names):
        raise AttackError(f"{twice!r} would be two things to --set; rename a class of yours")
    if "diluted" in job.adapt and job.root:
        changes["diluted"] = {"root": str(job.root)} | changes.get("diluted", {})
    modifiers = [adapt.make(name, **changes.pop(short(name), {})) for name in job.adapt]
    if changes:
        raise AttackError(
            f"unknown name {next(iter(changes))!r} in --set; allowed: {', '.join(names)}"
        )
    if getattr(attack, "rounds", 0):
        adapt.check_again(job.adapt)
    if job.template is None and job.transport not in TRANSPORTS:
        raise AttackError(f"transport is {job.transport!r}; allowed: {', '.join(TRANSPORTS)}")
    return attack, modifiers


def repeated(names: Sequence[str]) -> str | None:
    """The first name that is there twice."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def require_data(job: Job, modifiers: Sequence[adapt.Modifier]) -> None:
    """Check that the job's data sets are there, before anything is asked.

    Raises:
        AttackError: a modifier names none where it needs one.
        DatasetError: one is not there.
    """
    transfer.require_labelled(job.test, "test", job.root)
    if job.queries is not None:
        transfer.require_data(job.queries, "train", job.root)
    for modifier in modifiers:
        if isinstance(modifier, adapt.Diluted):
            modifier.require_data()


def keys_of(file: Path | None) -> list[str]:
    """API keys of a file, one a line.

    Raises:
        AttackError: it is not text.
    """
    try:
        return file.read_text("ascii").split() if file else []
    except ValueError as exc:
        raise AttackError(f"--keys is {str(file)!r}; allowed: a file of ASCII text") from exc


def student_of(job: Job) -> str:
    """Key of `STUDENTS`, or `auto`."""
    return recipe(job.recipe).student if job.recipe and job.student == "auto" else job.student


def make_folder(out: Path) -> None:
    """Make the folder that `--out` names, if it is not there.

    Raises:
        AttackError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise AttackError(f"--out is {str(out)!r}, which cannot be made: {reason}") from exc


def claim(job: Job, out: Path) -> None:
    """Make the folder this job's.

    Raises:
        ResumeMismatch: it is another job's, or this job is done.
        AttackError: it cannot be made.
    """
    make_folder(out)
    wanted = json.loads(json.dumps(dataclasses.asdict(job), default=str))
    note = out / "job.json"
    if not note.exists():
        note.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    found = json.loads(note.read_text())
    if different := [key for key in wanted if found.get(key) != wanted[key]]:
        key = different[0]
        raise ResumeMismatch(
            f"{str(out)!r} holds another run: its {key} is {found.get(key)!r}, "
            f"not {wanted[key]!r}; name another folder with --out"
        )
    if (out / "result.json").exists():
        raise ResumeMismatch(f"{str(out)!r} holds this run, done; name another folder with --out")


def data(source: str, split: str, root: Path | None, limit: int = 0) -> Dataset:
    """A data set, as `scumble.attacker.transfer` reads it.

    At most `limit` images of it where that is above 0: the first, and of a set that is sorted by
    class, such as a folder, ones at equal distances.
    """
    found = transfer.data(source, split, root)
    if not 0 < limit < len(found):
        return found
    in_order = (np.diff(found.labels) >= 0).all()
    rows = np.linspace(0, len(found) - 1, limit).astype(np.int64) if in_order else np.arange(limit)
    return found.subset(rows)


def count(admin: str | None) -> int:
    """Images that the service has answered, by its own count."""
    families = text_string_to_metric_families(_metrics(admin or ""))
    samples = [sample for family in families for sample in family.samples]
    return int(sum(s.value for s in samples if s.name == "scumble_images_total"))


def first_count(admin: str | None, out: Path) -> int | None:
    """The service's count when this run first started; kept in the folder."""
    if admin is None:
        return None
    note = out / "server_count.json"
    if not note.exists():
        note.write_text(json.dumps(count(admin)))
    first: int = json.loads(note.read_text())
    return first


def victim(job: Job, oracle: HttpOracle) -> Victim:
    """What is known of the victim."""
    info: dict[str, str] = {}
    if job.admin:
        families = text_string_to_metric_families(_metrics(job.admin))
        (info,) = [s.labels for f in families for s in f.samples if s.name == "scumble_model_info"]
    document = json.dumps(oracle.model, sort_keys=True).encode()
    return Victim(
        url=job.url,
        name=oracle.model["name"],
        version=oracle.model["version"],
        labels=oracle.labels,
        shape=oracle.shape,
        document_sha256=hashlib.sha256(document).hexdigest(),
        sha256=info.get("sha256"),
        precision=info.get("precision"),
        defense=info.get("defense"),
    )


def described_data(found: Dataset) -> Data:
    """A data set as the result has it."""
    digest = hashlib.sha256(found.images.tobytes() + found.labels.tobytes()).hexdigest()
    return Data(name=found.name, images=len(found), sha256=digest)


def described_student(job: Job, student: nn.Module, file: Path) -> Student:
    """The copy as the result has it."""
    return Student(
        name=student_of(job),
        parameters=sum(weight.numel() for weight in student.parameters()),
        started_from=str(job.weights) if job.weights else None,
        file=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def ledgers(oracle: HttpOracle, server: int | None, test: int) -> Ledgers:
    """Both counts; a service that was restarted has lost its own."""
    own = oracle.ledger
    server = server if server is not None and server >= 0 else None
    return Ledgers(
        budget=oracle.budget,
        answered=own.answered,
        lost=own.lost,
        replayed=own.replayed,
        spent=own.spent,
        refused_requests=own.refused,
        sent_bytes=own.sent_bytes,
        received_bytes=own.received_bytes,
        server=server,
        difference=None if server is None else own.spent - server,
        test=test,
        ended=oracle.ended,
    )


def timing(oracle: HttpOracle, wall_s: float) -> Timing:
    """Seconds, and images per second of those that were asked now."""
    own = oracle.ledger
    asked = own.answered - own.replayed
    return Timing(
        wall_s=wall_s,
        asking_s=own.seconds,
        queries_per_s=asked / own.seconds if asked else None,
    )


def _metrics(admin: str) -> str:
    try:
        with httpx2.Client(timeout=10, transport=consent.transport(admin)) as client:
            response = client.get(f"{admin}/metrics")
        response.raise_for_status()
    except (httpx2.HTTPError, ImportError) as exc:  # ImportError: a SOCKS proxy
        raise OracleUnavailable(f"no metrics at {admin}: {exc}") from exc
    return response.text
