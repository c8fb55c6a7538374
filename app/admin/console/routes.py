"""The console's page and its endpoints, all on the admin port."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.admin.api_description import OPENAPI_FILE
from app.admin.console.facts import about, client_policies, policy
from app.admin.console.numbers import by_client, numbers
from app.admin.console.preview_process import WAITING, PreviewProcess
from app.admin.console.preview_request import PreviewRequest
from app.admin.workers import Workers
from app.errors import MEDIA_TYPE, ConfigError, NotFound, Unavailable, Unprocessable
from app.http.bodies import read_images, small_number
from app.http.responses import json_response
from app.inference.bundle import GOLDEN_COUNT
from app.inference.deadline import NO_DEADLINE
from app.inference.executor import BoundedExecutor
from app.settings import Settings

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
KEYS_OFF = "API keys are off: the service cannot tell clients apart, so it does not count them."


def console_routes(
    settings: Settings, workers: Workers, registry: CollectorRegistry, previews: PreviewProcess
) -> list[Route]:
    """Routes of the page, its static files and its JSON documents."""
    files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in STATIC.iterdir()}

    executor = BoundedExecutor(WAITING, WAITING * settings.limits.max_body_bytes)

    @lru_cache(maxsize=1)
    def facts(model_dir: Path) -> Response:
        return json_response(about(settings, model_dir))

    def served() -> str:
        """Differs after each reload and restart: the copy of the bundle is in another folder."""
        return hashlib.sha256(str(workers.model_dir()).encode()).hexdigest()[:16]

    async def page(request: Request) -> Response:
        del request
        return file("index.html")

    async def static(request: Request) -> Response:
        return file(request.path_params["name"])

    def file(name: str) -> Response:
        if name not in files:
            raise NotFound(f"no such file: {name[:64]!r}")
        content, kind = files[name]
        return Response(content, media_type=kind)

    async def describe(request: Request) -> Response:
        del request
        try:
            return facts(workers.model_dir())
        except ConfigError as exc:  # the served copy was removed
            raise Unavailable(str(exc)) from exc

    async def metrics(request: Request) -> Response:
        del request
        found = numbers(registry.collect(), workers.connections(), workers.pids())
        return json_response({"ready": workers.ready(), "served": served(), **found})

    async def clients(request: Request) -> Response:
        del request
        note = KEYS_OFF if settings.keys_file is None else ""
        found = by_client(registry.collect())
        policies = client_policies(settings.keys_file)
        for client in found:
            client["policies"] = policies.get(client["name"], [])
        return json_response({"clients": found, "note": note})

    async def schema(request: Request) -> Response:
        del request
        try:
            content = await asyncio.to_thread((workers.model_dir() / OPENAPI_FILE).read_bytes)
        except OSError as exc:
            raise Unavailable("no worker has described the API yet") from exc
        return Response(content, media_type="application/json")

    async def api_page(request: Request) -> Response:
        del request
        return file("api.html")

    async def preview(request: Request) -> Response:
        wanted = _preview_request(request, settings)
        image = b""
        if wanted.golden is None:
            limits = settings.limits
            images = await read_images(
                dict(request.scope["headers"]),
                request.receive,
                max_bytes=limits.max_body_bytes,
                max_images=1,
                executor=executor,
                deadline=NO_DEADLINE,
            )
            image = images[0]
        status, body = await previews(wanted, image)
        return Response(
            body, status, media_type="application/json" if status == 200 else MEDIA_TYPE
        )

    reads: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/": page,
        "/console/static/{name}": static,
        "/console/api": api_page,
        "/console/openapi.json": schema,
        "/console/about": describe,
        "/console/metrics": metrics,
        "/console/clients": clients,
    }
    return [
        *(Route(path, endpoint, methods=["GET"]) for path, endpoint in reads.items()),
        Route("/console/preview", preview, methods=["POST"]),
    ]


def _preview_request(request: Request, settings: Settings) -> PreviewRequest:
    query = request.query_params
    name, params = policy(settings, query.get("defense", ""), _object(query.get("params", "{}")))
    if "golden" not in query:
        return PreviewRequest(name, params)
    golden = small_number(query["golden"])
    if golden is None or not 1 <= golden <= GOLDEN_COUNT:
        raise Unprocessable(f"golden is {query['golden'][:20]!r}; allowed: 1 to {GOLDEN_COUNT}")
    return PreviewRequest(name, params, golden)


def _object(text: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise Unprocessable(f"params is not valid JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise Unprocessable("params must be a JSON object")
    return found
