"""What is answered without the application is answered as the application would."""

import asyncio
import re
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import orjson
import pytest

from app.access.keys import KeyFile, write_keys
from app.access.stores import StoreError
from app.audit.log import Audit
from app.errors import Internal, Unavailable
from app.http.application import build
from app.inference.batching import Batcher, Batchers
from app.main import create_app
from app.settings import Settings
from tests.app.access.test_admission import row
from tests.app.http.test_connection_state import Host, on_a_loop, turns
from tests.app.http.test_withheld import ALL, withholding
from tests.pictures import PNG, encoded, picture

START = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: a1\r\n"
LARGE = encoded(picture(64, 64), "PNG")


def asked(body=PNG, kind=b"image/png", *more, start=START):
    lines = [b"Content-Type: " + kind, b"Content-Length: %d" % len(body), *more]
    return start + b"\r\n".join(lines) + b"\r\n\r\n" + body


class Served:
    """A real application behind connections, and how many requests reached it."""

    def __init__(self, app, direct):
        self.app, self.service = app, app.state.service
        self.calls = 0
        self.host = Host(self, direct=direct)
        self.metrics = self.service.metrics

    async def __call__(self, scope, receive, send):
        self.calls += 1
        await self.app(scope, receive, send)

    async def answered(self, *pieces, statuses=1):
        """What one connection gets for some bytes."""
        _, peer = self.send(*pieces)
        return await self.written(peer, statuses)

    def send(self, *pieces):
        connection, peer = self.host.connect()
        for piece in pieces:
            connection.data_received(piece)
        return connection, peer

    async def written(self, peer, statuses=1):
        for _ in range(10_000):
            if len(peer.statuses) >= statuses:
                break
            await asyncio.sleep(0.001)
        await turns()
        return peer.written

    def counted(self, name, **labels):
        self.metrics.flush()
        return self.metrics.registry.get_sample_value(f"scumble_{name}", labels)


@asynccontextmanager
async def served(models=None, *, without=False, **settings):
    app = create_app(Settings(**{"model_dir": models, "model": "tiny", **settings}))
    assert app.state.direct is not None
    async with app.router.lifespan_context(app):
        yield Served(app, None if without else app.state.direct)


TAKEN = {
    "png": [asked()],
    "jpeg": [asked(encoded(picture(), "JPEG"), b"image/jpeg")],
    "webp": [asked(encoded(picture(), "WEBP"), b"image/webp")],
    "another size": [asked(encoded(picture(20, 11)))],
    "no id": [asked(start=START.replace(b"X-Request-ID: a1\r\n", b""))],
    "an id of the wrong form": [asked(start=START.replace(b"a1", b"a 1"))],
    "one connection, two after another": [asked(), asked(start=START.replace(b"a1", b"a2"))],
    "sent ahead": [asked() + asked(start=START.replace(b"a1", b"a2"))],
    "close": [asked(PNG, b"image/png", b"Connection: close")],
    "chunked": [
        START + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG)
    ],
}
NOT_TAKEN = {
    "in two pieces": [asked()[:-5], asked()[-5:]],
    "top_k": [asked(start=START.replace(b"predict", b"predict?top_k=2"))],
    "wrong top_k": [asked(start=START.replace(b"predict", b"predict?top_k=x"))],
    "a slash": [asked(start=START.replace(b"predict", b"predict/"))],
    "another method": [START.replace(b"POST", b"GET") + b"\r\n"],
    "another path": [asked(start=START.replace(b"predict", b"other"))],
    "a deadline": [asked(PNG, b"image/png", b"X-Deadline-Ms: 60000")],
    "a wrong deadline": [asked(PNG, b"image/png", b"X-Deadline-Ms: x")],
    "an encoding": [asked(PNG, b"image/png", b"Content-Encoding: gzip")],
    "no type": [asked(PNG, b"")],
    "an unknown type": [asked(PNG, b"text/plain")],
    "capitals": [asked(PNG, b"Image/PNG")],
    "json": [asked(b'{"instances": []}', b"application/json")],
    "nothing": [asked(b"")],
    "large": [asked(LARGE)],
    "no image": [asked(b"no image")],
    "a broken image": [asked(PNG[:-20] + b"x" * 20)],
    "too many pixels": [asked(encoded(picture(40, 40, "L")))],
}


