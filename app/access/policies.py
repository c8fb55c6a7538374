"""Builds grants, with their defenses, from a file of keys."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from app.access.grants import Grant, Grants
from app.access.keys import Key, KeyFile, Output, refuse_contradictions
from app.access.quotas import client_buckets
from app.access.stores import Bucket
from app.errors import ConfigError
from scumble.defenses import Defense, DefenseError
from scumble.defenses.base import Inputs, Probs
from scumble.defenses.chain import Chain
from scumble.defenses.evidence import Evidence, Score
from scumble.defenses.label import Label
from scumble.defenses.round import Round
from scumble.defenses.top_k import TopK

Configure = Callable[[str, Mapping[str, Any]], Defense]


class Policies:
    """Builds grants. Each distinct defense is made once and kept while a key names it.

    Args:
        configure: makes a defense; raises DefenseError.
        server: name and parameters of the server's defense.
        default: that defense.
        shared: the buckets that all clients share.
        sizes: batch sizes that each new defense is warmed up with.
        limit_s: seconds that engine and defense together may take for a batch.
        clock: seconds.
    """

    def __init__(
        self,
        configure: Configure,
        *,
        server: tuple[str, Mapping[str, Any]],
        default: Defense,
        shared: tuple[Bucket, ...] = (),
        sizes: Sequence[int] = (1,),
        limit_s: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._configure = configure
        self._server_name = server[0]
        self._server = _identity(*server)
        self._shared = shared
        self._built = {self._server: default}
        self._sizes = sizes
        self._limit_s = limit_s
        self._clock = clock
        self._examples: list[_Example] = []
        self._lock = threading.Lock()  # keys are loaded on a thread

    def __call__(self, file: KeyFile) -> Grants:
        """Build the grants of all keys of a file.

        Raises:
            ConfigError: a key names a defense that cannot be made, or two keys contradict each
                other.
        """
        refuse_contradictions(file)
        with self._lock:
            built = {self._server: self._built[self._server]}
            grants = {bytes.fromhex(key.sha256): self._grant(key, built) for key in file.keys}
            self._built = built  # only now: an error keeps the old ones
            return grants

    def warm_up(
        self,
        images: Inputs,
        rows: Probs,
        engine_s: float = 0.0,
        evidence: Callable[[frozenset[Score]], Evidence] | None = None,
    ) -> None:
        """Warm up the defenses of keys, present and future, for one form of images.

        A defense may load or compile something for its first batch, so this may be slow. The
        server's defense is warmed up with its engine.

        Args:
            images: one or more, pixels or tensors.
            rows: their clean probabilities.
            engine_s: seconds that the engine takes for the largest batch.
            evidence: of the images, with the scores that it is asked for; None for no scores.

        Raises:
            ConfigError: a defense fails on the images or is too slow, or needs scores that the
                network does not have.
        """
        with self._lock:
            example = _Example(images, rows, engine_s, evidence or (lambda _: Evidence.of(rows)))
            self._examples.append(example)
            for identity, defense in self._built.items():
                if identity != self._server:
                    try:
                        self._warm_up(defense, example)
                    except DefenseError as exc:
                        raise ConfigError(f"defense {defense!r}: {exc}") from exc

    def _made(self, key: Key) -> Defense:
        assert key.defense is not None  # noqa: S101  # the server's defense is always built
        defense = self._configure(key.defense, key.defense_params)
        for example in self._examples:
            self._warm_up(defense, example)
        return defense

    def _warm_up(self, defense: Defense, example: _Example) -> None:
        """Answer batches of each size.

        Raises:
            DefenseError: the defense fails, or is too slow on its second run as well.
        """
        images, rows, engine_s, examine = example
        allowed_s = self._limit_s - engine_s
        evidence = examine(defense.needs) if defense.withholds else None
        for size in self._sizes:
            batch, clean = images[:1].repeat(size, 0), rows[:1].repeat(size, 0)
            known = None if evidence is None else evidence.first(size)
            if self._seconds(defense, clean, batch, known) <= allowed_s:
                continue
            # The first run may load something.
            seconds = self._seconds(defense, clean, batch, known)
            if seconds > allowed_s:
                raise DefenseError(
                    f"takes {seconds:.2g} s for {size} image(s), and the engine {engine_s:.2g} s; "
                    f"allowed: {self._limit_s:.2g} s together, 1/4 of SCUMBLE_WATCHDOG_S"
                )

    def _seconds(
        self, defense: Defense, rows: Probs, images: Inputs, evidence: Evidence | None
    ) -> float:
        start = self._clock()
        try:
            defense.answer(rows, images, evidence)
        except Exception as exc:  # any error here would fail the requests of clients
            raise DefenseError(f"fails on {len(rows)} image(s): {exc!r}") from exc
        return self._clock() - start

    def _grant(self, key: Key, built: dict[bytes, Defense]) -> Grant:
        return Grant(
            id=key.id,
            client=key.client,
            policy=self._name(key),
            digest=bytes.fromhex(key.sha256),
            revoked=key.revoked is not None,
            routes=key.routes,
            # A revoked key is never served, and its defense may not exist any more.
            defense=None if key.revoked else self._defense(key, built),
            buckets=client_buckets(key.client, key.limits) + self._shared,
            closed=key.on_store_failure == "closed",
        )

    def _name(self, key: Key) -> str:
        """Name the key's defense and output: `dcp+top_k`."""
        name = key.defense or self._server_name
        return name if key.output.form == "full" else f"{name}+{key.output.form}"

    def _defense(self, key: Key, built: dict[bytes, Defense]) -> Defense | None:
        """Combine the key's defense and output; None if that is just the server's defense."""
        identity = (
            self._server if key.defense is None else _identity(key.defense, key.defense_params)
        )
        if identity not in built:
            try:
                built[identity] = self._built.get(identity) or self._made(key)
            except DefenseError as exc:
                raise ConfigError(f"key {key.id!r}: defense {key.defense!r}: {exc}") from exc
        output = _output(key.output)
        if output is None:
            return None if identity == self._server else built[identity]
        return Chain(steps=(built[identity], output))


class _Example(NamedTuple):
    images: Inputs
    rows: Probs
    engine_s: float
    evidence: Callable[[frozenset[Score]], Evidence]


def _identity(name: str, params: Mapping[str, Any]) -> bytes:
    return orjson.dumps([name, params], option=orjson.OPT_SORT_KEYS)


def _output(output: Output) -> Defense | None:
    match output:
        case Output(form="top_k", k=int(k)):
            return TopK(k=k)
        case Output(form="rounded", decimals=int(decimals)):
            return Round(decimals=decimals)
        case Output(form="label"):
            return Label()
    return None
