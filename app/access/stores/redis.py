"""Budgets in Redis, for replicas on any number of nodes.

One Lua script does a charge: Redis runs it whole before anything else, with its own clock, in one
round trip. All names share a hash tag, so that a cluster keeps them on one node. Nothing is
retried: a charge sent twice would count twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.access.stores import Bucket, Charge, Level, StoreError
from app.errors import ConfigError
from app.system.urls import redacted

TAG = "{scumble}:"
TIMEOUT_S = 1.0  # for each step: to get a connection, to connect, to get an answer
CONNECTIONS = 16  # per worker

# ARGV: images, then limit and window in ms for each key. Returns granted, then for each key its
# images, the start of its window and the ms until the window ends.
CHARGE = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local images = tonumber(ARGV[1])
local granted, used, start, window = 1, {}, {}, {}
for i, key in ipairs(KEYS) do
  local row = redis.call('HMGET', key, 'used', 'start')
  window[i] = tonumber(ARGV[2 * i + 1])
  used[i], start[i] = tonumber(row[1]) or 0, tonumber(row[2]) or now
  if window[i] > 0 and now >= start[i] + window[i] then
    used[i], start[i] = 0, now
  end
  if used[i] + images > tonumber(ARGV[2 * i]) then granted = 0 end
end
local answer = {granted}
for i, key in ipairs(KEYS) do
  if granted == 1 then
    used[i] = used[i] + images
    redis.call('HSET', key, 'used', used[i], 'start', string.format('%.0f', start[i]))
    if window[i] > 0 then redis.call('PEXPIREAT', key, string.format('%.0f', start[i] + window[i]))
    else redis.call('PERSIST', key) end
  end
  answer[#answer + 1] = used[i]
  answer[#answer + 1] = start[i]
  answer[#answer + 1] = window[i] > 0 and start[i] + window[i] - now or 0
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
        limits = [value for b in buckets for value in (b.limit, b.window_s * 1000)]
        answer = await self._run(self._charge, buckets, [images, *limits])
        levels = (
            Level(int(used), float(start), reset_ms / 1000)
            for used, start, reset_ms in zip(answer[1::3], answer[2::3], answer[3::3], strict=True)
        )
        return Charge(bool(answer[0]), tuple(levels))

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

    async def _run(self, script: Any, buckets: Sequence[Bucket], arguments: list[Any]) -> Any:
        try:
            return await script(keys=[TAG + bucket.key for bucket in buckets], args=arguments)
        except (RedisError, OSError) as exc:
            raise StoreError(f"redis: {type(exc).__name__}: {exc}") from exc
