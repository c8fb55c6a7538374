"""The native protocol: its codec and its routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.errors import Unprocessable
from app.http import schemas
from app.http.bodies import Headers, read_images, small_number
from app.http.prediction import Flags, Service
from app.http.protocols.v2_tensors import most_images
from app.http.responses import json_response
from app.http.routing import DEADLINE_PARAMETER, Route, problems
from app.inference.bundle import Card
from app.inference.deadline import Deadline
from app.inference.engines import Probs
from app.inference.executor import BoundedExecutor
from app.inference.image_formats import FORMATS
from app.settings import LimitSettings

PREDICT = "/v1/predict"


@dataclass(slots=True)  # frozen would take three times as long to make
class PredictRequest:
    """A parsed request.

    Attributes:
        images: encoded files.
        top_k: how many classes to answer with; None for all.
    """

    images: list[bytes]
    top_k: int | None


class Answer(Response):
    """A JSON response without Starlette's rendering of bodies, charsets and cookies."""

    def __init__(self, body: bytes) -> None:
        # Starlette's __init__ takes as long as the rest of the answer.
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
        ]


@dataclass(frozen=True)
class V1:
    """The codec of `POST /v1/predict`.

    Attributes:
        card: the model's.
        limits: of a request.
        executor: parses large bodies.
    """

    card: Card
    limits: LimitSettings
    executor: BoundedExecutor

    async def read(self, request: Request, headers: Headers, deadline: Deadline) -> PredictRequest:
        """Read the images and `top_k`.

        Raises:
            RequestError: `top_k` or the body is invalid.
        """
        top_k = self._top_k(request) if request.scope["query_string"] else None
        images = await read_images(
            headers,
            request.receive,
            max_bytes=self.limits.max_body_bytes,
            max_images=self.limits.max_images,
            executor=self.executor,
            deadline=deadline,
        )
        return PredictRequest(images, top_k)

    def write(
        self,
        asked: PredictRequest,
        probabilities: Probs,
        request_id: str,
        abstained: Flags | None = None,
    ) -> Response:
        """One prediction per image."""
        return Answer(self.document(asked, probabilities, request_id, abstained))

    def document(
        self,
        asked: PredictRequest,
        probabilities: Probs,
        request_id: str,
        abstained: Flags | None = None,
    ) -> bytes:
        """The JSON of `write`."""
        labels, top_k = self.card.labels, asked.top_k
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
        if abstained is not None:
            for prediction, flag in zip(predictions, abstained.tolist(), strict=True):
                if flag:
                    prediction["abstained"] = True
        answer = {
            "model": self.card.name,
            "version": self.card.version,
            "id": request_id,
            "predictions": predictions,
        }
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    def _top_k(self, request: Request) -> int | None:
        text = request.query_params.get("top_k")
        if text is None:
            return None
        classes = len(self.card.labels)
        top_k = small_number(text)
        if top_k is None or not 1 <= top_k <= classes:
            raise Unprocessable(f"top_k is {text[:20]!r}; allowed: 1 to {classes}")
        return top_k


def routes(service: Service) -> list[Route]:
    """The routes under `/v1`."""

    async def model(request: Request) -> Response:
        """`GET /v1/model`: what a client needs to know; nothing about the defense."""
        del request
        return json_response(description)

    card = service.card
    description = {
        "name": card.name,
        "version": card.version,
        "labels": card.labels,
        "input": card.input.model_dump(),
        "formats": sorted(FORMATS),
        "limits": {
            **service.limits.model_dump(include=set(schemas.LimitsInfo.model_fields)),
            "max_tensor_images": most_images("UINT8", card, service.limits),
            "max_float_images": most_images("FP32", card, service.limits),
        },
    }
    return [
        (
            PREDICT,
            "POST",
            service.endpoint(V1(card, service.limits, service.executor)),
            {
                "summary": "Probabilities of images",
                "operation_id": "predict",
                "responses": {
                    200: {
                        "model": schemas.PredictAnswer,
                        "description": "one prediction per image",
                    },
                    **problems(400, 413, 415, 422, 503, 504),
                },
                "openapi_extra": _predict_extra(len(card.labels)),
            },
        ),
        (
            "/v1/model",
            "GET",
            model,
            {
                "summary": "Labels, input and limits of the model",
                "operation_id": "model",
                "responses": {200: {"model": schemas.ModelInfo}},
            },
        ),
    ]


def _predict_extra(classes: int) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "parameters": [
            {
                "name": "top_k",
                "in": "query",
                "required": False,
                "description": "send the k most probable classes instead of all probabilities",
                "schema": {"type": "integer", "minimum": 1, "maximum": classes},
            },
            {
                "name": "X-Request-ID",
                "in": "header",
                "required": False,
                "description": "taken over as the id and echoed; one of another form is replaced",
                "schema": {"type": "string"},
            },
            DEADLINE_PARAMETER,
        ],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(sorted(FORMATS), binary),
                "multipart/form-data": {"schema": {"$ref": "#/components/schemas/PredictForm"}},
                "application/json": {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
            },
        },
    }
