"""The admin port: metrics, health, reload and the console, for all workers together.

The supervisor serves it, so a busy worker cannot delay it. It shows which answers the defense
changed, so it is bound to loopback by default.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import errors
from app.admin.console.guard import Guard
from app.admin.console.preview_process import PreviewProcess
from app.admin.console.routes import console_routes
from app.admin.workers import Workers
from app.http.connections import BodyMemory, Common, Connection, check_all
from app.http.responses import health, json_response
from app.settings import Settings
from app.telemetry.incidents import Incidents
from app.telemetry.metrics import FLUSH_S

MAX_CONNECTIONS = 256
TICKS_PER_CHECK = 10
SETTLED_S = 2 * FLUSH_S  # by then workers have written what they answered before a scrape


@dataclass
class State:
    """State of a server that never drains."""

    draining: bool = False


class AdminServer(uvicorn.Server):
    """uvicorn in the supervisor's event loop, with the connection limits of the public port.

    The supervisor handles signals.
    """

    def __init__(self, app: Starlette, settings: Settings, incidents: Incidents) -> None:
        common = Common(
            limits=settings.http,
            memory=BodyMemory(settings.bodies_bytes),
            state=State(),
            rejections=incidents.admin_rejections,
            max_connections=MAX_CONNECTIONS,
        )
        config = uvicorn.Config(
            app,
            http=partial(Connection, common),  # type: ignore[arg-type]  # only called, like a class
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        """Check for slow clients once a second; this is called ten times a second."""
        if counter % TICKS_PER_CHECK == 0:
            check_all(self.server_state, asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Install no signal handlers."""
        yield


class ProcessMetrics(Collector):
    """Memory, processor time and number of the worker processes."""

    def __init__(self, workers: Workers, proc: Path = Path("/proc")) -> None:
        self._workers = workers
        self._proc = proc

    def collect(self) -> Iterable[Metric]:
        """Read /proc for each worker; skip one that has just ended."""
        import os

        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        resident = GaugeMetricFamily(
            "scumble_worker_resident_bytes", "Resident memory of a worker.", labels=["worker"]
        )
        seconds = CounterMetricFamily(
            "scumble_worker_cpu_seconds_total", "Processor time of a worker.", labels=["worker"]
        )
        pids = self._workers.pids()
        for number, pid in pids.items():
            try:
                pages = int((self._proc / str(pid) / "statm").read_text().split()[1])
                stat = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            except (OSError, IndexError):
                continue
            resident.add_metric([str(number)], pages * page)
            seconds.add_metric([str(number)], (int(stat[11]) + int(stat[12])) / tick)
        count = GaugeMetricFamily("scumble_workers", "Running worker processes.", len(pids))
        return [resident, seconds, count]


class WorkerMetrics(MultiProcessCollector):
    """The workers' metrics, sorted by name, since their files are read in arbitrary order."""

    def collect(self) -> Iterable[Metric]:
        """Metrics summed over all workers."""
        return sorted(super().collect(), key=lambda metric: metric.name)  # type: ignore[no-untyped-call]  # no hints there


def create_admin(
    workers: Workers,
    metrics_dir: str,
    settings: Settings,
    incidents: Incidents,
    previews: PreviewProcess | None,
) -> Starlette:
    """Build the admin application; it includes the console if `previews` is given."""
    registry = CollectorRegistry()
    WorkerMetrics(registry, path=metrics_dir)  # type: ignore[no-untyped-call]  # no hints there
    registry.register(ProcessMetrics(workers))
    registry.register(incidents)

    async def metrics(request: Request) -> Response:
        del request
        await asyncio.sleep(SETTLED_S)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def live(request: Request) -> Response:
        del request
        return json_response({"status": "live"})

    async def ready(request: Request) -> Response:
        del request
        return health("ready" if workers.ready() else "not ready", workers.stale())

    async def reload(request: Request) -> Response:
        if "origin" in request.headers:  # sent by a web page in a browser on this machine
            error: errors.RequestError = errors.Forbidden("requests from web pages are not allowed")
        elif await workers.reload():
            return json_response({"status": "reloaded"})
        else:
            error = errors.Internal("the new model cannot be served; see the log")
        return Response(error.body(), error.status, media_type=errors.MEDIA_TYPE)

    routes: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/metrics": metrics,
        "/livez": live,
        "/readyz": ready,
    }
    served = [
        *(Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()),
        Route("/reload", reload, methods=["POST"]),
    ]
    middleware = []
    if previews is not None:
        served += console_routes(settings, workers, registry, previews)
        middleware = [Middleware(Guard, hosts=settings.admin_hosts)]
    admin = Starlette(
        routes=served,
        middleware=middleware,
        exception_handlers={
            HTTPException: _refused,
            errors.RequestError: _problem,
            Exception: _unexpected,
        },
    )
    admin.router.redirect_slashes = False  # to any host, by the Host header
    return admin


async def _refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101  # registered for nothing else
    allowed = (exc.headers or {}).get("Allow", "GET")
    error = (
        errors.MethodNotAllowed(f"allowed: {allowed}", {"Allow": allowed})
        if exc.status_code == 405
        else errors.NotFound("no such route; available: /metrics, /livez, /readyz and /reload")
    )
    return await _problem(request, error)


async def _unexpected(request: Request, exc: Exception) -> Response:
    del exc  # uvicorn logs it
    return await _problem(request, errors.Internal("unexpected error; see the log"))


async def _problem(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, errors.RequestError)  # noqa: S101  # registered for nothing else
    return Response(error.body(), error.status, error.headers, media_type=errors.MEDIA_TYPE)
