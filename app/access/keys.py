"""API keys at rest: a JSON file with the SHA-256 of each key and what it allows.

A key is 256 random bits. A slow hash protects passwords, which can be guessed; 256 random bits
cannot, so one SHA-256 is enough. It costs a request a microsecond instead of a tenth of a second,
which anyone could make the server spend. The file is replaced atomically and is readable by its
owner only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import ConfigError
from app.system.json_values import Parameters
from app.system.timestamps import timestamp
from app.system.validation import sentence

PREFIX = "scumble_"  # lets scanners for leaked secrets find one
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Images = Annotated[int, Field(ge=0, le=10**12)]


class Member(BaseModel):
    """A part of the key file; unknown members are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Output(Member):
    """How much of an answer the client sees, after the defense."""

    form: Literal["full", "top_k", "rounded", "label"] = "full"
    k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    decimals: Annotated[int, Field(ge=1, le=8)] | None = None

    @model_validator(mode="after")
    def _needs_its_number(self) -> Self:
        given = {"k": self.k is not None, "decimals": self.decimals is not None}
        wanted = {"k": self.form == "top_k", "decimals": self.form == "rounded"}
        for name, want in wanted.items():
            if given[name] != want:
                raise ValueError(f"{self.form} {'needs' if want else 'takes no'} {name}")
        return self


class KeyLimits(Member):
    """Budgets in images, and in answers that were not withheld; None for no limit."""

    window_images: Images | None = None
    window_s: Annotated[int, Field(ge=1, le=366 * 86400)] = 3600
    total_images: Images | None = None
    window_clean: Images | None = None
    total_clean: Images | None = None


class Key(Member):
    """One key: its client, and what it allows.

    Attributes:
        id: the name of the key in lists and logs.
        sha256: of the key, in hexadecimal.
        client: the client whose budgets it uses; several keys of a client share them.
        created: ISO 8601, UTC.
        revoked: when the key was revoked, else None.
        defense: name of a defense; None for the server's.
        defense_params: parameters of the defense.
        output: how much of an answer the client sees.
        limits: budgets.
        on_store_failure: refuse requests (closed) or serve them uncounted (open) while the budget
            store is unavailable.
        routes: paths that the key may use, each with all paths below it; empty for all.
    """

    id: Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    client: Name
    created: str
    revoked: str | None = None
    defense: str | None = None
    defense_params: Parameters = {}
    output: Output = Output()
    limits: KeyLimits = KeyLimits()
    on_store_failure: Literal["closed", "open"] = "closed"
    routes: tuple[Annotated[str, Field(pattern="^/")], ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _names_what_it_configures(self) -> Self:
        if self.defense is None and self.defense_params:
            raise ValueError("defense_params is given without a defense")
        return self


class KeyFile(Member):
    """The contents of a key file."""

    version: Literal[1] = 1
    keys: tuple[Key, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _has_each_once(self) -> Self:
        for field in ("id", "sha256"):
            if len({getattr(key, field) for key in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have the same {field}")
        return self


def new_key(random: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """Make a key. It is shown once, as it cannot be recovered from the file."""
    return PREFIX + urlsafe_b64encode(random(32)).rstrip(b"=").decode()


def digest(key: bytes) -> bytes:
    """The SHA-256 of a key, as stored in the file."""
    return hashlib.sha256(key).digest()


def refuse_contradictions(file: KeyFile) -> None:
    """Refuse a file whose keys set different limits for a budget that they share.

    Keys of one client share their totals, and windows of the same length. With different limits,
    the one that applies would depend on the key that is used. Revoked keys are ignored.

    Raises:
        ConfigError: two keys of a client have different limits; the message names them.
    """
    first: dict[tuple[str, str, int], tuple[str, int]] = {}
    for key in file.keys:
        if key.revoked is not None:
            continue
        limits = key.limits
        for unit, window_s, images in (
            ("images", limits.window_s, limits.window_images),
            ("images", 0, limits.total_images),
            ("answers", limits.window_s, limits.window_clean),
            ("answers", 0, limits.total_clean),
        ):
            if images is None:
                continue
            other, allowed = first.setdefault((key.client, unit, window_s), (key.id, images))
            if images != allowed:
                budget = f"{unit} in {window_s} s" if window_s else f"{unit} in total"
                raise ConfigError(
                    f"keys {other!r} and {key.id!r} of client {key.client!r} share a budget and "
                    f"set different limits: {allowed} and {images} {budget}; allowed: the "
                    "same limit in all keys of a client that are not revoked"
                )


def read_keys(path: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read or is not a key file; the message contains no hash.
    """
    return parse_keys(path, load_keys(path))


def load_keys(path: Path) -> bytes:
    """Read the bytes of the file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"SCUMBLE_KEYS_FILE: {path}: {exc.strerror or exc}") from exc


def parse_keys(path: Path, content: bytes) -> KeyFile:
    """The keys of a file that has been read; `path` is for the message.

    Raises:
        ConfigError: it is not a key file; the message contains no hash.
    """
    try:
        return KeyFile.model_validate_json(content)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"SCUMBLE_KEYS_FILE: {path}: {sentence(place, first)}") from exc


def write_keys(path: Path, file: KeyFile) -> None:
    """Replace the file atomically: readers see either the old or the new contents.

    Raises:
        OSError: the folder cannot be written.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    body = orjson.dumps(file.model_dump(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(body)
            stream.flush()
            os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two commands do not undo each other's change."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)  # writes the new directory entry to the disk
    finally:
        os.close(folder)


def add_key(path: Path, key: Key) -> None:
    """Add a key; the file is created if it does not exist.

    Raises:
        ConfigError: the file is broken, has a key with that id, or has a key of the same client
            with different limits.
        OSError: the folder cannot be read or written.
    """
    with changing(path):
        keys = read_keys(path).keys if path.exists() else ()
        if any(old.id == key.id for old in keys):
            raise ConfigError(f"{path} already has a key {key.id!r}")
        file = KeyFile(keys=(*keys, key))
        refuse_contradictions(file)
        write_keys(path, file)


def revoke_key(path: Path, key_id: str, now: datetime) -> Key:
    """Revoke a key; it stays in the file, so that its requests get 403 and its id is not reused.

    Raises:
        ConfigError: the file is broken, or has no key with that id.
        OSError: the folder cannot be read or written.
    """
    with changing(path):
        keys = {key.id: key for key in read_keys(path).keys}
        if key_id not in keys:
            known = ", ".join(keys) or "none"
            raise ConfigError(f"{path} has no key {key_id!r}; available: {known}")
        if keys[key_id].revoked is None:
            keys[key_id] = keys[key_id].model_copy(
                update={"revoked": timestamp(now.timestamp(), "seconds")}
            )
            write_keys(path, KeyFile(keys=tuple(keys.values())))
        return keys[key_id]
