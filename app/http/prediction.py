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
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from app.access.admission import Access
from app.audit.log import Audit
from app.context import ClientConnection, RequestContext, request_context
from app.endpoint import Endpoint
from app.errors import ClientGone, TooLarge, TooLate, Unavailable, Unprocessable
from app.http.bodies import Headers, small_number
from app.http.responses import health, json_response
from app.inference.async_lazy import RETRY_S, AsyncLazy
from app.inference.batching import Batcher, Batchers, BatchResult
from app.inference.bundle import Card, InputShape, Preprocessing
from app.inference.deadline import LATE, Deadline
from app.inference.decode import Header, Pixels, decode, inspect
from app.inference.engines import Batch, Probs
from app.inference.executor import BoundedExecutor
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


class Asked(Protocol):
    """A request as a codec has read it."""

    @property
    def images(self) -> Batch | list[bytes]:
        """Pixels of all images, or their encoded files."""
        ...


A = TypeVar("A", bound=Asked)


class Codec(Protocol[A]):
    """Reads requests and writes answers of one protocol."""

    async def read(self, request: Request, headers: Headers, deadline: Deadline) -> A:
        """Read and check a request; no image is decoded.

        Raises:
            RequestError: the request is refused.
        """
        ...

    def write(self, asked: A, probabilities: Probs, request_id: str) -> Response:
        """The answer; a large one is written on a thread."""
        ...


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

    def endpoint(self, codec: Codec[A]) -> Endpoint:
        """The endpoint that answers predictions of one protocol."""
        return partial(self._predict, codec)

    async def _predict(self, codec: Codec[A], request: Request) -> Response:
        """Read, check, charge, decode, batch, encode.

        Raises:
            RequestError: the request is refused; nothing is counted as answered.
        """
        start = self.clock()
        context = request_context(request.scope)
        headers = dict(request.scope["headers"])
        deadline = self._deadline(context.client, headers, start)
        asked = await codec.read(request, headers, deadline)
        read = self.clock()
        answered = await self._answer(context, asked.images, deadline, read)
        back = self.clock()
        probabilities = answered.served.probabilities
        if probabilities.size <= INLINE_VALUES:
            response = codec.write(asked, probabilities, context.id)
        else:
            write = partial(codec.write, asked, probabilities, context.id)
            unlimited = deadline._replace(at=math.inf)  # the inference is done: always answer
            (response,) = await self.executor([write], 0, unlimited)
        self._count(context, answered, start, read, back)
        return response

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

    def _deadline(self, client: ClientConnection, headers: Headers, start: float) -> Deadline:
        """How long the request may wait: as the settings say, or less if the client says so."""
        allowed_ms = self.limits.deadline_ms or math.inf
        asked = headers.get(DEADLINE_HEADER)
        if asked is not None:
            allowed_ms = min(allowed_ms, _milliseconds(asked))
        return Deadline(start + allowed_ms / 1000, client)

    async def _answer(
        self, context: RequestContext, images: Batch | list[bytes], deadline: Deadline, read: float
    ) -> Answered:
        """What the client gets, if it is still there to get it: what it cannot see is free.

        Limits come before the charge, and the charge before anything is decoded; what cannot be
        decoded is refunded, as everything else that is not answered.

        Args:
            context: of the request; its admission is charged.
            images: files to decode, or their pixels.
            deadline: looked at before the charge, while the request waits, and at the end.
            read: the time at which `images` were there.
        """
        headers = self._inspect(images) if isinstance(images, list) else []
        ended = deadline.ended(read)
        if ended is not None:
            raise ended
        context.images = len(images)
        admission = context.admission
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
        self, context: RequestContext, answered: Answered, start: float, read: float, back: float
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
            context.stages = Stages(start, read, decode_start, decoded, back, end, *served[1:])


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
