"""One prediction, from bytes to response: read, check, charge, decode, batch, encode.

`Service` gets everything that it needs as arguments, and does not depend on FastAPI.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response

from app.access.admission import Access
from app.audit.log import Audit
from app.endpoint_type import Endpoint
from app.errors import ClientGone, TooLarge, TooLate, Unavailable, Unprocessable
from app.http.bodies import Headers, small_number
from app.http.responses import health, json_response
from app.inference.batching import Batcher, Batchers, BatchResult
from app.inference.bundle import Card, InputShape, Preprocessing
from app.inference.deadline import LATE, Deadline
from app.inference.decode import (
    Header,
    Pixels,
    check_decoded,
    decode,
    decoded_pixels,
    inspect,
)
from app.inference.engines import Batch, Probs
from app.inference.executor import BoundedExecutor
from app.request_context import RequestContext, request_context
from app.settings import LimitSettings
from app.system.async_lazy import RETRY_S, AsyncLazy
from app.system.file_watcher import FileWatcher
from app.system.heap import trim_heap
from app.telemetry.metrics import Metrics
from app.telemetry.stages import Stages
from scumble.defenses import Defense
from scumble.defenses.evidence import ABSTAINED, Marks

if TYPE_CHECKING:
    from app.inference.upstream.pass_through_models import PassThrough

DEADLINE_HEADER = b"x-deadline-ms"
# Sum of pixels and bytes up to which files are decoded on the event loop, in 3 ms at most.
INLINE_WORK = 200_000
# Bytes of AVIF and HEIC files up to which their lists of boxes are read there, in 5 ms at most.
INLINE_BOXES = 8192
INLINE_VALUES = 20_000  # up to which an answer is written on the event loop
GONE = "the client closed the connection before the answer"
NOT_PLAIN = 4  # factor of the work for files that the fast decoder does not take
FACTORS = {"AVIF": 10, "HEIF": 10}  # the same of formats that take longer
log = logging.getLogger("scumble")


class Asked(Protocol):
    """A request as a codec has read it."""

    @property
    def images(self) -> Batch | list[bytes]:
        """Pixels of all images, or their encoded files."""
        ...


A = TypeVar("A", bound=Asked)
Flags = npt.NDArray[np.bool_]


class Codec(Protocol[A]):
    """Reads requests and writes answers of one protocol."""

    async def read(self, request: Request, headers: Headers, deadline: Deadline) -> A:
        """Read and check a request; no image is decoded.

        Raises:
            RequestError: the request is refused.
        """
        ...

    def write(
        self, asked: A, probabilities: Probs, request_id: str, abstained: Flags | None = None
    ) -> Response:
        """The answer; a large one is written on a thread.

        Args:
            asked: the request.
            probabilities: (N, K).
            request_id: of the request.
            abstained: (N,) which rows are abstentions; None if none is.
        """
        ...


@dataclass
class State:
    """State that changes while the service runs."""

    draining: bool = False


class Decoder(Protocol):
    """Decodes an image file, as `app.inference.decode.decode` does."""

    def __call__(
        self,
        data: bytes,
        shape: InputShape,
        preprocessing: Preprocessing,
        max_pixels: int,
        header: Header | None = None,
        max_jpeg_pixels: int = 0,
    ) -> Pixels:
        """The pixels of one encoded image, uint8 (H, W, C)."""
        ...


class Upstream(Protocol):
    """Watches another server that runs the network."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Watch it in this context."""
        ...

    def not_ready_reason(self) -> str | None:
        """Why it can answer nothing; None if it can."""
        ...


class Answered(NamedTuple):
    """The result of the batch, and when the images were decoded.

    Attributes:
        served: the probabilities.
        decode_start: when decoding started; the time of the charge is not part of the stage.
        decoded: when decoding ended.
    """

    served: BatchResult
    decode_start: float
    decoded: float