def without_random(written):
    written = re.sub(rb'"id":"[0-9a-f]{16}"', b"", written)
    return re.sub(rb"(x-request-id:) [0-9a-f]{16}", rb"\1", written)


@pytest.mark.parametrize("pieces", [*TAKEN.values(), *NOT_TAKEN.values()], ids=[*TAKEN, *NOT_TAKEN])
@on_a_loop
async def test_the_bytes_are_those_of_the_application(models, pieces):
    limits = {"max_pixels": 1000}
    found = []
    requests = b"".join(pieces).count(b" HTTP/1.1")
    taken = pieces in TAKEN.values()
    for without in (False, True):
        async with served(models, without=without, limits=limits) as server:
            found.append(without_random(await server.answered(*pieces, statuses=requests)))
            assert server.host.memory.held == 0
            assert server.counted("inflight") == 0
        if taken and pieces is not TAKEN["sent ahead"]:
            assert server.calls == (requests if without else 0)
        if not taken:
            assert server.calls == requests
    assert found[0] == found[1]
    assert found[0].startswith(b"HTTP/1.1 200") or not taken


@on_a_loop
async def test_counts_and_stages_are_those_of_the_application(models):
    found = []
    for without in (False, True):
        async with served(models, without=without) as server:
            for _ in range(3):
                await server.answered(asked())
            await server.answered(asked(b"no image"))
            stages = {
                stage: server.counted("stage_seconds_count", stage=stage)
                for stage in server.metrics.stage
            }
            found.append(
                (
                    stages,
                    server.counted("requests_total", route="/v1/predict", code="200"),
                    server.counted("requests_total", route="/v1/predict", code="422"),
                    server.counted("rejections_total", reason="unprocessable"),
                    server.counted("request_seconds_count", route="/v1/predict"),
                    server.counted("images_total", model="tiny", precision="float32"),
                    server.counted("batch_size_sum"),
                    server.counted("inflight"),
                    server.counted("queue_depth"),
                )
            )
    assert found[0] == found[1]
    assert found[0][0] == dict.fromkeys(found[0][0], 3)


@pytest.mark.parametrize(
    "settings",
    [{"access_log": True}, {"root_path": "/a"}, {"cors_origins": ["https://a.example"]}],
    ids=lambda settings: next(iter(settings)),
)
def test_where_others_must_see_a_request_none_is_taken(models, settings):
    app = create_app(Settings(model_dir=models, model="tiny", **settings))
    assert app.state.direct is None


@on_a_loop
async def test_with_a_deadline_of_the_server_none_is_taken(models):
    async with served(models, limits={"deadline_ms": 60_000}) as server:
        assert b"200 OK" in await server.answered(asked())
        assert server.calls == 1


@on_a_loop
async def test_a_full_queue_is_told_by_the_application(models):
    async with served(models, limits={"max_queue": 1}, batch={"max_size": 1}) as server:
        peers = [server.send(asked())[1] for _ in range(2)]
        answers = [await server.written(peer) for peer in peers]
        assert [peer.statuses for peer in peers] == [[200], [503]]
        assert b"retry-after: " in answers[1]
        assert server.calls == 1
        assert server.counted("rejections_total", reason=Unavailable.reason) == 1
        assert server.counted("inflight") == 0


