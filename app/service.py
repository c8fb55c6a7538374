"""One prediction, from bytes to response: read, decode, batch (infer, defend), encode.

Everything that the routes need is handed to `Service`; it knows nothing of FastAPI's machinery.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.batching import Batcher
from app.bodies import read_images
from app.bundle import Card
from app.decode import FORMATS, decode
from app.engines import Probs
from app.errors import Unprocessable
from app.metrics import Metrics
from app.settings import LimitSettings


@dataclass
class State:
    """What changes while the service runs."""

    draining: bool = False


@dataclass(frozen=True)
class Service:
    """Answers requests for one model.

    `images` is the metrics' counter of answered images of this model and precision.
    """

    card: Card
    limits: LimitSettings
    batcher: Batcher
    metrics: Metrics
    count_images: Callable[[int], None]
    state: State = field(default_factory=State)
    clock: Callable[[], float] = time.perf_counter

    async def predict(self, request: Request) -> Response:
        """`POST /v1/predict`.

        Raises:
            RequestError: the request is refused; nothing is counted as answered.
        """
        top_k = self._top_k(request)
        start = self.clock()
        images = await read_images(
            request.headers,
            request.receive,
            max_bytes=self.limits.max_body_bytes,
            max_images=self.limits.max_images,
        )
        read = self.clock()
        card = self.card
        rows = [
            decode(image, card.input, card.preprocessing, self.limits.max_pixels)
            for image in images
        ]
        batch = rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows)
        decoded = self.clock()
        served = await self.batcher(batch)
        back = self.clock()
        body = self._encode(request.scope["state"]["id"], served.probabilities, top_k)
        encoded = self.clock()

        stage = self.metrics.stage
        stage["read"].observe(read - start)
        stage["decode"].observe(decoded - read)
        stage["queue"].observe(served.queue_s)
        stage["infer"].observe(served.infer_s)
        stage["defend"].observe(served.defend_s)
        stage["encode"].observe(encoded - back)
        self.count_images(len(batch))
        return Response(body, media_type="application/json")

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
                "limits": self.limits.model_dump(exclude={"max_queue"}),
            }
        )

    async def live(self, request: Request) -> Response:
        """`GET /livez`: the event loop turns."""
        del request
        return json_response({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """`GET /readyz`: loaded, tested, warm, and not draining."""
        del request
        if self.state.draining:
            return json_response({"status": "draining"}, 503)
        return json_response({"status": "ready"})

    def _top_k(self, request: Request) -> int | None:
        text = request.query_params.get("top_k")
        if text is None:
            return None
        classes = len(self.card.labels)
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= classes):
            raise Unprocessable(f"top_k is {text[:20]!r}; allowed: 1 to {classes}")
        return int(text)

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


def json_response(document: object, status: int = 200) -> Response:
    """A small JSON answer."""
    return Response(orjson.dumps(document), status, media_type="application/json")
