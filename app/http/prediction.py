"""One prediction, from bytes to response: read, decode, batch (infer, defend), encode.

Everything that the routes need is handed to `Service`; it knows nothing of FastAPI's machinery.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.access.admission import Access, Admission
from app.audit.log import Audit
from app.errors import ClientGone, NotFound, TooLarge, TooLate, Unavailable, Unprocessable
from app.http.bodies import (
    INLINE_BYTES,
    Headers,
    read_buffer,
    read_images,
    refuse_encoding,
    small_number,
)
from app.http.responses import Answer, health, json_response
from app.http.schemas import LimitsInfo
from app.http.v2 import json_length, read_infer, write_infer
from app.inference.async_lazy import RETRY_S, AsyncLazy
from app.inference.batching import Batcher, Batchers, BatchResult
from app.inference.bundle import Card, InputShape, Preprocessing
from app.inference.deadline import ALWAYS_CONNECTED, LATE, Deadline
from app.inference.decode import Header, Pixels, decode, inspect
from app.inference.engines import Batch, Probs
from app.inference.executor import BoundedExecutor
from app.inference.formats import FORMATS
from app.settings import LimitSettings
from app.system.file_watcher import FileWatcher
from app.system.heap import trim_heap
from app.telemetry.metrics import Metrics
from app.telemetry.stages import Stages
from scumble.defenses import Defense

DEADLINE_HEADER = b"x-deadline-ms"
# Files are decoded on the event loop up to this sum of pixels and bytes, which takes 3 ms at most.
INLINE_WORK = 200_000
INLINE_VALUES = 20_000  # of an answer that is written on the event loop
NOT_PLAIN = 4  # times the work of a plain file of as many pixels and bytes
log = logging.getLogger("scumble")


@dataclass
class State:
    """What changes while the service runs."""

    draining: bool = False


class Decoder(Protocol):
    """What makes pixels of a file: `app.inference.decode.decode`."""

    def __call__(
        self,
        data: bytes,
        shape: InputShape,
        preprocessing: Preprocessing,
        max_pixels: int,
        header: Header | None = None,
    ) -> Pixels:
        """The pixels of one encoded image, uint8 (H, W, C)."""
        ...


class Answered(NamedTuple):
    """What a batch gave, and when its images were decoded.

    Attributes:
        served: the probabilities.
        decode_start: the images were there; later by the time that it took to charge for them.
        decoded: their pixels were there.
    """

    served: BatchResult
    decode_start: float
    decoded: float


@dataclass(frozen=True)
class Service:
    """Answers requests for one model.

    Attributes:
        card: of the model.
        limits: checked before anything is decoded.
        pixels: answers uint8 (N, H, W, C).
        tensors: answers float32 (N, C, H, W) in [0, 1], made for the first of them; None where the
            server takes none.
        metrics: of this worker.
        count_images: the metrics' counter of answered images of this model and precision.
        executor: parses, decodes and writes what would hold the event loop.
        access: who may ask, and how much; None for anyone and any number.
        audit: keeps a line for each prediction, answered or refused; None for no such log.
        files: are read anew while the service runs; None for none.
        traced: leave the times of the stages in a request's state, for spans.
        decoder: makes pixels of a file.
    """

    card: Card
    limits: LimitSettings
    pixels: Batchers
    tensors: AsyncLazy[Batchers] | None
    metrics: Metrics
    count_images: Callable[[int], None]
    executor: BoundedExecutor
    access: Access | None = None
    audit: Audit | None = None
    files: FileWatcher | None = None
    traced: bool = False
    decoder: Decoder = decode
    state: State = field(default_factory=State)
    clock: Callable[[], float] = time.perf_counter

    async def predict(self, request: Request) -> Response:
        """`POST /v1/predict`.

        Raises:
            RequestError: the request is refused; nothing is counted as answered.
        """
        start = self.clock()
        top_k = self._top_k(request)
        headers = dict(request.scope["headers"])
        deadline = self._deadline(request, headers, start)
        images = await read_images(
            headers,
            request.receive,
            max_bytes=self.limits.max_body_bytes,
            max_images=self.limits.max_images,
            executor=self.executor,
            deadline=deadline,
        )
        read = self.clock()
        answered = await self._answer(request, images, deadline, read)
        back = self.clock()
        probabilities = answered.served.probabilities
        body = self._encode(request.scope["state"]["id"], probabilities, top_k)
        self._count(request, answered, start, read, back)
        return Answer(body, b"application/json")

    async def infer(self, request: Request) -> Response:
        """`POST /v2/models/{model}/infer`, and of its version.

        Raises:
            RequestError: the request is refused; nothing is counted as answered.
        """
        self.check_path(request)
        start = self.clock()
        headers = dict(request.scope["headers"])
        deadline = self._deadline(request, headers, start)
        refuse_encoding(headers)
        body = await read_buffer(headers, request.receive, self.limits.max_body_bytes)
        if json_length(headers, body) <= INLINE_BYTES:
            asked = read_infer(headers, body, self.card, self.limits)
        else:
            task = partial(read_infer, headers, body, self.card, self.limits)
            (asked,) = await self.executor([task], len(body), deadline)
        read = self.clock()
        answered = await self._answer(request, asked.images, deadline, read)
        back = self.clock()
        probabilities = answered.served.probabilities
        if probabilities.size <= INLINE_VALUES:
            answer, headers = write_infer(self.card, asked, probabilities)
        else:
            write = partial(write_infer, self.card, asked, probabilities)
            finish = deadline._replace(at=math.inf)  # what has begun is answered
            ((answer, headers),) = await self.executor([write], 0, finish)
        self._count(request, answered, start, read, back)
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
        trim_heap()

    def close(self) -> None:
        """Let running batches finish, end the engines' threads, hand the last metrics over."""
        self.executor.close()
        for batcher in self._batchers():
            batcher.close()
        self.metrics.flush()

    def running_s(self) -> float:
        """For how long the oldest batch, or the decoding of one image, has been running."""
        batches = max(batcher.running_s for batcher in self._batchers())
        return max(batches, self.executor.running_s)

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
        not_ready_reason = await self.not_ready_reason()
        stale = [] if self.files is None else self.files.stale()
        return health(not_ready_reason or "ready", stale)

    async def not_ready_reason(self) -> str | None:
        """Why no requests should come at the moment."""
        if self.state.draining:
            return "draining"
        if self.access is not None and self.access.outdated:
            return "API keys cannot be checked"
        if self.access is not None and not await self.access.ready():
            return "budgets cannot be counted"
        if self.audit is not None and not await self.audit.ready():
            return "the audit log cannot be written"
        return None

    def _batchers(self) -> Iterator[Batcher]:
        yield from self.pixels
        made = None if self.tensors is None else self.tensors.made
        yield from made or ()

    def _inspect(self, images: Sequence[bytes]) -> list[Header]:
        """What the files say of themselves; nothing is decoded.

        Raises:
            TooLarge: one of them, or all together, have too many pixels.
            Unprocessable: one of them is no image.
        """
        max_pixels = self.limits.max_pixels
        headers = [inspect(image, max_pixels) for image in images]
        pixels = sum(header.pixels for header in headers)
        if len(images) > 1 and pixels > self.limits.max_request_pixels:
            raise TooLarge(
                f"the {len(images)} images of the request have {pixels} pixels together; "
                f"allowed: {self.limits.max_request_pixels}"
            )
        return headers

    def _decoders(
        self, images: Sequence[bytes], headers: Sequence[Header]
    ) -> list[Callable[[], Pixels]]:
        """What decodes the files, one by one: (H, W, C) of each."""
        card, max_pixels = self.card, self.limits.max_pixels
        return [
            partial(self.decoder, image, card.input, card.preprocessing, max_pixels, header)
            for image, header in zip(images, headers, strict=True)
        ]

    async def _for_tensors(self, deadline: Deadline) -> Batchers:
        """Who answers float tensors. The first requests wait until their deadline for it.

        Raises:
            TooLate: it was not ready by then.
        """
        if self.tensors is None:
            raise Unprocessable("datatype is 'FP32'; this server takes UINT8 only")
        if (made := self.tensors.made) is not None:
            return made
        left = deadline.at - self.clock()
        try:
            async with asyncio.timeout(None if left == math.inf else left):
                return await self.tensors()
        except TimeoutError:
            raise TooLate(LATE) from None
        except Exception as exc:  # whatever it is, it has been logged and is tried again
            raise Unavailable(
                "float tensors cannot be answered at the moment; UINT8 can", round(RETRY_S)
            ) from exc

    def _deadline(self, request: Request, headers: Headers, start: float) -> Deadline:
        """How long the request may wait: as the settings say, or less if the client says so."""
        allowed_ms = self.limits.deadline_ms or math.inf
        asked = headers.get(DEADLINE_HEADER)
        if asked is not None:
            allowed_ms = min(allowed_ms, _milliseconds(asked))
        client = request.scope["state"].get("client", ALWAYS_CONNECTED)
        return Deadline(start + allowed_ms / 1000, client)

    async def _answer(
        self, request: Request, images: Batch | list[bytes], deadline: Deadline, read: float
    ) -> Answered:
        """What the client gets, if it is still there to get it: what it cannot see is free.

        Limits come before the charge, and the charge before anything is decoded; what cannot be
        decoded is refunded, as everything else that is not answered.

        Args:
            request: whose state has who is charged.
            images: files to decode, or their pixels.
            deadline: looked at before the charge, while the request waits, and at the end.
            read: the time at which `images` were there.
        """
        headers = self._inspect(images) if isinstance(images, list) else []
        ended = deadline.ended(read)
        if ended is not None:
            raise ended
        state = request.scope["state"]
        state["images"] = len(images)
        admission: Admission | None = state.get("admission")
        defense = None
        decode_start = read
        if admission is not None:
            before = self.clock()
            await admission.charge(len(images))
            decode_start += self.clock() - before
            defense = admission.grant.defense
        if isinstance(images, list):
            tasks = self._decoders(images, headers)
            if sum(map(_work, images, headers)) <= INLINE_WORK:
                rows = [task() for task in tasks]
            else:
                rows = await self.executor(tasks, sum(map(len, images)), deadline)
            images = rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows)
        batchers = self.pixels if images.dtype == np.uint8 else await self._for_tensors(deadline)
        decoded = self.clock()
        batcher = batchers.default if defense is None else batchers.per_client
        if len(images) <= batcher.max_size:
            served = await batcher(images, defense, deadline)
        else:
            served = await self._in_parts(batcher, images, defense, deadline)
        if deadline.client.gone:
            raise ClientGone("the client closed the connection before the answer")
        return Answered(served, decode_start, decoded)

    async def _in_parts(
        self, batcher: Batcher, batch: Batch, defense: Defense | None, deadline: Deadline
    ) -> BatchResult:
        """Many images let others in between their parts."""
        if len(batch) > self.limits.max_queue:
            raise Unprocessable(f"{len(batch)} images never fit the queue of this server")
        size = batcher.max_size
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        served = await batcher.all(parts, defense, deadline)
        return BatchResult(
            np.concatenate([part.probabilities for part in served]),
            max(part.queue_s for part in served),
            sum(part.infer_s for part in served),
            sum(part.defend_s for part in served),
        )

    def _count(
        self, request: Request, answered: Answered, start: float, read: float, back: float
    ) -> None:
        end = self.clock()
        served, decode_start, decoded = answered
        stage = self.metrics.stage
        stage["read"].observe(read - start)
        stage["decode"].observe(decoded - decode_start)
        stage["queue"].observe(served.queue_s)
        stage["infer"].observe(served.infer_s)
        stage["defend"].observe(served.defend_s)
        stage["encode"].observe(end - back)
        self.count_images(len(served.probabilities))
        if self.traced:
            request.scope["state"]["stages"] = Stages(
                start, read, decode_start, decoded, back, end, *served[1:]
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


def _work(data: bytes, header: Header) -> int:
    """To decode a file, in pixels and bytes of a plain one."""
    return (header.pixels + len(data)) * (1 if header.plain else NOT_PLAIN)


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