@on_a_loop
async def test_a_batch_that_fails_is_told_by_the_application(models):
    def failing(batch):
        raise ValueError("engine")

    service = create_app(Settings(model_dir=models, model="tiny")).state.service
    batcher = Batcher(failing, service.metrics, max_size=8, max_queue=8)
    app = build(replace(service, pixels=Batchers(batcher, batcher)))
    server = Served(app, app.state.direct)
    written = await server.answered(asked())
    assert written.startswith(b"HTTP/1.1 500")
    assert server.calls == 1
    assert server.counted("rejections_total", reason=Internal.reason) == 1
    assert server.counted("inflight") == 0
    assert server.host.memory.held == 0


@on_a_loop
async def test_a_client_that_leaves_is_skipped_and_its_memory_freed(models):
    async with served(models) as server:
        connection, peer = server.send(asked())
        assert server.host.memory.held > 0
        connection.connection_lost(None)
        assert server.host.memory.held == 0
        await turns(40)
        assert peer.written == b""
        assert server.counted("rejections_total", reason="gone") == 1
        assert server.counted("images_total", model="tiny", precision="float32") in (None, 0)
        assert server.counted("inflight") == 0


@on_a_loop
async def test_a_slow_reader_gets_its_answer_once_it_reads(models):
    async with served(models) as server:
        connection, peer = server.send(asked())
        connection.flow.pause_writing()
        await turns(40)
        assert peer.written == b""
        assert server.counted("inflight") == 1
        connection.flow.resume_writing()
        written = await server.written(peer)
        assert written.startswith(b"HTTP/1.1 200")
        assert b"x-request-id: a1" in written
        await turns()
        assert server.counted("inflight") == 0
        assert server.counted("request_seconds_count", route="/v1/predict") == 1


@on_a_loop
async def test_a_draining_server_closes_the_connection(models):
    async with served(models) as server:
        server.host.state.draining = True
        _, peer = server.send(asked())
        assert b"\r\nconnection: close\r\n\r\n{" in await server.written(peer)
        assert peer.closing


@on_a_loop
async def test_requests_of_one_turn_share_a_batch(models):
    async with served(models) as server:
        peers = [server.send(asked())[1] for _ in range(8)]
        for peer in peers:
            await server.written(peer)
        assert server.counted("batch_size_count") == 1
        assert server.counted("batch_size_sum") == 8


KEYED = START + b"X-API-Key: %b\r\n"


def with_key(name, body=PNG):
    return [asked(body, start=KEYED % name)]


# Key, status, and whether it is answered without the application.
KEYS = {
    "with budgets": (b"five", PNG, 200, True),
    "without budgets": (b"plain", PNG, 200, True),
    "with its own defense": (b"label", PNG, 200, True),
    "withheld": (b"withheld", PNG, 200, True),
    "spent": (b"spent", PNG, 429, False),
    "unknown": (b"unknown", PNG, 401, False),
    "revoked": (b"gone", PNG, 403, False),
    "for another route": (b"narrow", PNG, 403, False),
    "no image": (b"five", b"no image", 422, False),
    "a broken image": (b"five", PNG[:-20] + b"x" * 20, 422, False),
}


@pytest.fixture(scope="module")
def calibrated(models, tmp_path_factory):
    """A model folder whose bundle can withhold answers."""
    return withholding(models, tmp_path_factory.mktemp("calibrated"))


@pytest.fixture
def protections(calibrated, tmp_path):
    """Settings of keys, budgets in SQLite and an audit log; new files for each call."""
    numbers = count()

    def make(**more):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        keys = (
            row("five", limits={"window_images": 5, "window_s": 86400, "total_images": 9}),
            row("plain"),
            row("label", defense="label", limits={"total_images": 5}),
            row("withheld", defense="withhold", defense_params=ALL, limits={"total_clean": 5}),
            row("spent", limits={"total_images": 0}),
            row("gone", revoked="2026-01-02T00:00:00+00:00"),
            row("narrow", routes=["/v1/model"]),
        )
        write_keys(folder / "keys.json", KeyFile(keys=keys))
        files = {"keys_file": folder / "keys.json", "audit_file": folder / "audit"}
        files |= {"model_dir": calibrated, "secret": "a-key-of-16-bytes"}
        return {"workers": 1, "store": f"sqlite://{folder}/b.db", **files, **more}

    return make


