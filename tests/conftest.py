"""What every test gets: no settings from outside, a tiny model, clients and real servers."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from scumble.evaluation.local_server import Server, serving
from tests.preloaded import Preloaded
from tests.tiny import make_bundle

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

ROOT = Path(__file__).parent.parent
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
DATA = ROOT.parent / "shared" / "data"


def pytest_configure():
    # A shell that starts the suite in the background has it ignore Ctrl-C, and its children, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    # Files with servers or training take longest. They run first, so that no core is left idle at
    # the end (`--dist loadfile --no-loadscope-reorder`).
    long = {item.path for item in items if any(map(item.get_closest_marker, ("server", "torch")))}
    long |= {item.path for item in items if item.path.parent.name == "attacker"}
    items.sort(key=lambda item: item.path not in long)
    if DATA.is_dir():
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=f"the image sets are not at {DATA}"))


def remove_settings(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("SCUMBLE_") or name.lower() in PROXIES:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    remove_settings(monkeypatch)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A model folder with the bundle `tiny`."""
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return folder


@pytest.fixture
def own_models(models, tmp_path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(models, tmp_path / "models"))


@contextmanager
def clients(models) -> Iterator:
    """Makes clients of applications of `tiny` and closes them at the end."""
    with ExitStack() as stack:

        def make(**overrides) -> TestClient:
            app = create_app(Settings(**{"model_dir": models, "model": "tiny", **overrides}))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture
def make_client(models):
    """`make_client(**settings)` -> a client of an application in this process."""
    with clients(models) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_client(models):
    """As `make_client`, for an application that many tests of a module ask and none changes."""
    with pytest.MonkeyPatch.context() as monkeypatch, clients(models) as make:
        remove_settings(monkeypatch)
        yield make


@pytest.fixture
def client(make_client) -> TestClient:
    return make_client()


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Preloaded]:
    """The process that servers are forked from."""
    process = Preloaded()
    yield process
    process.close()


@contextmanager
def servers(serving, models) -> Iterator:
    """Starts servers of `tiny` and stops them at the end."""
    with ExitStack() as stack:

        def start(**overrides) -> Server:
            settings = {"model_dir": models, "model": "tiny", **overrides}
            return stack.enter_context(serving(**settings))

        yield start


@pytest.fixture
def serve(models, preloaded) -> Iterator:
    """`serve(**settings)` -> a real server, its workers and its ports."""
    with servers(preloaded.serving, models) as start:
        yield start


@pytest.fixture
def serve_from_scratch(models) -> Iterator:
    """As `serve`, for tests of how processes start: a Python of its own that imports everything."""
    with servers(serving, models) as start:
        yield start
