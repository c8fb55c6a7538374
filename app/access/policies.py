"""The keys of a file -> what the service needs of them: grants with their defenses built."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from app.access.grants import Grant, Grants
from app.access.keys import Key, KeyFile, Output, refuse_contradictions
from app.access.quotas import client_buckets
from app.access.stores import Bucket
from app.errors import ConfigError
from scumble.defenses import Defense, DefenseError
from scumble.defenses.base import Inputs, Probs
from scumble.defenses.chain import Chain
from scumble.defenses.label import Label
from scumble.defenses.round import Round
from scumble.defenses.top_k import TopK

Configure = Callable[[str, Mapping[str, Any]], Defense]


class Policies:
    """Builds grants; each distinct defense is made once, and kept while a key names it.

    Args:
        configure: makes a defense; raises DefenseError.
        server: name and parameters of the server's own defense.
        default: that defense.
        common: the buckets of all clients together.
        sizes: of the batches that each new defense answers before it counts.
        limit_s: how long it may take for one of them.
        clock: of these seconds.
    """

    def __init__(
        self,
        configure: Configure,
        *,
        server: tuple[str, Mapping[str, Any]],
        default: Defense,
        common: tuple[Bucket, ...] = (),
        sizes: Sequence[int] = (1,),
        limit_s: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._configure = configure
        self._server_name = server[0]
        self._server = _identity(*server)
        self._common = common
        self._built = {self._server: default}
        self._sizes = sizes
        self._limit_s = limit_s
        self._clock = clock
        self._examples: list[tuple[Inputs, Probs]] = []
        self._turn = threading.Lock()  # keys are read on a thread

    def __call__(self, file: KeyFile) -> Grants:
        """The grants of all keys of a file.

        Raises:
            ConfigError: a key names a defense that cannot be made, or two contradict each other;
                says which and why.
        """
        refuse_contradictions(file)
        with self._turn:
            built = {self._server: self._built[self._server]}
            grants = {bytes.fromhex(key.sha256): self._grant(key, built) for key in file.keys}
            self._built = built  # only now: whatever was raised leaves the old ones
            return grants

    def serve(self, images: Inputs, rows: Probs) -> None:
        """From now on images of this form are served: warm the keys' defenses up for them.

        What a defense loads or compiles for its first batch is there before any client asks; call
        this on a thread. The server's own defense is warmed up with its engine.

        Args:
            images: one or more, pixels or tensors.
            rows: their clean probabilities.

        Raises:
            ConfigError: a defense cannot answer them.
        """
        with self._turn:
            self._examples.append((images, rows))
            for identity, defense in self._built.items():
                if identity != self._server:
                    try:
                        self._warm_up(defense, images, rows)
                    except DefenseError as exc:
                        raise ConfigError(f"defense {defense!r}: {exc}") from exc

    def _made(self, key: Key) -> Defense:
        assert key.defense is not None  # noqa: S101  # the server's own is there
        defense = self._configure(key.defense, key.defense_params)
        for images, rows in self._examples:
            self._warm_up(defense, images, rows)
        return defense

    def _warm_up(self, defense: Defense, images: Inputs, rows: Probs) -> None:
        """Answer batches of each size.

        Raises:
            DefenseError: it cannot, or takes too long, and not only the first time.
        """
        for size in self._sizes:
            batch, clean = images[:1].repeat(size, 0), rows[:1].repeat(size, 0)
            if self._seconds(defense, clean, batch) <= self._limit_s:
                continue
            seconds = self._seconds(defense, clean, batch)  # without what it loaded
            if seconds > self._limit_s:
                raise DefenseError(
                    f"takes {seconds:.2g} s for {size} image(s); allowed: {self._limit_s:.2g} s, "
                    "1/4 of SCUMBLE_WATCHDOG_S"
                )

    def _seconds(self, defense: Defense, rows: Probs, images: Inputs) -> float:
        start = self._clock()
        try:
            defense(rows, images)
        except Exception as exc:  # whatever it is, clients would meet it
            raise DefenseError(f"fails on {len(rows)} image(s): {exc!r}") from exc
        return self._clock() - start

    def _grant(self, key: Key, built: dict[bytes, Defense]) -> Grant:
        limits = key.limits
        return Grant(
            id=key.id,
            client=key.client,
            policy=self._name(key),
            digest=bytes.fromhex(key.sha256),
            revoked=key.revoked is not None,
            routes=key.routes,
            # A revoked key asks nothing: what it named may be gone.
            defense=None if key.revoked else self._defense(key, built),
            buckets=client_buckets(
                key.client, limits.window_images, limits.window_s, limits.total_images
            )
            + self._common,
            closed=key.on_store_failure == "closed",
        )

    def _name(self, key: Key) -> str:
        """Of the key's defense and output together: `dcp+top_k`."""
        name = key.defense or self._server_name
        return name if key.output.form == "full" else f"{name}+{key.output.form}"

    def _defense(self, key: Key, built: dict[bytes, Defense]) -> Defense | None:
        """The key's defense and output as one; None if that is the server's defense alone."""
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