def lines(settings):
    """What the audit log says, without times, ids and seals."""
    found = settings["audit_file"].with_name("audit.worker-0").read_bytes().splitlines()
    entries = [orjson.loads(line) for line in found]
    changing = {"time", "chain", "prev", "seal", "pid"}
    return [{k: v for k, v in entry.items() if k not in changing} for entry in entries]


def without_times(written):
    return re.sub(rb";t=\d+", b"", without_random(written))


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@on_a_loop
async def test_protected_answers_and_audit_lines_are_those_of_the_application(
    protections, on_failure
):
    found = []
    for without in (False, True):
        settings = protections(audit_on_failure=on_failure)
        answers = []
        async with served(without=without, **settings) as server:
            for key, body, status, direct in KEYS.values():
                calls = server.calls
                written = await server.answered(*with_key(key, body))
                answers.append(without_times(written))
                assert written.startswith(b"HTTP/1.1 %d" % status), (key, written)
                assert server.calls == calls + (without or not direct), key
            assert server.counted("inflight") == server.host.memory.held == 0
            counts = [
                server.counted("client_images_total", client="five"),
                server.counted("client_refused_total", client="spent"),
                server.counted("client_withheld_images_total", client="withheld"),
                server.counted("client_budget_left_images", client="five", budget="total"),
            ]
        found.append((answers, lines(settings), counts))
    assert found[0] == found[1]
    assert len(found[0][1]) == 1 + len(KEYS)
    assert found[0][2] == [1, 1, found[0][2][2], 8]


@on_a_loop
async def test_charges_of_one_turn_are_one_transaction_and_share_batches(protections):
    async with served(**protections()) as server:
        ran = []
        server.service.access.store._db.set_trace_callback(ran.append)
        sent = [server.send(*with_key(b"five"))[1] for _ in range(8)]
        statuses = [re.findall(rb"HTTP/1.1 (\d+)", await server.written(peer)) for peer in sent]
        assert statuses == [[b"200"]] * 5 + [[b"429"]] * 3
        assert [sum(s.startswith(word) for s in ran) for word in ("BEGIN", "SELECT")] == [1, 2]
        assert server.counted("batch_size_sum") == 5
        assert server.counted("batch_size_count") == 2  # 4, which engines are fast at, and 1


class FullDisk:
    """An audit log's sink that takes nothing while it is full."""

    full = False

    def append(self, entries):
        if self.full:
            raise OSError(28, "No space left on device")

    def close(self):
        pass


@on_a_loop
async def test_an_answer_whose_line_is_not_written_does_not_leave_and_is_refunded(protections):
    app = create_app(
        Settings(
            model="tiny",
            **protections(audit_on_failure="closed", store="memory://"),
        )
    )
    disk, metrics = FullDisk(), app.state.service.metrics
    audit = Audit(
        disk, facts={}, policy=None, closed=True,
        written=metrics.audit_written, lost=metrics.audit_lost,
    )  # fmt: skip
    app = build(replace(app.state.service, audit=audit))
    server = Served(app, app.state.direct)
    async with app.router.lifespan_context(app):
        disk.full = True
        lost = await server.answered(*with_key(b"five"))
        refused = await server.answered(*with_key(b"five"))
        assert [lost[:12], refused[:12]] == [b"HTTP/1.1 503"] * 2
        assert b"probabilities" not in lost
        assert server.counted("audit_lines_total", outcome="lost") == 2
        disk.full = False
        await audit.ready()
        assert b'"total";r=8' in await server.answered(*with_key(b"five"))
        assert server.counted("inflight") == 0


