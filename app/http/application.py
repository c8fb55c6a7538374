"""Routes and errors of the public port, around a `Service`.

Endpoints take the request and return the response: validation by FastAPI's models would cost more
than a small network. Predictions bypass FastAPI's stack and router. The OpenAPI document describes
every route, and all routes share one format of errors.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app import errors
from app.access import admission
from app.endpoint_type import Endpoint
from app.http import schemas
from app.http.fast_path import DirectPredictions
from app.http.middleware import Dispatch, Observe
from app.http.prediction import Service
from app.http.prefix_and_cors import Cors, Prefix
from app.http.protocols import v1, v2_routes
from app.http.routing import Route, problems
from app.request_context import request_context

if TYPE_CHECKING:
    from app.inference.bundle import Card
    from app.inference.upstream.pass_through_models import Passed
    from app.telemetry.tracing import Tracing

MOST_TEXT = 64  # characters of a name in a path
log = logging.getLogger("scumble")


class Fronted(FastAPI):
    """FastAPI behind a table of routes that are answered without its stack and router.

    Attributes:
        hot: (method, path) -> endpoint; the same endpoints are also routes of FastAPI.
        front: called with every request.
    """

    hot: Mapping[tuple[str, str], Endpoint]
    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI call."""
        # Clients of the V2 protocol write its paths with and without a trailing slash.
        path = scope.get("path", "")
        if path[-1:] == "/" and len(path) > 1:
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self.front(scope, receive, send)

    async def route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request to FastAPI."""
        if scope.get("method") == "HEAD":  # the server drops the body of the answer
            scope = {**scope, "method": "GET"}
        await super().__call__(scope, receive, send)


class Direct(APIRoute):
    """A route that calls its endpoint with the request, without FastAPI's validation."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The endpoint itself."""
        return self.endpoint


