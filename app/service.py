"""One prediction, from bytes to response: read, decode, batch (infer, defend), encode.

Everything that the routes need is handed to `Service`; it knows nothing of FastAPI's machinery.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.access import Access, Visit
from app.audit import Audit
from app.batching import Batcher, Served
from app.bodies import Fields, read_buffer, read_images, refuse_encoding, small_number
from app.bundle import Card
from app.decode import Pixels, decode
from app.defenses import Defense
from app.engines import Batch, Probs
from app.errors import ClientGone, ConfigError, NotFound, Unavailable, Unprocessable
from app.formats import FORMATS
from app.late import Late
from app.memory import give_back
from app.metrics import Metrics
from app.patience import STAYS, Patience
from app.responses import Answer, json_response
from app.schemas import LimitsInfo
from app.settings import LimitSettings
from app.stages import Stages
from app.v2 import read_infer, write_infer

DEADLINE_HEADER = b"x-deadline-ms"
log = logging.getLogger("scumble")


@dataclass
class State:
    """What changes while the service runs."""

    draining: bool = False


class Batchers(NamedTuple):
    """Who answers images of one kind.

    Attributes:
        own: under the server's defense.
        apart: clients whose defense is another.
    """

    own: Batcher
    apart: Batcher

    def prepare(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Let the engines compile for the batches to come, until told to stop."""
        for batcher in self:
            batcher.prepare(stop)