@dataclass(frozen=True)
class Service:
    """Answers requests for one model.

    Attributes:
        card: of the model.
        limits: checked before an image is decoded.
        pixels: batchers for uint8 (N, H, W, C).
        tensors: batchers for float32 (N, C, H, W) in [0, 1], made for the first such request; None
            if the server does not take float tensors.
        metrics: of this worker.
        count_images: adds to the counter of answered images.
        executor: runs work that would hold the event loop.
        access: checks keys and budgets; None without keys and budgets.
        audit: logs every prediction, answered or refused; None without an audit log.
        files: reloads files that change; None for none.
        upstream: watches the server that runs the network; None where this one does.
        pass_through: models of that server whose V2 requests are passed through; None for none.
        traced: whether to keep the times of the stages for spans.
        decoder: decodes image files.
        state: changes while the service runs.
        clock: of stages and deadlines, in seconds.
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
    upstream: Upstream | None = None
    pass_through: PassThrough | None = None
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
        if context.fault is not None:
            raise context.fault
        headers = dict(request.scope["headers"])
        deadline = self.deadline(context, headers, start)
        asked = await codec.read(request, headers, deadline)
        read = self.clock()
        answered = await self._answer(context, asked.images, deadline, read)
        back = self.clock()
        probabilities, marks = answered.served.probabilities, answered.served.marks
        abstained = None
        if marks is not None:
            abstained = marks == ABSTAINED
            context.withheld = int(np.count_nonzero(marks))
        if probabilities.size <= INLINE_VALUES:
            response = codec.write(asked, probabilities, context.id, abstained)
        else:
            write = partial(codec.write, asked, probabilities, context.id, abstained)
            unlimited = deadline._replace(at=math.inf)  # the inference is done: always answer
            (response,) = await self.executor([write], 0, unlimited)
        self.count(context, answered, start, read, back)
        return response

    def small_header(self, data: bytes) -> Header | None:
        """The header of one file; None if it must be decoded on a thread.

        Raises:
            RequestError: the file is refused.
        """
        (header,) = self._inspect([data])
        return header if _work(data, header) <= INLINE_WORK else None

    def small_image(self, data: bytes, header: Header) -> Batch:
        """The pixels of one file as a batch.

        Raises:
            RequestError: the file is refused.
        """
        return self._decode(data, header)[np.newaxis]

    def prepare(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Compile the engines for later batch sizes, until `stop` returns True; run on a thread."""
        try:
            self.pixels.prepare(stop)
        except Exception:  # the service also answers without it
            log.exception("preparing the batch sizes failed")
        trim_heap()

    def close(self) -> None:
        """Wait for running batches, end the threads, and flush the metrics."""
        self.executor.close()
        for batcher in self._batchers():
            batcher.close()
        self.metrics.flush()

    def running_s(self) -> float:
        """Seconds for which the oldest batch or task of the executor has been running."""
        batches = max(batcher.running_s for batcher in self._batchers())
        return max(batches, self.executor.running_s)

    async def live(self, request: Request) -> Response:
        """`GET /livez`: the event loop runs."""
        del request
        return json_response({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """`GET /readyz`: 200 unless `not_ready_reason` names one."""
        del request
        not_ready_reason = await self.not_ready_reason()
        stale = [] if self.files is None else self.files.stale()
        return health(not_ready_reason or "ready", stale)

    async def not_ready_reason(self) -> str | None:
        """Why this worker should get no requests at the moment; None if it should."""
        if self.state.draining:
            return "draining"
        if self.access is not None and self.access.outdated:
            return "API keys unavailable"
        if self.access is not None and not await self.access.ready():
            return "budget store unavailable"
        if self.audit is not None and not await self.audit.ready():
            return "audit log unavailable"
        if self.upstream is not None:
            return self.upstream.not_ready_reason()
        return None

    def _batchers(self) -> Iterator[Batcher]:
        yield from self.pixels
        made = None if self.tensors is None else self.tensors.made
        yield from made or ()

    def _inspect(self, images: Sequence[bytes]) -> list[Header]:
        """The headers of the files; no pixels are decoded.

        Raises:
            TooLarge: one file, or all together, have too many pixels.
            Unprocessable: a file is not a supported image.
        """
        headers = list(map(self._header, images))
        self._check_sum(headers)
        return headers

    async def _headers(self, images: list[bytes], deadline: Deadline) -> list[Header]:
        """`_inspect`, beside the event loop where lists of boxes are long."""
        boxes = sum(len(image) for image in images if image.startswith(b"ftyp", 4))
        if boxes <= INLINE_BOXES:
            return self._inspect(images)
        tasks = [partial(self._header, image) for image in images]
        headers = await self.executor(tasks, sum(map(len, images)), deadline)
        self._check_sum(headers)
        return headers

    def _header(self, image: bytes) -> Header:
        """The header of one file, which may be decoded on its own."""
        max_pixels = self.limits.max_pixels
        header = inspect(image, max_pixels, self.limits.max_jpeg_pixels)
        if header.pixels > max_pixels:
            check_decoded(header, self.card.input, self.card.preprocessing, max_pixels)
        return header

    def _check_sum(self, headers: Sequence[Header]) -> None:
        """Refuse several files that have too many pixels together."""
        if len(headers) == 1:
            return
        shape, rule = self.card.input, self.card.preprocessing
        pixels = sum(decoded_pixels(header, shape, rule) for header in headers)
        if pixels > self.limits.max_request_pixels:
            raise TooLarge(
                f"the {len(headers)} images of the request have {pixels} pixels together; "
                f"allowed: {self.limits.max_request_pixels} (SCUMBLE_LIMITS__MAX_REQUEST_PIXELS)"
            )

    def _decode(self, image: bytes, header: Header) -> Pixels:
        """The pixels of one file, (H, W, C)."""
        card, limits = self.card, self.limits
        return self.decoder(
            image,
            card.input,
            card.preprocessing,
            limits.max_pixels,
            header,
            limits.max_jpeg_pixels,
        )

    async def _decode_all(
        self, images: Sequence[bytes], headers: Sequence[Header], deadline: Deadline
    ) -> list[Pixels]:
        """The pixels of several files, or of a large one."""
        if sum(map(_work, images, headers)) <= INLINE_WORK:
            return list(map(self._decode, images, headers))
        tasks = [
            partial(self._decode, image, header)
            for image, header in zip(images, headers, strict=True)
        ]
        return await self.executor(tasks, sum(map(len, images)), deadline)

    async def _for_tensors(self, deadline: Deadline) -> Batchers:
        """The batchers for float tensors; the first requests wait for them until their deadline.

        Raises:
            TooLate: they were not ready by the deadline.
            Unavailable: they cannot be made at the moment.
            Unprocessable: the server does not take float tensors.
        """
        if self.tensors is None:
            raise Unprocessable("this server takes no float tensors; allowed for pixels: UINT8")
        if (made := self.tensors.made) is not None:
            return made
        left = deadline.at - self.clock()
        try:
            async with asyncio.timeout(None if left == math.inf else left):
                return await self.tensors()
        except TimeoutError:
            raise TooLate(LATE) from None
        except Exception as exc:  # logged by `AsyncLazy`, which tries again
            raise Unavailable("float tensors are unavailable; use UINT8", round(RETRY_S)) from exc

    def deadline(self, context: RequestContext, headers: Headers, start: float) -> Deadline:
        """The deadline of the settings, or an earlier one of the client."""
        allowed_ms = self.limits.deadline_ms or math.inf
        asked = headers.get(DEADLINE_HEADER)
        if asked is not None:
            allowed_ms = min(allowed_ms, _milliseconds(asked))
        return Deadline(start + allowed_ms / 1000, context.client, context.traceparent)

    async def _answer(
        self, context: RequestContext, images: Batch | list[bytes], deadline: Deadline, read: float
    ) -> Answered:
        """Check, charge, decode and run the batch.

        Limits are checked before the charge, and the charge comes before decoding. A request that
        is not answered is refunded, also if its client has disconnected.

        Args:
            context: of the request; its admission is charged.
            images: files to decode, or pixels.
            deadline: checked before the charge, while the request waits, and at the end.
            read: when the images had been read.
        """
        headers = await self._headers(images, deadline) if isinstance(images, list) else []
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
            if len(images) == 1 and _work(images[0], headers[0]) <= INLINE_WORK:
                images = self._decode(images[0], headers[0])[np.newaxis]  # as nearly always
            else:
                images = np.stack(await self._decode_all(images, headers, deadline))
        batchers = self.pixels if images.dtype == np.uint8 else await self._for_tensors(deadline)
        decoded = self.clock()
        batcher = batchers.default if defense is None else batchers.per_client
        if len(images) <= batcher.max_size:
            served = await batcher(images, defense, deadline)
        else:
            served = await self._in_parts(batcher, images, defense, deadline)
        if deadline.client.gone:
            raise ClientGone(GONE)
        return Answered(served, decode_start, decoded)

    async def _in_parts(
        self, batcher: Batcher, batch: Batch, defense: Defense | None, deadline: Deadline
    ) -> BatchResult:
        """Split a large request, so that other requests can run between its parts."""
        if len(batch) > self.limits.max_queue:
            raise Unprocessable(
                f"request has {len(batch)} images; "
                f"the queue of this server has room for {self.limits.max_queue}"
            )
        size = batcher.max_size
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        served = await batcher.all(parts, defense, deadline)
        return BatchResult(
            np.concatenate([part.probabilities for part in served]),
            max(part.queue_s for part in served),
            sum(part.infer_s for part in served),
            sum(part.defend_s for part in served),
            joined_marks([part.marks for part in served]),
        )

    def count(
        self, context: RequestContext, answered: Answered, start: float, read: float, back: float
    ) -> None:
        """Count an answer that has been written, and the time of its stages."""
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
            context.stages = Stages(start, read, decode_start, decoded, back, end, *served[1:4])


def joined_marks(marks: list[Marks | None]) -> Marks | None:
    """The marks of all parts of a request; None if there are none."""
    known = [part for part in marks if part is not None]
    return np.concatenate(known) if known else None  # one defense: all parts have some, or none


def _work(data: bytes, header: Header) -> int:
    """The work of decoding a file, in pixels and bytes of a plain one."""
    work = header.width * header.height + len(data)
    return work if header.channels else work * FACTORS.get(header.format, NOT_PLAIN)


def _milliseconds(value: bytes) -> int:
    """The deadline of the client.

    Raises:
        Unprocessable: not a whole number of milliseconds, or 0.
    """
    text = value.decode("latin-1").strip()
    found = small_number(text)
    if not found:
        raise Unprocessable(
            f"X-Deadline-Ms is {text[:20]!r}; allowed: a whole number of milliseconds from 1"
        )
    return found
