"""The path of a request in CONTRIBUTING.md: the files that one real prediction passes.

    python -m docs.generators.request_path        writes it

A small PNG is sent to the application that `create_app` makes, in process, and every call of a
function under `app/` or `scumble/` is noted. Left out are `app/telemetry`, where each stage counts
itself, helpers of `app/system`, and the values that travel with a request: a call of their methods
is not a step.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from fastapi import FastAPI
from PIL import Image
from starlette.types import Message

from app.access.grants import Grant
from app.access.keys import Key, KeyFile, KeyLimits, digest, new_key, write_keys
from app.access.stores import Bucket
from app.inference.decode import Header
from app.main import create_app
from app.settings import BatchSettings, Settings
from docs.generators.marks import between

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN = "<!-- written by python -m docs.generators.request_path -->\n"
END = "<!-- end of the request path -->"
FOLDERS = ("app/", "scumble/")
LEFT_OUT = (
    "app/telemetry/",
    "app/system/",
    "app/request_context.py",
    "app/inference/deadline.py",
)
VALUES = (Bucket, Grant, Header)
ENDPOINT = "app/http/prediction.py"


@dataclass
class Trace:
    """The files of one request.

    Attributes:
        callers: file -> the file from which it was first called, in order; "" for the first.
        again: file -> other files that called it.
    """

    callers: dict[str, str] = field(default_factory=dict)
    again: dict[str, set[str]] = field(default_factory=dict)

    @property
    def borders(self) -> int:
        """Steps from one file into the next."""
        return len(self.callers) - 1

    def add(self, caller: str, file: str) -> None:
        """Note a call."""
        if caller == file or (not caller and file in self.callers):
            return
        first = self.callers.setdefault(file, caller)
        if first != caller:
            self.again.setdefault(file, set()).add(caller)

    def tree(self, file: str = "", indent: str = "") -> Iterator[str]:
        """The lines of a picture of the files below one file."""
        below = [name for name, caller in self.callers.items() if caller == file]
        for name in below:
            if not file:
                yield name
                yield from self.tree(name)
                continue
            last = name is below[-1]
            yield f"{indent}{'└─' if last else '├─'} {name}"
            yield from self.tree(name, f"{indent}{'   ' if last else '│  '}")


class Tracer:
    """A profile function that notes calls between files."""

    def __init__(self) -> None:
        self.trace = Trace()
        # Coroutines are entered again after each wait, which is not a call.
        self._entered: dict[int, FrameType] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        """One event."""
        del arg
        if event != "call" or id(frame) in self._entered:
            return
        file = _step(frame)
        if file is None:
            return
        self._entered[id(frame)] = frame
        above, caller = frame.f_back, None
        while above is not None and caller is None:
            caller = _step(above)
            above = above.f_back
        self.trace.add(caller or "", file)


def _step(frame: FrameType) -> str | None:
    """The file of a frame, if a call of it is a step."""
    name = frame.f_code.co_filename
    if not name.startswith(f"{ROOT}/"):
        return None
    file = name[len(f"{ROOT}/") :]
    if not file.startswith(FOLDERS) or file.startswith(LEFT_OUT):
        return None
    return None if isinstance(frame.f_locals.get("self"), VALUES) else file


def trace(folder: Path, *, guarded: bool) -> Trace:
    """The path of a prediction.

    Args:
        folder: for the file of keys and the audit log.
        guarded: with keys, budgets and an audit log.
    """
    key = new_key()
    settings: dict[str, Any] = {}
    if guarded:
        row = Key(
            id="a",
            sha256=digest(key.encode()).hex(),
            client="a",
            created="2026-01-01T00:00:00Z",
            limits=KeyLimits(total_images=10),
        )
        write_keys(folder / "keys.json", KeyFile(keys=(row,)))
        settings = {"keys_file": folder / "keys.json", "audit_file": folder / "audit"}
    app = create_app(
        Settings(
            model_dir=ROOT / "models",
            model="mnist",
            workers=1,
            engine="onnxruntime",  # the same picture on every machine
            batch=BatchSettings(execution="inline"),
            **settings,
        )
    )
    return asyncio.run(_traced(app, key))


async def _traced(app: FastAPI, key: str) -> Trace:
    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "PNG")
    body = buffer.getvalue()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/predict",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png"), (b"x-api-key", key.encode())],
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        sent.append(message)

    tracer = Tracer()
    async with app.router.lifespan_context(app):
        await app(dict(scope), receive, send)  # the first request may import or compile something
        before = sys.getprofile()
        sys.setprofile(tracer)
        try:
            await app(dict(scope), receive, send)
        finally:
            sys.setprofile(before)
    statuses = [message["status"] for message in sent if "status" in message]
    assert statuses == [200, 200], statuses  # noqa: S101  # the picture is of an answer
    return tracer.trace


def paths() -> dict[str, Trace]:
    """Both paths, by what is on."""
    with TemporaryDirectory() as folder:
        return {
            "Without keys": trace(Path(folder), guarded=False),
            "With keys, budgets and the audit log": trace(Path(folder), guarded=True),
        }


def text(found: Mapping[str, Trace]) -> str:
    """What stands between the marks."""
    return "".join(
        f"\n{name}, a prediction crosses {path.borders} borders between files:\n\n"
        "```text\n" + "".join(f"{line}\n" for line in path.tree()) + "```\n"
        for name, path in found.items()
    )


def replaced(page: str, made: str) -> str:
    """The page with what is made between its marks."""
    return between(page, BEGIN, f"{made}\n", END)


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(), text(paths())))
