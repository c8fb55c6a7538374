"""`traceparent` and spans: what is taken over, what a collector gets, what a dead one does."""

import logging
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from app.errors import ConfigError
from app.main import create_app
from app.request_context import KEY, RequestContext
from app.settings import Settings
from app.system.installation import install_command
from app.telemetry.assembly import make_tracing
from app.telemetry.metrics import STAGES
from app.telemetry.stages import Stages
from app.telemetry.traceparent import read_traceparent
from app.telemetry.tracing import Tracing
from tests.pictures import PNG

HEADERS = {"Content-Type": "image/png"}
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"

READ = {
    GOOD: GOOD,
    f"00-{TRACE}-{SPAN}-00": f"00-{TRACE}-{SPAN}-00",
    f"01-{TRACE}-{SPAN}-01": GOOD,
    f"cc-{TRACE}-{SPAN}-01-what-will-be": GOOD,
    f"00-{TRACE}-{SPAN}-01-what-will-be": None,
    f"cc-{TRACE}-{SPAN}-01.what": None,
    f"ff-{TRACE}-{SPAN}-01": None,
    f"00-{'0' * 32}-{SPAN}-01": None,
    f"00-{TRACE}-{'0' * 16}-01": None,
    GOOD.upper(): None,
    GOOD[:-1]: None,
    f" {GOOD}": None,
    "": None,
}


@pytest.mark.parametrize("sent", READ)
def test_traceparent_is_read_as_the_recommendation_says(sent):
    assert read_traceparent([(b"x", b"y"), (b"traceparent", sent.encode())]) == READ[sent]


def test_none_and_two_are_none():
    assert read_traceparent([]) is None
    assert read_traceparent([(b"traceparent", GOOD.encode())] * 2) is None


@given(st.binary(max_size=80) | st.from_regex(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-.*"))
def test_whatever_is_sent_is_a_traceparent_or_none(value):
    found = read_traceparent([(b"traceparent", value)])
    assert found is None or len(found) == len(GOOD)


def test_it_is_logged_and_not_echoed(make_client, caplog, tmp_path):
    client = make_client(access_log=True, audit_file=tmp_path / "log", audit_on_failure="closed")
    with caplog.at_level(logging.INFO, "scumble.access"):
        for header in ({"traceparent": GOOD}, {"traceparent": "x"}, {}):
            answer = client.post("/v1/predict", content=PNG, headers=HEADERS | header)
            assert answer.status_code == 200
            assert "traceparent" not in answer.headers
    logged = [entry.traceparent for entry in caplog.records if entry.name == "scumble.access"]
    assert logged == [GOOD, None, None]
    lines = [orjson.loads(x) for x in (tmp_path / "log.worker-0").read_bytes().splitlines()]
    assert [line.get("traceparent") for line in lines[1:]] == [GOOD, None, None]


class Collector:
    """An OTLP collector in this process: keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list = []
        self.resources: list = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append(resource.resource)
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector():
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


def attributes(span) -> dict:
    return {
        entry.key: entry.value.string_value or entry.value.int_value for entry in span.attributes
    }


@pytest.mark.parametrize("by", ["setting", "standard variable"])
def test_a_collector_gets_a_span_per_request_and_stage(models, collector, monkeypatch, by):
    endpoint = {"otel_endpoint": collector.url} if by == "setting" else {}
    if by == "standard variable":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "classifier")
    app = create_app(Settings(model_dir=models, model="tiny", **endpoint))
    with TestClient(app) as client:
        client.get("/livez")
        client.get("/v1/model")
        sent = {"traceparent": GOOD, "X-Request-ID": "abc.1"}
        answer = client.post("/v1/predict?top_k=2", content=PNG, headers=HEADERS | sent)
        client.post("/v1/predict", content=b"x", headers=HEADERS)
        client.get("/a/scanner's/path")
    roots = {span.name: span for span in collector.spans if span.kind == span.SPAN_KIND_SERVER}
    assert set(roots) == {"GET /v1/model", "POST /v1/predict", "GET other"}
    assert len(collector.spans) == 4 + len(STAGES)
    name = "scumble" if by == "setting" else "classifier"
    (resource, *_) = collector.resources
    assert name in {entry.value.string_value for entry in resource.attributes}

    (root,) = [span for span in collector.spans if attributes(span).get("scumble.images")]
    assert root.trace_id.hex() == TRACE
    assert root.parent_span_id.hex() == SPAN
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/predict",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "scumble.request_id": "abc.1",
        "scumble.images": 1,
    }
    below = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert [span.name for span in below] == list(STAGES)
    assert all(not span.attributes for span in below)
    end = root.start_time_unix_nano
    for span in below:
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
        assert span.start_time_unix_nano >= end - 1000  # rounding
        end = span.end_time_unix_nano

    refusals = {attributes(span).get("scumble.refusal"): span for span in collector.spans}
    assert set(refusals) == {None, "unprocessable", "not_found"}
    refused = refusals["unprocessable"]
    assert refused.status.code == refused.status.STATUS_CODE_UNSET
    sent = b"".join(span.SerializeToString() for span in collector.spans)
    for prediction in answer.json()["predictions"]:
        assert str(prediction["probability"])[:6].encode() not in sent


def test_a_fault_of_the_server_is_an_error():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    context = RequestContext(id="a", traceparent=f"00-{TRACE}-{SPAN}-00", refusal="internal")
    scope = {"method": "POST", "state": {KEY: context}}
    Tracing(provider, now_ns=lambda: 10**9).request(scope, "/v1/predict", 500, 1.0, 0.25)
    assert exporter.get_finished_spans() == (), "the caller does not sample"
    context.traceparent = None
    Tracing(provider, now_ns=lambda: 10**9).request(scope, "/v1/predict", 500, 1.0, 0.25)
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code.name == "ERROR"
    assert (span.start_time, span.end_time) == (750_000_000, 10**9)


@given(st.lists(st.floats(0, 10), min_size=9, max_size=9))
def test_stages_never_overlap_and_stay_inside(values):
    *times, queue, infer, defend = values
    spans = list(Stages(*sorted(times), queue, infer, defend).spans())
    assert [name for name, _, _ in spans] == list(STAGES)
    flat = [time for _, begin, end in spans for time in (begin, end)]
    assert flat == sorted(flat)
    assert (flat[0], flat[-1]) == (min(times), max(times))


def test_a_dead_collector_harms_nobody(models):
    before = set(threading.enumerate())
    app = create_app(Settings(model_dir=models, model="tiny", otel_endpoint="http://127.0.0.1:9"))
    with TestClient(app) as client:
        for _ in range(20):
            answer = client.post("/v1/predict", content=PNG, headers=HEADERS)
            assert answer.status_code == 200
    sending = set(threading.enumerate()) - before
    assert sending, "the shutdown waited until the exporter gave up"
    # The exporter draws from the global random numbers, which would disturb other tests.
    for thread in sending:
        thread.join(30)


def test_off_unless_a_collector_is_named():
    assert make_tracing(Settings(), {}) is None
    named = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}
    assert make_tracing(Settings(), named) is None


def test_without_the_extra_a_setting_stops_and_a_platforms_variable_does_not(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "app.telemetry.tracing", None)
    with pytest.raises(ConfigError, match=re.escape(install_command("otel"))):
        make_tracing(Settings(otel_endpoint="http://127.0.0.1:9"), {})
    found = make_tracing(Settings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert found is None
    assert install_command("otel") in caplog.text
