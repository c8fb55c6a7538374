"""The keys of a file -> what the service needs of them: grants with their defenses built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from app.defenses import Defense, DefenseError
from app.defenses.chain import Chain
from app.defenses.label import Label
from app.defenses.round import Round
from app.defenses.top_k import TopK
from app.errors import ConfigError
from app.grants import Grant, Grants
from app.keys import Key, KeyFile, Output, refuse_contradictions
from app.quota import client_buckets
from app.stores import Bucket

Configure = Callable[[str, Mapping[str, Any]], Defense]


class Policies:
    """Builds grants; each distinct defense is made once, and kept while a key names it.

    Args:
        configure: makes a defense; raises DefenseError.
        server: name and parameters of the server's own defense.
        default: that defense.
        common: the buckets of all clients together.
    """

    def __init__(
        self,
        configure: Configure,
        *,
        server: tuple[str, Mapping[str, Any]],
        default: Defense,
        common: tuple[Bucket, ...] = (),
    ) -> None:
        self._configure = configure
        self._server_name = server[0]
        self._server = _identity(*server)
        self._common = common
        self._built = {self._server: default}

    def __call__(self, file: KeyFile) -> Grants:
        """The grants of all keys of a file.

        Raises:
            ConfigError: a key names a defense that cannot be made, or two contradict each other;
                says which and why.
        """
        refuse_contradictions(file)
        built = {self._server: self._built[self._server]}
        grants = {bytes.fromhex(key.sha256): self._grant(key, built) for key in file.keys}
        self._built = built  # only now: whatever was raised leaves the old ones
        return grants

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
            assert key.defense is not None  # noqa: S101  # the server's own is there
            try:
                built[identity] = self._built.get(identity) or self._configure(
                    key.defense, key.defense_params
                )
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
