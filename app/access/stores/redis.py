"""Budgets in Redis, for replicas on any number of nodes.

One Lua script does the charges of one turn of the event loop, one after another: Redis runs it
whole before anything else, with its own clock, in one round trip. All names share a hash tag, so
that a cluster keeps them on one node. Nothing is retried: a charge sent twice would count twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.access.stores import Bucket, Charge, Charged, Level, StoreError
from app.errors import ConfigError
from app.system.background import give, settle
from app.system.urls import redacted

TAG = "{scumble}:"
TIMEOUT_S = 1.0  # for each step: to get a connection, to connect, to get an answer
CONNECTIONS = 16  # per worker
TOGETHER = 64  # charges in one call, so that Redis serves others in between

# ARGV: for each charge its number of keys and its images, then limit and window in ms for each key.
# Returns for each charge whether it is granted, then for each key its images, the start of its
# window and the ms until the window ends.
CHARGE = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local answer, first, at = {}, 0, 0
while at < #ARGV do
  local keys, images = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local granted, used, start, window = 1, {}, {}, {}
  for i = 1, keys do
    local row = redis.call('HMGET', KEYS[first + i], 'used', 'start')
    window[i] = tonumber(ARGV[at + 2 * i + 2])
    used[i], start[i] = tonumber(row[1]) or 0, tonumber(row[2]) or now
    if window[i] > 0 and now >= start[i] + window[i] then
      used[i], start[i] = 0, now
    end
    if used[i] + images > tonumber(ARGV[at + 2 * i + 1]) then granted = 0 end
  end
  answer[#answer + 1] = granted
  for i = 1, keys do
    local key = KEYS[first + i]
    if granted == 1 then
      used[i] = used[i] + images
      redis.call('HSET', key, 'used', used[i], 'start', string.format('%.0f', start[i]))
      if window[i] > 0 then
        redis.call('PEXPIREAT', key, string.format('%.0f', start[i] + window[i]))
      else redis.call('PERSIST', key) end
    end
    answer[#answer + 1] = used[i]
    answer[#answer + 1] = start[i]
    answer[#answer + 1] = window[i] > 0 and start[i] + window[i] - now or 0
  end
  first, at = first + keys, at + 2 + 2 * keys
end
return answer
"""

# ARGV: images, then the start of the charged window for each key.
REFUND = """
for i, key in ipairs(KEYS) do
  local row = redis.call('HMGET', key, 'used', 'start')
  if row[1] and row[2] == ARGV[i + 1] then
    redis.call('HSET', key, 'used', math.max(0, tonumber(row[1]) - tonumber(ARGV[1])))
  end
end
"""


class RedisStore:
    """Counts in one hash per bucket, which expires with the bucket's window."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._charge = client.register_script(CHARGE)
        self._refund = client.register_script(REFUND)
        self._waiting: list[tuple[Sequence[Bucket], int, Charged]] = []
        self._calls: set[asyncio.Task[None]] = set()

    @classmethod
    def at(cls, url: str) -> RedisStore:
        """Make the store of `redis://[USER:PASSWORD@]HOST:PORT/DB`; connects at the first charge.

        Raises:
            ConfigError: the URL or an option in its query is invalid.
        """
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
            # Neither connects. The first charge would meet an option that is unknown or wrong.
            pool.make_connection()  # type: ignore[no-untyped-call]
            pool.get_encoder().encode("")  # type: ignore[no-untyped-call]
        except Exception as exc:  # a wrong option raises whatever its first use raises
            raise ConfigError(
                f"SCUMBLE_STORE is {redacted(url)!r}: invalid URL or query option: {exc}"
            ) from exc
        return cls(Redis.from_pool(pool))

    async def charge(self, buckets: Sequence[Bucket], images: int) -> Charge:
        """Add to all buckets or none."""
        future: asyncio.Future[Charge] = asyncio.get_running_loop().create_future()
        self.charge_soon(buckets, images, partial(settle, future))
        return await future

    def charge_soon(self, buckets: Sequence[Bucket], images: int, done: Charged) -> None:
        """The same without waiting."""
        self._waiting.append((buckets, images, done))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._send)

    async def refund(self, buckets: Sequence[Bucket], images: int, charge: Charge) -> None:
        """Take a charge back."""
        starts = [f"{level.start:.0f}" for level in charge.levels]
        await self._run(self._refund, buckets, [images, *starts])

    async def ping(self) -> None:
        """Charge no images, which also notices a Redis that refuses to write."""
        await self.charge([Bucket("ping", 1, 1)], 0)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _send(self) -> None:
        """Send what waits."""
        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), TOGETHER):
            call = asyncio.get_running_loop().create_task(
                self._charge_all(waiting[first : first + TOGETHER])
            )
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _charge_all(self, charges: Sequence[tuple[Sequence[Bucket], int, Charged]]) -> None:
        """Do several charges and say what became of each."""
        keys = [bucket for buckets, _, _ in charges for bucket in buckets]
        arguments: list[int] = []
        for buckets, images, _ in charges:
            arguments += len(buckets), images
            for bucket in buckets:
                arguments += bucket.limit, bucket.window_s * 1000
        results: list[Charge | Exception]
        try:
            answer = iter(await self._run(self._charge, keys, arguments))
            results = [_charge_of(answer, len(buckets)) for buckets, _, _ in charges]
        except Exception as exc:  # noqa: BLE001  # any error goes to those who wait
            results = [exc] * len(charges)
        for (_, _, done), result in zip(charges, results, strict=True):
            give(done, result)

    async def _run(self, script: Any, buckets: Sequence[Bucket], arguments: list[Any]) -> Any:
        try:
            return await script(keys=[TAG + bucket.key for bucket in buckets], args=arguments)
        except (RedisError, OSError) as exc:
            raise StoreError(f"redis: {type(exc).__name__}: {exc}") from exc


def _charge_of(answer: Iterator[Any], buckets: int) -> Charge:
    granted = bool(next(answer))
    levels = (
        Level(int(next(answer)), float(next(answer)), next(answer) / 1000) for _ in range(buckets)
    )
    return Charge(granted, tuple(levels))
