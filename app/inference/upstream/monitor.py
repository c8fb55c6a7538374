"""Compares what replicas answer to the golden inputs with what the bundle recorded.

A replica is asked at start, then periodically, after each failure, and when a request needed a new
connection to it, since another server may be behind the same address by then. A replica that
answers otherwise, or with another version, is sent nothing more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np

from app.inference.bundle import Golden, InputShape, golden_inputs
from app.inference.engines import Probs
from app.inference.upstream.client import Replica, UpstreamClient, UpstreamFailure
from app.inference.upstream.network_interface import InvalidAnswer, Network, OtherNetwork
from app.inference.upstream.v2_messages import read_json
from app.system.background import repeat, start

TICK_S = 0.05
RECHECK_S = 1.0  # between two checks of a replica that closes each connection, at most
CHANGED_S = 5.0  # between two checks of a replica that is not the expected network, at most
START_S = 2.0  # how long the start waits for the first checks
log = logging.getLogger("scumble")


class Monitor:
    """Keeps the state of the replicas of a client.

    Args:
        client: of the replicas.
        network: reads their answers.
        shape: of the images.
        golden: what they must answer.
        every_s: seconds between two checks.
        clock: monotonic seconds.
        sleep: pauses.
    """

    def __init__(
        self,
        client: UpstreamClient,
        network: Network,
        shape: InputShape,
        golden: Golden,
        *,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client = client
        self._network = network
        self._images = golden_inputs(shape)
        self._expected = np.array(golden.probabilities["float32"], np.float32)
        self._tolerance = golden.tolerance["float32"]
        self._every_s = every_s
        self._clock = clock
        self._sleep = sleep
        self._tasks: set[asyncio.Task[object]] = set()
        self._due: dict[Replica, float] = {}
        self._last: dict[Replica, float] = {}
        self._running: dict[Replica, asyncio.Task[object]] = {}
        self._next: dict[Replica, asyncio.Task[object]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the client, check the replicas, and keep doing so."""
        await self._client.open()
        for replica in self._client.replicas:
            replica.recheck = self._recheck
        first = [self._begin(replica) for replica in self._client.replicas]
        await asyncio.wait(first, timeout=START_S)
        watching = asyncio.create_task(
            repeat("watching the upstream", self._turn, TICK_S, sleep=self._sleep)
        )
        try:
            yield
        finally:
            watching.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(watching, *self._tasks, return_exceptions=True)
            await self._client.close()

    async def check(self, replica: Replica) -> None:
        """Ask a replica for the golden outputs, and note what it is."""
        self._last[replica] = self._clock()
        self._due[replica] = self._clock() + self._every_s
        usable = replica.usable
        try:
            differs = await self._difference(replica)
        except OtherNetwork as exc:
            differs = str(exc)
        except (UpstreamFailure, InvalidAnswer) as exc:
            self._client.check_failed(replica, exc)
            return
        replica.circuit.close()
        replica.verified = True
        if differs != replica.changed and differs is not None:
            log.error("upstream model changed: %s", differs, extra={"upstream": replica.url})
        replica.changed = differs
        if differs is not None:
            self._due[replica] = self._clock() + min(self._every_s, CHANGED_S)
        if replica.usable and not usable:
            log.info("upstream ready", extra={"upstream": replica.url})
        replica.show()

    async def _difference(self, replica: Replica) -> str | None:
        """What differs from the card; None if nothing does.

        Raises:
            UpstreamFailure, InvalidAnswer: the replica gives no answer.
        """
        wanted = self._network.version
        rows, size = [], self._network.max_batch
        for i in range(0, len(self._images), size):
            part = self._images[i : i + size]
            given, version = await self._answer(replica, part)
            if wanted and not version:
                version = await self._version(replica, wanted)
            if wanted and version != wanted:
                return f"version is {version[:64]!r}, the card has {wanted!r}"
            rows.append(given)
        distance = float(np.abs(np.concatenate(rows) - self._expected).max())
        if distance <= self._tolerance:
            return None
        return f"its golden outputs are off by {distance:.2g}; allowed: {self._tolerance:.2g}"

    async def _answer(self, replica: Replica, part: np.ndarray) -> tuple[Probs, str]:
        network = self._network
        body, headers = network.request(part)
        url = replica.url + network.path
        answer = await self._client.send(
            replica, network.method, url, body, headers, self._client.timeout_s
        )
        found = network.read(answer, len(part), any_version=True)
        return found.rows, network.version_of(answer) if network.version else ""

    async def _version(self, replica: Replica, wanted: str) -> str:
        """The version that the metadata name, for servers whose answers name none."""
        answer = await self._client.send(
            replica, "GET", replica.url, None, {}, self._client.timeout_s
        )
        versions = read_json(answer.body).get("versions")
        named = [str(each) for each in versions] if isinstance(versions, list) else []
        return wanted if wanted in named else ", ".join(named)

    async def _turn(self) -> None:
        now = self._clock()
        for replica in self._client.replicas:
            if replica not in self._running and (
                replica.circuit.check_due
                or (replica.circuit.closed and now >= self._due.get(replica, 0))
            ):
                self._begin(replica)

    def _recheck(self, replica: Replica) -> asyncio.Task[object] | None:
        """A request needed a new connection; gives the check that its answer waits for."""
        if replica.closes:  # all do: a check for each would double the work of the server
            soon = self._last.get(replica, 0) + RECHECK_S
            self._due[replica] = min(self._due.get(replica, soon), soon)
            return None
        running = self._running.get(replica)
        if running is None:
            return self._begin(replica)
        if replica not in self._next:  # the server before may have answered the one that runs
            following = self._following(replica, running)
            self._next[replica] = start("checking the upstream", following, self._tasks)
        return self._next[replica]

    def _begin(self, replica: Replica) -> asyncio.Task[object]:
        task = start("checking the upstream", self.check(replica), self._tasks)
        self._running[replica] = task
        task.add_done_callback(lambda _: self._running.pop(replica, None))
        return task

    async def _following(self, replica: Replica, running: asyncio.Task[object]) -> None:
        await asyncio.wait({running})
        del self._next[replica]
        await self._begin(replica)