@dataclass(frozen=True)
class Service:
    """Answers requests for one model.

    Attributes:
        card: of the model.
        limits: checked before anything is decoded.
        pixels: answers uint8 (N, H, W, C).
        tensors: answers float32 (N, C, H, W) in [0, 1], made for the first of them; None where the
            server takes none.
        max_batch: images that one call of a batcher may carry.
        metrics: of this worker.
        count_images: the metrics' counter of answered images of this model and precision.
        access: who may ask, and how much; None for anyone and any number.
        audit: keeps a line for each prediction, answered or refused; None for no such log.
        traced: leave the times of the stages in a request's state, for spans.
    """

    card: Card
    limits: LimitSettings
    pixels: Batchers
    tensors: Late[Batchers] | None
    max_batch: int
    metrics: Metrics
    count_images: Callable[[int], None]
    access: Access | None = None
    audit: Audit | None = None
    traced: bool = False
    state: State = field(default_factory=State)
    clock: Callable[[], float] = time.perf_counter

    async def predict(self, request: Request) -> Response:
        """`POST /v1/predict`.

        Raises:
            RequestError: the request is refused; nothing is counted as answered.
        """
        start = self.clock()
        top_k = self._top_k(request)
        fields = dict(request.scope["headers"])
        patience = self._patience(request, fields, start)
        images = await read_images(
            fields,
            request.receive,
            max_bytes=self.limits.max_body_bytes,
            max_images=self.limits.max_images,
        )
        read = self.clock()
        batch = self._decode(images)
        decoded = self.clock()
        served = await self._answer(request, self.pixels, batch, patience)
        back = self.clock()
        body = self._encode(request.scope["state"]["id"], served.probabilities, top_k)
        self._count(request, served, start, read, decoded, back)
        return Answer(body, b"application/json")

    async def infer(self, request: Request) -> Response:
        """`POST /v2/models/{model}/infer`, and of its version.

        Raises:
            RequestError: the request is refused; nothing is counted as answered.
        """
        self.check_path(request)
        start = self.clock()
        fields = dict(request.scope["headers"])
        patience = self._patience(request, fields, start)
        refuse_encoding(fields)
        body = await read_buffer(fields, request.receive, self.limits.max_body_bytes)
        read = self.clock()
        asked = read_infer(fields, body, self.card, self.limits)
        batchers, batch = await self._rows(asked.images)
        decoded = self.clock()
        served = await self._answer(request, batchers, batch, patience)
        back = self.clock()
        answer, headers = write_infer(self.card, asked, served.probabilities)
        self._count(request, served, start, read, decoded, back)
        return Response(answer, headers=headers)

    def check_path(self, request: Request) -> None:
        """Of the V2 protocol. A hot route has no parameters: its path is the served model's.

        Raises:
            NotFound: the path names another model or version.
        """
        name = request.path_params.get("model", self.card.name)
        if name != self.card.name:
            raise NotFound(f"no model {name[:64]!r} here; there is {self.card.name!r}")
        version = request.path_params.get("version", self.card.version)
        if version != self.card.version:
            raise NotFound(
                f"no version {version[:64]!r} of {name!r}; there is {self.card.version!r}"
            )

    def prepare(self, stop: Callable[[], bool] = lambda: False) -> None:
        """What the first requests need not wait for, until told to stop; on another thread."""
        try:
            self.pixels.prepare(stop)
        except Exception:  # the service answers without; nobody waits for what this returns
            log.exception("not all batch sizes could be prepared")
        give_back()

    def close(self) -> None:
        """Let running batches finish, end the engines' threads, hand the last metrics over."""
        for batcher in self._batchers():
            batcher.close()
        self.metrics.flush()

    def running_s(self) -> float:
        """For how long the oldest batch has been running; 0 if there is none."""
        return max(batcher.running_s for batcher in self._batchers())

    async def model(self, request: Request) -> Response:
        """`GET /v1/model`: what a client must know, nothing about the defense."""
        del request
        card = self.card
        return json_response(
            {
                "name": card.name,
                "version": card.version,
                "labels": card.labels,
                "input": card.input.model_dump(),
                "formats": sorted(FORMATS),
                "limits": self.limits.model_dump(include=set(LimitsInfo.model_fields)),
            }
        )

    async def live(self, request: Request) -> Response:
        """`GET /livez`: the event loop turns."""
        del request
        return json_response({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """`GET /readyz`: loaded, tested, warm, not draining, budgets and the audit log work."""
        del request
        obstacle = await self.obstacle()
        return json_response({"status": obstacle or "ready"}, 503 if obstacle else 200)

    async def obstacle(self) -> str | None:
        """Why no requests should come at the moment."""
        if self.state.draining:
            return "draining"
        if self.access is not None and not await self.access.ready():
            return "budgets cannot be counted"
        if self.audit is not None and not await self.audit.ready():
            return "the audit log cannot be written"
        return None

    def _batchers(self) -> Iterator[Batcher]:
        yield from self.pixels
        made = None if self.tensors is None else self.tensors.made
        yield from made or ()

    async def _rows(self, images: Batch | list[bytes]) -> tuple[Batchers, Batch]:
        """Images of a V2 request, and who answers them."""
        if isinstance(images, list):
            return self.pixels, self._decode(images)
        if images.dtype == np.uint8:
            return self.pixels, images
        if self.tensors is None:
            raise Unprocessable("datatype is 'FP32'; this server takes UINT8 only")
        try:
            return await self.tensors(), images
        except ConfigError as exc:
            log.error("float tensors cannot be answered: %s", exc)
            raise Unavailable("float tensors cannot be answered; UINT8 can") from exc

    def _decode(self, images: list[bytes]) -> Pixels:
        """Encoded files -> (N, H, W, C)."""
        card = self.card
        rows = [
            decode(image, card.input, card.preprocessing, self.limits.max_pixels)
            for image in images
        ]
        return rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows)

    def _patience(self, request: Request, fields: Fields, start: float) -> Patience:
        """How long the request may wait: as the settings say, or less if the client says so."""
        allowed_ms = self.limits.deadline_ms or math.inf
        asked = fields.get(DEADLINE_HEADER)
        if asked is not None:
            allowed_ms = min(allowed_ms, _milliseconds(asked))
        line = request.scope["state"].get("line", STAYS)
        return Patience(start + allowed_ms / 1000, line)

    async def _answer(
        self, request: Request, batchers: Batchers, batch: Batch, patience: Patience
    ) -> Served:
        """What the client gets, if he is still there to get it: what he cannot see is free."""
        ended = patience.ended(self.clock())  # before it is charged
        if ended is not None:
            raise ended
        state = request.scope["state"]
        state["images"] = len(batch)
        visit: Visit | None = state.get("visit")
        defense = None
        if visit is not None:
            await visit.charge(len(batch))
            defense = visit.grant.defense
        batcher = batchers.own if defense is None else batchers.apart
        if len(batch) <= self.max_batch:
            served = await batcher(batch, defense, patience)
        else:
            served = await self._in_parts(batcher, batch, defense, patience)
        if patience.line.gone:
            raise ClientGone("the client closed the connection before the answer")
        return served

    async def _in_parts(
        self, batcher: Batcher, batch: Batch, defense: Defense | None, patience: Patience
    ) -> Served:
        """Many images let others in between their parts."""
        if len(batch) > self.limits.max_queue:
            raise Unprocessable(f"{len(batch)} images never fit the queue of this server")
        parts = [batch[i : i + self.max_batch] for i in range(0, len(batch), self.max_batch)]
        served = await batcher.all(parts, defense, patience)
        return Served(
            np.concatenate([part.probabilities for part in served]),
            max(part.queue_s for part in served),
            sum(part.infer_s for part in served),
            sum(part.defend_s for part in served),
        )

    def _count(
        self,
        request: Request,
        served: Served,
        start: float,
        read: float,
        decoded: float,
        back: float,
    ) -> None:
        end = self.clock()
        stage = self.metrics.stage
        stage["read"].observe(read - start)
        stage["decode"].observe(decoded - read)
        stage["queue"].observe(served.queue_s)
        stage["infer"].observe(served.infer_s)
        stage["defend"].observe(served.defend_s)
        stage["encode"].observe(end - back)
        self.count_images(len(served.probabilities))
        if self.traced:
            request.scope["state"]["stages"] = Stages(
                start, read, decoded, back, end, served.queue_s, served.infer_s, served.defend_s
            )

    def _top_k(self, request: Request) -> int | None:
        if not request.scope["query_string"]:
            return None
        text = request.query_params.get("top_k")
        if text is None:
            return None
        classes = len(self.card.labels)
        top_k = small_number(text)
        if top_k is None or not 1 <= top_k <= classes:
            raise Unprocessable(f"top_k is {text[:20]!r}; allowed: 1 to {classes}")
        return top_k

    def _encode(self, request_id: str, probabilities: Probs, top_k: int | None) -> bytes:
        labels = self.card.labels
        predictions = []
        for row in probabilities:
            best = int(row.argmax())
            prediction = {"label": labels[best], "index": best, "probability": row[best]}
            if top_k is None:
                prediction["probabilities"] = row
            else:
                order = np.argsort(-row, kind="stable")[:top_k].tolist()
                prediction["top"] = [
                    {"label": labels[k], "index": k, "probability": row[k]} for k in order
                ]
            predictions.append(prediction)
        answer = {
            "model": self.card.name,
            "version": self.card.version,
            "id": request_id,
            "predictions": predictions,
        }
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _milliseconds(value: bytes) -> int:
    """The client's own deadline.

    Raises:
        Unprocessable: no whole number of milliseconds, or none that gives us time.
    """
    text = value.decode("latin-1").strip()
    found = small_number(text)
    if not found:
        raise Unprocessable(
            f"X-Deadline-Ms is {text[:20]!r}; allowed: a whole number of milliseconds from 1"
        )
    return found