def build(
    service: Service,
    *,
    access_log: bool = False,
    tracing: Tracing | None = None,
    root_path: str = "",
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        service: answers.
        access_log: log every request.
        tracing: makes spans of requests.
        root_path: a prefix that paths may have.
        cors_origins: origins whose web pages may send requests.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with (
            service.audit.running() if service.audit else nullcontext(),
            service.access.running() if service.access else nullcontext(),
            service.files.running() if service.files else nullcontext(),
            service.upstream.running() if service.upstream else nullcontext(),
        ):
            ending = threading.Event()
            preparing = asyncio.create_task(asyncio.to_thread(service.prepare, ending.is_set))
            yield
            ending.set()
            await preparing
        service.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    async def refused(request: Request, exc: Exception) -> Response:
        error = exc if isinstance(exc, errors.RequestError) else _translated(exc, request)
        service.metrics.rejections[error.reason].inc()
        request_context(request.scope).refusal = error.reason
        return Response(error.body(), error.status, error.headers, media_type=errors.MEDIA_TYPE)

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Exception as exc:  # noqa: BLE001  # our faults are answered like refusals
                return await refused(request, exc)

        return answer

    app = Fronted(
        title="Scumble",
        summary="A black box: images in, probabilities out.",
        version=service.card.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would trust the Host header
        exception_handlers={HTTPException: refused},
    )
    app.router.route_class = Direct
    passed = service.pass_through.models if service.pass_through else {}
    hot, labels = {}, {"/openapi.json": "/openapi.json"}
    for path, method, endpoint, description in routes(service):
        if service.access is not None:
            endpoint = service.access.guard(path, endpoint)
            _describe_access(path, description)
        if service.audit is not None and method == "POST":
            if "{model}" in path:
                endpoint = _naming(service.card, passed, endpoint)
            endpoint = service.audit.guard(path, endpoint)
        app.add_api_route(path, guarded(endpoint), methods=[method], **description)
        plain = path.format(model=service.card.name, version=service.card.version)
        labels[plain] = path
        for name in passed:
            if "{version}" not in path:  # which the upstream may have any of
                labels[path.format(model=name)] = path
        # A version of the upstream is another than the card's: the endpoint needs the path.
        if method == "POST" and not (service.card.name in passed and "{version}" in path):
            hot[method, plain] = endpoint
    app.hot = hot
    dispatch = Dispatch(hot, refused, app.route)
    observed = Observe(
        Cors(dispatch, cors_origins) if cors_origins else dispatch,
        metrics=service.metrics,
        routes=labels,
        access_log=access_log,
        linked=access_log
        or tracing is not None
        or service.audit is not None
        or service.upstream is not None,
        tracing=tracing,
        untraced=admission.OPEN,
    )
    # Where nothing but the service itself must see a request, small images need no ASGI call.
    alone = service.upstream is None and tracing is None and not access_log
    alone = alone and not root_path and not cors_origins
    app.state.direct = DirectPredictions(service, observed) if alone else None
    app.front = Prefix(observed, root_path) if root_path else observed
    app.servers = [{"url": root_path}] if root_path else []
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # as FastAPI documents it
    app.state.service = service
    return app


def routes(service: Service) -> list[Route]:
    """All routes of the public port."""
    return [
        *v1.routes(service),
        (
            "/livez",
            "GET",
            service.live,
            {
                "summary": "The process answers",
                "operation_id": "livez",
                "responses": {200: {"model": schemas.Health}},
            },
        ),
        (
            "/readyz",
            "GET",
            service.ready,
            {
                "summary": "The model is loaded, tested and warm, and the service is not draining",
                "operation_id": "readyz",
                "responses": {
                    200: {"model": schemas.Health},
                    503: {"model": schemas.Health, "description": "draining"},
                },
            },
        ),
        *v2_routes.routes(service),
    ]


def _naming(card: Card, passed: Mapping[str, Passed], endpoint: Endpoint) -> Endpoint:
    """The endpoint; the audit log names the model that is asked, also if there is none of it."""

    async def named(request: Request) -> Response:
        name = request.path_params.get("model")
        if name is not None:  # a hot route is the served model's
            version = request.path_params.get("version")
            request_context(request.scope).facts = _asked(card, passed.get(name), name, version)
        return await endpoint(request)

    return named


def _asked(
    card: Card, model: Passed | None, name: str, version: str | None
) -> Mapping[str, str | None] | None:
    """What the audit log says of the model in a path; None for the served one."""
    if model is not None and not model.served:
        return model.facts
    served = card.version if model is None else model.network.sent.version
    if (model is not None or name == card.name) and version in (None, served):
        return None
    return {
        "model": name[:MOST_TEXT],
        "version": None if version is None else version[:MOST_TEXT],
    }


def _translated(exc: Exception, request: Request) -> errors.RequestError:
    """Starlette's HTTP errors and unexpected exceptions as problem details."""
    if isinstance(exc, HTTPException):
        if exc.status_code == 404:
            return errors.NotFound("no such route; /openapi.json lists all routes")
        if exc.status_code == 405:
            allowed = (exc.headers or {}).get("Allow", "")
            if allowed == "GET":
                allowed = "GET, HEAD"
            detail = f"method {request.method[:20]} is not allowed here; allowed: {allowed}"
            return errors.MethodNotAllowed(detail, {"Allow": allowed})
        return errors.BadFraming(str(exc.detail))
    log.error("unexpected error", exc_info=exc, extra={"id": request_context(request.scope).id})
    return errors.Internal("unexpected error; see the log for this request's id")


def _describe_access(path: str, description: dict[str, Any]) -> None:
    """Add the responses of keys and budgets to a route's description."""
    if path not in admission.OPEN:
        description.setdefault("responses", {}).update(problems(401, 403, 429, 503))
        description.setdefault("openapi_extra", {})["security"] = [{"bearer": []}, {"header": []}]


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document plus the schemas that only the routes' descriptions refer to."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            routes=app.routes,
            servers=app.servers or None,
        )
        extra: list[type[BaseModel]] = [
            schemas.PredictForm,
            schemas.PredictRequest,
            schemas.InferRequest,
            schemas.Problem,
        ]
        _, definitions = models_json_schema(
            [(model, "validation") for model in extra],
            ref_template="#/components/schemas/{model}",
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        if app.state.service.access is not None:
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        app.openapi_schema = document
    return app.openapi_schema
