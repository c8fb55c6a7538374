"""The routes of the V2 protocol: health, metadata and infer, also under the model's version.

Health responds with JSON, which KServe's client reads; Triton's only reads the status.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from app.endpoint_type import Endpoint
from app.errors import Unavailable
from app.http import schemas
from app.http.prediction import Service
from app.http.protocols.v2 import V2, metadata
from app.http.responses import json_response
from app.http.routing import DEADLINE_PARAMETER, Route, problems
from app.inference.bundle import Card

EXTENSIONS = ["binary_tensor_data", "classification"]


@dataclass(frozen=True)
class Inquiry:
    """The endpoints for health and metadata.

    Attributes:
        service: answers predictions.
        codec: checks the model and version in paths.
        release: of this software.
    """

    service: Service
    codec: V2
    release: str

    async def about(self, request: Request) -> Response:
        """`GET /v2`."""
        del request
        return json_response({"name": "scumble", "version": self.release, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        """`GET /v2/health/live`."""
        del request
        return json_response({"live": True, "ready": await self.service.not_ready_reason() is None})

    async def ready(self, request: Request) -> Response:
        """`GET /v2/health/ready`.

        Raises:
            Unavailable: the service is not ready.
        """
        await self._refuse_unless_ready()
        return await self.live(request)

    async def model(self, request: Request) -> Response:
        """`GET /v2/models/{model}`, and of its version.

        Raises:
            NotFound: another model or version.
        """
        self.codec.check_path(request)
        return json_response(metadata(self.service.card, floats=self.service.tensors is not None))

    async def model_ready(self, request: Request) -> Response:
        """`GET /v2/models/{model}/ready`, and of its version.

        Raises:
            NotFound: another model or version.
            Unavailable: the service is not ready.
        """
        self.codec.check_path(request)
        await self._refuse_unless_ready()
        return json_response({"name": self.service.card.name, "ready": True})

    async def _refuse_unless_ready(self) -> None:
        not_ready_reason = await self.service.not_ready_reason()
        if not_ready_reason:
            raise Unavailable(f"{not_ready_reason}; use another replica")


class OfModel(NamedTuple):
    """The endpoints of a model."""

    infer: Endpoint
    metadata: Endpoint
    ready: Endpoint


def routes(service: Service) -> list[Route]:
    """All V2 routes; those of the model exist with and without its version."""
    codec = V2(service.card, service.limits, service.executor)
    inquiry = Inquiry(service, codec, version("scumble"))
    of_model = OfModel(service.endpoint(codec), inquiry.model, inquiry.model_ready)
    names = [service.card.name]
    if service.pass_through is not None:
        # Imported here: it needs an extra of the distribution.
        from app.http.protocols.v2_pass_through import PassThroughEndpoints

        passed = PassThroughEndpoints(service, service.pass_through)
        of_model = OfModel(
            passed.infer(of_model.infer),
            passed.metadata(of_model.metadata),
            passed.ready(of_model.ready),
        )
        names += [name for name in service.pass_through.models if name not in names]
    return [
        _get("/v2", inquiry.about, "Name, version and extensions", "v2", schemas.About),
        _get("/v2/health/live", inquiry.live, "The process answers", "v2_live", schemas.V2Health),
        _get(
            "/v2/health/ready", inquiry.ready, "Not draining", "v2_ready", schemas.V2Health, 503
        ),
        *_of_model(of_model, service.card, names, "/v2/models/{model}", ""),
        *_of_model(
            of_model, service.card, names, "/v2/models/{model}/versions/{version}", "_version"
        ),
    ]  # fmt: skip


def _of_model(
    endpoints: OfModel, card: Card, names: list[str], path: str, suffix: str
) -> list[Route]:
    named = {"model": names, "version": [card.version]}
    if len(names) > 1:
        del named["version"]  # other models have others
    where = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", **({"enum": named[name]} if name in named else {})},
        }
        for name in ("model", "version")
        if f"{{{name}}}" in path
    ]
    parts: list[Route] = [
        _get(
            path,
            endpoints.metadata,
            "Inputs and outputs of the model",
            f"v2_model{suffix}",
            schemas.ModelMetadata,
            404,
        ),
        _get(
            f"{path}/ready",
            endpoints.ready,
            "The model takes requests",
            f"v2_model_ready{suffix}",
            schemas.ModelReady,
            404,
            503,
        ),
        (
            f"{path}/infer",
            "POST",
            endpoints.infer,
            {
                "summary": "Probabilities of a tensor of images (Open Inference Protocol v2)",
                "operation_id": f"infer{suffix}",
                "responses": {
                    200: {
                        "model": schemas.InferAnswer,
                        "description": "as JSON, or as JSON followed by the output's bytes",
                        "content": {"application/octet-stream": {}},
                    },
                    **problems(400, 404, 413, 415, 422, 503, 504),
                },
                "openapi_extra": {
                    "parameters": [LENGTH_HEADER, DEADLINE_PARAMETER],
                    "requestBody": INFER_BODY,
                },
            },
        ),
    ]
    for *_, description in parts:
        extra = description.setdefault("openapi_extra", {})
        extra["parameters"] = [*where, *extra.get("parameters", [])]
    return parts


def _get(
    path: str, endpoint: Endpoint, summary: str, operation: str, model: type, *refusals: int
) -> Route:
    responses: dict[int | str, dict[str, Any]] = {200: {"model": model}, **problems(*refusals)}
    description = {"summary": summary, "operation_id": operation, "responses": responses}
    return path, "GET", endpoint, description


LENGTH_HEADER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "bytes of the JSON, where the tensor's bytes follow it; 0: the body is one file",
    "schema": {"type": "integer", "minimum": 0},
}
INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