class HeldDisk(FullDisk):
    """One that writes nothing before it is told to."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def append(self, entries):
        self.begun.set()
        assert self.go.wait(10)


@on_a_loop
async def test_a_client_that_leaves_with_requests_ahead_ends_no_other_answer(protections):
    app = create_app(Settings(model="tiny", **protections(audit_on_failure="closed")))
    disk, metrics = HeldDisk(), app.state.service.metrics
    audit = Audit(
        disk, facts={}, policy=None, closed=True,
        written=metrics.audit_written, lost=metrics.audit_lost,
    )  # fmt: skip
    app = build(replace(app.state.service, audit=audit))
    server = Served(app, app.state.direct)
    async with app.router.lifespan_context(app):
        leaving, left = server.send(with_key(b"plain")[0] * 2)
        _, staying = server.send(*with_key(b"plain"))
        assert await asyncio.to_thread(disk.begun.wait, 10)
        leaving.connection_lost(None)
        left.write = _closed
        disk.go.set()
        assert (await server.written(staying)).startswith(b"HTTP/1.1 200")
        assert left.written == b""
        assert server.counted("inflight") == server.host.memory.held == 0


@on_a_loop
async def test_an_answer_that_cannot_be_written_ends_no_other_answer(protections):
    server = Served(app := create_app(Settings(model="tiny", **protections())), app.state.direct)
    async with app.router.lifespan_context(app):
        broken, closed = server.send(*with_key(b"plain"))
        closed.write = _closed
        _, staying = server.send(*with_key(b"plain"))
        assert (await server.written(staying)).startswith(b"HTTP/1.1 200")
        assert closed.written == b""
        broken.connection_lost(None)  # as the aborted transport says
        assert server.counted("inflight") == server.host.memory.held == 0


def _closed(data):
    raise RuntimeError("the handler is closed")  # as uvloop's transports do


@on_a_loop
async def test_what_is_charged_and_not_answered_is_refunded(protections):
    full = {"limits": {"max_queue": 1}, "batch": {"max_size": 1}}
    async with served(**protections(**full)) as server:
        sent = [server.send(*with_key(b"five"))[1] for _ in range(3)]
        answers = [await server.written(peer) for peer in sent]
        assert sorted(peer.statuses for peer in sent) == [[200], [503], [503]], answers
        assert b'"total";r=7' in await server.answered(*with_key(b"five"))


@on_a_loop
async def test_a_client_that_leaves_before_its_charge_is_refunded(protections):
    async with served(**protections()) as server:
        connection, peer = server.send(*with_key(b"five"))
        connection.connection_lost(None)
        for _ in range(1000):
            if server.counted("rejections_total", reason="gone"):
                break
            await asyncio.sleep(0.001)
        assert peer.written == b""
        assert b'"total";r=8' in await server.answered(*with_key(b"five"))
        assert server.host.memory.held == 0


class Away:
    """A store that does not answer."""

    def charge_soon(self, buckets, images, done):
        done(StoreError("away"))

    async def charge(self, buckets, images):
        raise StoreError("away")

    async def close(self):
        pass


@on_a_loop
async def test_a_store_that_is_away_fails_closed(protections):
    async with served(**protections()) as server:
        access = server.service.access
        store, access.store = access.store, Away()
        assert (await server.answered(*with_key(b"five"))).startswith(b"HTTP/1.1 503")
        assert (await server.answered(*with_key(b"plain"))).startswith(b"HTTP/1.1 200")
        assert server.counted("store_failures_total") == 1
        access.store = store


@on_a_loop
async def test_a_slow_reader_of_a_keyed_answer_gets_its_budget(protections):
    async with served(**protections()) as server:
        connection, peer = server.send(*with_key(b"five"))
        connection.flow.pause_writing()
        for _ in range(1000):
            if server.calls:
                break
            await asyncio.sleep(0.001)
        connection.flow.resume_writing()
        written = await server.written(peer)
        assert b'ratelimit: "window";r=4' in written
        assert b"x-request-id: a1" in written
