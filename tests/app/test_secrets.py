"""Secrets in settings are used and never shown: each is planted, and all output searched for it."""

import io
import logging

import pytest
from click.testing import CliRunner
from prometheus_client import generate_latest
from pythonjsonlogger.orjson import OrjsonFormatter

from app.access.stores import open_store
from app.admin.console.facts import about
from app.errors import ConfigError
from app.main import create_app
from app.settings import load_settings
from app.system.urls import HIDDEN, redacted, split
from scumble.cli import main
from tests.pictures import PNG

PLANTED = "hunter2hunter2hunter2"
FORMS = {  # what a person may have typed for the password hunter2hunter2hunter2, or one with it
    "plain": PLANTED,
    "?": f"{PLANTED}?{PLANTED}",
    "#": f"{PLANTED}#{PLANTED}",
    "/": f"{PLANTED}/{PLANTED}",
    "a port": f"6379/{PLANTED}",
    "a port and ?": f"1?{PLANTED}",
    "a port and #": f"1#{PLANTED}",
    "[": f"[{PLANTED}",
    "@": f"{PLANTED}@{PLANTED}",
    ":": f"{PLANTED}:{PLANTED}",
    "backslash": f"{PLANTED}\\{PLANTED}",
    "blank": f"{PLANTED} {PLANTED}",
    "line": f"1\n{PLANTED}",
    "encoded": f"{PLANTED}%2F%3F%23%40",
}
every_form = pytest.mark.parametrize("password", FORMS.values(), ids=FORMS)


def where(text: str) -> str | None:
    """The beginning of the secret that `text` has in it, if it has some."""
    return PLANTED if PLANTED in text else None


@every_form
@pytest.mark.parametrize(
    "url",
    [
        "redis://me:{}@host:6379/1",
        "redis://:{}@host",
        "redis:///:{}@host",
        "redis://host/0?password={}",
        "redis:me:{}@host",
        "me:{}@host:6379",
        "http://me:{}@host:4318",
        "http://me:{}@host:99999999",
        "HTTPS://{}@host",
        "unix://me:{}@/run/redis.sock",
        "sqlite://{}@/b.db",
        "://{}",
    ],
)
def test_no_form_of_a_url_shows_its_password(url, password):
    shown = redacted(url.format(password))
    assert where(shown) is None
    with_scheme = url.format(password)
    for message in (_error(open_store, with_scheme), _error(split, with_scheme)):
        assert where(message) is None


def _error(call, url: str) -> str:
    try:
        call(url)
    except (ConfigError, ValueError) as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:hunter2@host:6379/1?password=x", "redis://host:6379/1"),
        ("redis://:p%2Fw@[::1]:6379/1", "redis://[::1]:6379/1"),
        ("unix://me:hunter2@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("sqlite:////var/lib/a@b.db", "sqlite:////var/lib/a@b.db"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("memory://", "memory://"),
        ("http://me:hunter2@host:4318/base#x", "http://host:4318/base"),
        ("redis://me:hun/ter2@host/1", HIDDEN),
        ("me:hunter2@host", HIDDEN),
        ("nonsense", "nonsense"),
        ("localhost:4318", "localhost:4318"),
        ("redis:/host", "redis:/host"),
    ],
)
def test_the_rest_of_a_url_is_shown(url, shown):
    assert redacted(url) == shown


def test_an_encoded_password_is_the_one_that_is_sent():
    store = open_store("redis://me:a%3Fb%23c%2Fd%40e@localhost/3")
    used = store._client.connection_pool.connection_kwargs
    assert (used["username"], used["password"], used["db"]) == ("me", "a?b#c/d@e", 3)


SETTINGS = {
    "SCUMBLE_STORE": "redis://me:{}@127.0.0.1:1/0",
    "SCUMBLE_OTEL_ENDPOINT": "http://me:{}@127.0.0.1:1",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:{}@127.0.0.1:1",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/?key={}",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization={}",
    "SCUMBLE_SECRET": "{}",
}


@pytest.fixture
def logged():
    """All that any logger says, with tracebacks."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(OrjsonFormatter("%(message)s"))
    handler.addFilter(lambda record: record.name != "httpx2")  # the test's own client
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text.getvalue
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize(
    ("variable", "form"),
    [
        *((name, "plain") for name in SETTINGS),
        *(
            (name, form)
            for name in ("SCUMBLE_STORE", "SCUMBLE_OTEL_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
            for form in ("?", "#", "/", "a port", "line")
        ),
    ],
)
def test_check_the_console_and_start_errors_show_no_secret(
    models, monkeypatch, logged, variable, form
):
    value = SETTINGS[variable].format(FORMS[form])
    monkeypatch.setenv("SCUMBLE_MODEL_DIR", str(models))
    monkeypatch.setenv("SCUMBLE_MODEL", "tiny")
    monkeypatch.setenv(variable, value)
    said = [CliRunner().invoke(main, ["check"]).output]
    try:
        settings = load_settings()
        said += [
            repr(settings),
            str(settings),
            repr(about(settings, settings.model_dir / settings.model)),
        ]
        create_app(settings)
    except ConfigError as exc:
        said.append(str(exc))
    assert where("".join([*said, logged()])) is None


@pytest.mark.parametrize(
    "toml",
    [
        f'secert = "{PLANTED}"',
        f'store_url = "redis://{PLANTED}@host"',
        f'secret = ["{PLANTED}"]',
        f'store = ["redis://{PLANTED}@host"]',
        f'otel_endpoint = {{ url = "http://{PLANTED}@host" }}',
        f'otel_endpoint = "grpc://me:{PLANTED}@host"',
        f'otel_endpoint = "http://host?{PLANTED}"',
        f'secret = "{PLANTED}',
    ],
)
def test_a_refused_file_of_settings_shows_no_secret(monkeypatch, tmp_path, toml):
    file = tmp_path / "scumble.toml"
    file.write_text(toml)
    monkeypatch.setenv("SCUMBLE_CONFIG", str(file))
    done = CliRunner().invoke(main, ["check"])
    assert done.exit_code == 1
    assert where(done.output) is None


def test_a_server_that_cannot_reach_its_store_and_collector_shows_no_secret(
    make_client, logged, monkeypatch
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    settings = {
        "store": f"redis://me:{PLANTED}@127.0.0.1:1/0",
        "otel_endpoint": f"http://me:{PLANTED}@127.0.0.1:1",
        "secret": PLANTED,
        "workers": 1,
        "budget": {"total_images": 5},
        "access_log": True,
    }
    client = make_client(**settings)
    answers = [
        client.post("/v1/predict", files=[("image", ("x.png", PNG, "image/png"))]),
        client.post("/v1/predict", headers={"X-API-Key": PLANTED}),
        client.get("/readyz"),
        client.get(f"/v1/model?key={PLANTED}", headers={"Authorization": f"Bearer {PLANTED}"}),
    ]
    assert answers[0].status_code == 503
    for answer in answers:
        assert where(f"{answer.text} {answer.headers}") is None
    assert where(generate_latest(client.app.state.service.metrics.registry).decode()) is None
    client.close()
    said = logged()
    assert "budget store unavailable" in said
    assert '"request"' in said, "the access log is on"
    assert where(said) is None
